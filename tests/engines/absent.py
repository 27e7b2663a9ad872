"""Calls on a GPU that is not here: nothing is computed, and every launch is kept and can be compiled.

Tensors on "cuda" are tensors without memory that say they are there.  Run it in a process of its own:
plans and lists that are kept between calls would hold such tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_META = torch.device("meta")
_SAID = {"device": torch.device("cuda", 0), "is_cuda": True, "is_meta": False}
_NUMBERS = (Tensor.item, Tensor.__int__, Tensor.__index__)
_COUNTS = (torch.bincount, Tensor.bincount)
_ANY = (torch.any, Tensor.any)
_NUMBER = 50
"""What the host reads from the device where it reads a number."""


@dataclass(frozen=True)
class Device:
    """A kind of GPU: what Triton compiles for it, and what PyTorch says about it."""

    target: tuple[str, int | str, int]
    shared: int

    @property
    def capability(self) -> tuple[int, int]:
        number = self.target[1]
        return (9, 4) if isinstance(number, str) else divmod(number, 10)

    @property
    def properties(self) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(
            multi_processor_count=132, warp_size=self.target[2], major=major, minor=minor,
            name="absent", total_memory=80 << 30, L2_cache_size=50 << 20,
            shared_memory_per_block_optin=self.shared,
        )  # fmt: skip


DEVICES = {
    "sm_80": Device(("cuda", 80, 32), 163 << 10),
    "sm_90": Device(("cuda", 90, 32), 227 << 10),
    "sm_100": Device(("cuda", 100, 32), 227 << 10),
    "gfx942": Device(("hip", "gfx942", 64), 64 << 10),
}


@dataclass(frozen=True)
class Call:
    """A kernel and everything that it was launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        module = self.kernel.fn.__module__.rpartition(".")[2]
        return f"{module}.{self.kernel.__name__}"

    def compile(self) -> Any:
        """As the launch would have; raises where Triton cannot."""
        return self.kernel.warmup(*self.arguments, grid=(1,), **self.options)


class _There(TorchFunctionMode):
    """Tensors that are asked for on a GPU have no memory, and say that they are on it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            found = self._read(func, args[0], len(args) + len(options))
            if found is not None:
                return found
        if func in _COUNTS and args[0].is_meta:
            return torch.empty(options.get("minlength", _NUMBER), dtype=torch.int64, device=_META)
        moved = {k: _place(v) if k == "device" else v for k, v in options.items()}
        return func(*(_place(x) for x in args), **moved)

    def _read(self, func: Any, x: Tensor, given: int) -> Any:
        """What the host finds out about a tensor, or None where it computes."""
        name = getattr(getattr(func, "__self__", None), "__name__", None)
        if name in _SAID:
            return _SAID[name]
        if func is Tensor.data_ptr:
            return 0
        if func in _NUMBERS:
            return _NUMBER
        if func is Tensor.__float__:
            return float(_NUMBER)
        if func is Tensor.__bool__ or func is torch.equal:
            return True
        if func in _ANY and given == 1:  # what is checked holds
            return torch.zeros((), dtype=torch.bool)
        if func is Tensor.tolist:
            return torch.full(x.shape, _NUMBER).tolist()
        return torch.zeros(x.shape, dtype=x.dtype) if func is Tensor.cpu else None


def _place(x: Any) -> Any:
    """A device, with "meta" for a GPU; other values as they are."""
    if isinstance(x, torch.device):
        return _META if x.type == "cuda" else x
    return _META if isinstance(x, str) and x.split(":")[0] == "cuda" else x


@contextlib.contextmanager
def absent(device: Device) -> Iterator[list[Call]]:
    """While it is open calls run as on such a device; the list has their launches."""
    from triton.runtime.jit import JITFunction

    from foveal.engines.decode import launch as decode
    from foveal.engines.tile import replay

    found: list[Call] = []
    there = _There()
    engine: Any = torch.autograd
    run_backward = engine._engine_run_backward

    def keep(kernel: Any, *arguments: Any, grid: Any = None, warmup: Any = None, **own: Any) -> Any:
        found.append(Call(kernel, arguments, own))

    def differentiate(*arguments: Any, **options: Any) -> Any:
        with there:  # PyTorch leaves it for the backward
            return run_backward(*arguments, **options)

    from torch.fx.experimental import _config as guesses

    said = {
        "is_available": True, "current_device": 0, "is_current_stream_capturing": False,
        "get_device_capability": device.capability, "get_device_name": "absent",
        "get_device_properties": device.properties, "device": contextlib.nullcontext(),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in said.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _always(value)))
        hip = "6.4" if device.target[0] == "hip" else None
        for target, name, value in (
            (torch.version, "hip", hip),
            (engine, "_engine_run_backward", differentiate),
            (JITFunction, "run", keep),
            (JITFunction, "warmup", lambda *_, **__: SimpleNamespace(run=None)),
            (guesses, "meta_nonzero_assume_all_nonzero", True),
            (replay, "_ATTEMPTS", 0),  # nothing is kept as launches of addresses
            (decode, "serves", lambda *_: False),  # CUDA C++ is compiled elsewhere
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(there)
        yield found


def _always(value: Any) -> Any:
    return lambda *_, **__: value


class _Driver:
    """What compiling asks of a driver."""

    def __init__(self, device: Device) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(*device.target)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def failures(calls: Sequence[Call], device: Device) -> tuple[int, list[str]]:
    """How many kernels were compiled, each once, and what is wrong with those that do not fit."""
    from triton.runtime import driver

    driver.set_active(_Driver(device))
    seen, wrong = set(), []
    for call in calls:
        try:
            compiled = call.compile()
        except Exception as error:  # Triton raises what it likes
            wrong.append(f"{call.name} {call.options}: {type(error).__name__}: {error}"[:2000])
            continue
        if compiled.hash not in seen and compiled.metadata.shared > device.shared:
            wrong.append(f"{call.name} {call.options}: {compiled.metadata.shared} bytes shared")
        seen.add(compiled.hash)
    return len(seen), wrong
