"""Runs a Gluon kernel on CPU tensors, program by program: Triton's interpreter does not know Gluon."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Pointer:
    """Into a tensor, as an offset in elements."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset + step)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(mask))
        offset = torch.where(mask, offset, 0)
        assert not mask.any() or (offset.min() >= 0 and offset.max() < self.memory.numel())
        return offset, mask


class Shared:
    """A piece of shared memory."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory.narrow(dim, start, length))

    def load(self, layout: Any) -> Tensor:
        return self.memory.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.memory.shape
        self.memory.copy_(value)


class Order:
    """What an early launch may touch: until it waits, nothing that the launch in front of it wrote."""

    def __init__(self) -> None:
        self.front, self.written = set[int](), set[int]()
        self.lets = self.waits = self.front_lets = self.follows = False

    def begin(self, follows: bool) -> None:
        """A launch, or one that started early behind another, which has to be an ordinary one."""
        self.front, self.written = self.written, set()
        self.front_lets, self.lets = self.lets, False
        assert not follows or (self.front_lets and not self.follows)
        self.follows = follows

    def reads(self, memory: Tensor) -> None:
        assert not self.waits or _place(memory) not in self.front, "read before it was written"

    def writes(self, memory: Tensor) -> None:
        assert not self.waits, "written while the launch in front may read"
        self.written.add(_place(memory))

    def wait(self) -> None:
        self.waits = False

    def let(self) -> None:
        self.lets = True


def _place(memory: Tensor) -> int:
    return memory.untyped_storage().data_ptr()


class Copies:
    """Copies to shared memory that arrive where they are waited for, and what is masked never."""

    def __init__(self, order: Order) -> None:
        self.order, self.begun = order, list[tuple[Shared, Tensor]]()

    def load_elements(self, shared: Shared, pointer: Pointer, mask: Tensor) -> None:
        offset, mask = pointer.places(mask)
        assert offset.shape == shared.memory.shape
        self.order.reads(pointer.memory)
        value = torch.where(mask, pointer.memory.view(-1)[offset], torch.nan)
        self.begun.append((shared, value))

    def commit_group(self) -> None:
        pass

    def wait_group(self, outstanding: int) -> None:
        assert outstanding == 0
        for shared, value in self.begun:
            shared.store(value)
        self.begun.clear()


class Language:
    """What a kernel asks of `gl`."""

    int64, float32 = torch.int64, torch.float32
    constexpr = object
    where = staticmethod(torch.where)

    def __init__(self, order: Order) -> None:
        self.program, self.order = 0, order

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self.program)

    def static_range(self, *bounds: int) -> range:
        return range(*bounds)

    def num_warps(self) -> int:
        return 8

    def arange(self, start: int, end: int, layout: Any) -> Tensor:
        return torch.arange(start, end)

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
        offset, mask = pointer.places(mask)
        self.order.reads(pointer.memory)
        return torch.where(mask, pointer.memory.view(-1)[offset], other)

    def store(self, pointer: Pointer, value: Tensor, mask: Any = True) -> None:
        offset, mask, value = torch.broadcast_tensors(*pointer.places(mask), value)
        assert len(offset[mask].unique()) == len(offset[mask])
        self.order.writes(pointer.memory)
        pointer.memory.view(-1)[offset[mask]] = value[mask]

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(torch.full(shape, torch.nan, dtype=dtype))

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], dim=-1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 0], x[..., 1]

    def convert_layout(self, x: Tensor, layout: Any, assert_trivial: bool) -> Tensor:
        assert assert_trivial
        return x

    def reshape(self, x: Tensor, shape: list[int]) -> Tensor:
        return x.reshape(shape)

    def permute(self, x: Tensor, order: list[int]) -> Tensor:
        return x.permute(order)

    def __getattr__(self, name: str) -> Callable[..., None]:
        assert name.endswith("Layout"), name
        return lambda *arguments: None


class Emulated:
    """Stands in for a kernel in the module that launches it."""

    def __init__(self, kernel: Any) -> None:
        self.order = Order()
        self.language, self.copies = Language(self.order), Copies(self.order)
        self.kernel, self.arguments = self._plain(kernel), kernel.arg_names

    def _plain(self, kernel: Any) -> Callable[..., Any]:
        """The function with this language, and so the functions that it calls."""
        names = dict(kernel.fn.__globals__)
        plain = types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__)
        for name in kernel.fn.__code__.co_names:
            if type(names.get(name)).__name__ == "GluonJITFunction":
                names[name] = self._plain(names[name])
        names |= {
            "gl": self.language,
            "async_copy": self.copies,
            "load_elements": self.copies.load_elements,
            "gdc_wait": self.order.wait,
            "gdc_launch_dependents": self.order.let,
        }
        return plain

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            values = dict(zip(self.arguments, arguments, strict=False))
            values |= {name: value for name, value in options.items() if name in self.arguments}
            for name, value in values.items():
                if isinstance(value, Tensor):
                    assert value.is_contiguous()
                    values[name] = Pointer(value)
            (count,) = programs
            follows = options.get("launch_pdl", False)
            self.order.begin(follows)
            for self.language.program in range(count):
                self.order.waits = follows
                self.kernel(**values)
                assert not self.order.waits, (
                    "the launch behind would not be behind the one in front"
                )
                assert not self.copies.begun

        return launch
