"""Launches repeated with other pointers, with kernels that read and write plain CPU memory."""

from __future__ import annotations

import ctypes
import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal.engines.tile
from foveal._recent import Recent
from foveal.engines.tile import replay
from foveal.engines.tile.replay import Replay, launch, replayed


@dataclass
class Descriptor:
    """As the descriptors of a kernel language: a base and how to read it."""

    base: Any
    shape: tuple[int, ...]


def floats(argument: Any, count: int) -> Any:
    """The memory at a tensor, an address, or the base of a descriptor."""
    at = getattr(argument, "base", argument)
    pointer = at if isinstance(at, int) else at.data_ptr()
    return (ctypes.c_float * count).from_address(pointer)


class Scaled:
    """out = factor x (a + b[0]), `count` floats; counts how often the slow way was taken."""

    arg_names = ("out", "a", "b", "factor", "COUNT")

    def __init__(self) -> None:
        self.slow = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, COUNT: int, num_warps: int) -> Compiled:
            self.slow += 1
            compiled = Compiled()
            compiled[(*grid, 1, 1)[:3]](*arguments, COUNT)
            return compiled

        return run


class Compiled:
    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def run(out: Any, a: Any, b: Any, factor: Any, count: int) -> None:
            assert len(grid) == 3
            result, left, right = floats(out, count), floats(a, count), floats(b[0], count)
            more = floats(factor, 1)[0]
            for i in range(count):
                result[i] = more * (left[i] + right[i])

        return run


class Call:
    """out = factor x (factor x (x + y) + x's second row), returned as a view too."""

    def __init__(self) -> None:
        self.kernel, self.kept = Scaled(), Recent[Replay | int](4)
        self.factor = torch.tensor([3.0])

    def compute(self, x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        middle, out = torch.empty_like(x[0]), x.new_empty(2, 8)
        launch(self.kernel, (1,), middle, x[0], (y[0], 1), self.factor, COUNT=8, num_warps=4)
        launch(
            self.kernel,
            (1, 1),
            out.view(16)[8:],
            Descriptor(middle, (8,)),
            (x.flatten()[8:], None),
            self.factor,
            COUNT=8,
            num_warps=4,
        )
        return out[1], None, middle

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        return replayed(self.kept, "call", (x, y), lambda: self.compute(x, y))


def inputs(source: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, generator=source), torch.randn(1, 8, generator=source)
    return x, y


def test_a_repetition_computes_the_same(source: torch.Generator) -> None:
    call = Call()
    for _ in range(4):
        x, y = inputs(source)
        out, nothing, middle = call(x, y)
        assert nothing is None
        torch.testing.assert_close(middle, 3 * (x[0] + y[0]))
        torch.testing.assert_close(out, 3 * (3 * (x[0] + y[0]) + x[1]))
    assert call.kernel.slow == 2


def test_other_strides_and_other_alignment_are_other_calls(source: torch.Generator) -> None:
    call = Call()
    x, y = inputs(source)
    call(x, y)
    wide = torch.randn(1, 16, generator=source)[:, :8]
    shifted = torch.randn(17, generator=source)[1:].view(2, 8)
    for first, second in ((x, wide), (shifted, y), (x, wide), (shifted, y)):
        torch.testing.assert_close(call(first, second)[2], 3 * (first[0] + second[0]))
    assert call.kernel.slow == 2 + 2 + 2 * 2


def test_another_batch_is_another_call(source: torch.Generator) -> None:
    call = Call()
    x, y = inputs(source)
    more = torch.randn(3, 8, generator=source)
    assert more.stride() == x.stride()
    for first in (x, more, x, more):
        torch.testing.assert_close(call(first, y)[2], 3 * (first[0] + y[0]))
    assert call.kernel.slow == 2 + 2


def test_one_tensor_given_twice_is_another_call(source: torch.Generator) -> None:
    call = Call()
    x, y = inputs(source)
    for first, second in ((x, x), (x, torch.randn(2, 8, generator=source)), (x, x), (x, y)):
        torch.testing.assert_close(call(first, second)[2], 3 * (first[0] + second[0]))


def test_holds_what_is_constant_and_nothing_that_was_given(source: torch.Generator) -> None:
    call = Call()
    x, y = inputs(source)
    results = call(x, y)
    watched = [weakref.ref(t) for t in (x, y, *results) if t is not None]
    del x, y, results
    gc.collect()
    assert all(ref() is None for ref in watched)


@pytest.mark.parametrize("operation", ["compute", "write", "read"])
def test_a_call_that_does_more_is_not_repeated(operation: str, source: torch.Generator) -> None:
    call = Call()
    plain = call.compute

    def more(x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        results = plain(x, y)
        if operation == "compute":
            return results[0], None, results[2] * 1
        if operation == "write":
            results[2].mul_(1)
        elif bool(results[2].sum() > 1e9):
            raise AssertionError
        return results

    call.compute = more  # type: ignore[method-assign]
    for _ in range(6):
        x, y = inputs(source)
        torch.testing.assert_close(call(x, y)[2], 3 * (x[0] + y[0]))
    assert call.kernel.slow == 2 * 6


def test_what_is_uploaded_first_is_repeated_later(source: torch.Generator) -> None:
    call = Call()
    plain, uploaded = call.compute, []

    def upload(x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        if not uploaded:
            uploaded.append(torch.ones(3) + 1)
        return plain(x, y)

    call.compute = upload  # type: ignore[method-assign]
    for _ in range(4):
        call(*inputs(source))
    assert call.kernel.slow == 2 * 2


def test_every_kernel_is_launched_where_a_recording_sees_it() -> None:
    """A launch that it misses would be missing from the repetition."""
    folder = Path(foveal.engines.tile.__file__).parent
    for path in folder.glob("*.py"):
        assert not re.search(r"\btile_attend_\w+\[", path.read_text()), path.name


class Noted:
    """A kernel that is launched for tensors without memory, and notes when."""

    arg_names = ("out",)

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def run(out: Tensor) -> object:
            self.order.append("launched")
            return object()

        return run


@pytest.mark.parametrize("computes", ["on the host", "on the device"])
def test_launches_wait_while_only_the_host_computes(
    computes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    kernel = Noted(order)
    x = torch.empty(8, device="meta")
    monkeypatch.setattr(
        replay, "compile_side_by_side", lambda calls, _: order.append(str(len(calls)))
    )
    with replay._Recorder([x]):
        launch(kernel, (1,), x)
        if computes == "on the host":
            torch.arange(4).clamp(min=2).to("cpu", torch.float32)
        else:
            x.zero_()
        order.append("computed")
        launch(kernel, (1,), x)
    host = ["computed", "2", "launched", "launched"]
    device = ["1", "launched", "computed", "1", "launched"]
    waited = host if computes == "on the host" else device
    assert [step for step in order if step != "0"] == waited


def test_what_comes_from_the_host_is_computed_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    x = torch.empty(8, device="meta")
    monkeypatch.setattr(replay, "compile_side_by_side", lambda *_: None)
    with replay._Recorder([x]):
        launch(Noted(order), (1,), x)
        torch.zeros(4).to("meta")
        order.append("moved")
        launch(Noted(order), (1,), x)
        torch.zeros(4, device="meta")
        order.append("made")
    assert order == ["launched", "moved", "launched", "made"]
