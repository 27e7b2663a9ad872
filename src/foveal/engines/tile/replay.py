"""Launches that are prepared once and repeated with other pointers.

Between two calls of one kind only the addresses of tensors differ; what the host does for a launch
(views, descriptors, the compiler's own cache) is otherwise the same every time and takes longer than
a small kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveal._capture import capturing
from foveal._recent import Recent
from foveal.engines.tile.compiling import Call, await_triton, compile_side_by_side

Results = tuple[Tensor | None, ...]
Pointers = Sequence[int]

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
# The first calls of a kind may also upload bounds and lists, which is not repeated.
_ATTEMPTS = 4
# Kernels are compiled for pointers that are multiples of this.
_ALIGNMENT = 16
_recording = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), by a recording of this thread if there is one."""
    recorder: _Recorder | None = getattr(_recording, "recorder", None)
    if recorder is None:
        await_triton()
        kernel[grid](*arguments, **options)
    else:
        recorder.launch(kernel, grid, arguments, options)


def replayed(
    kept: Recent[Replay | int],
    kind: Hashable,
    tensors: Sequence[Tensor],
    compute: Callable[[], Results],
) -> Results:
    """compute(), which allocates, makes views of `tensors` and launches; as a repetition if there was one.

    All that decides on its launches but the shapes and strides of the tensors is in `kind`: a vmap
    brings other batches.
    """
    pointers = [x.data_ptr() for x in tensors]
    if any(pointer % _ALIGNMENT for pointer in pointers):
        return compute()
    # A tensor that is given twice is one tensor to a recording.
    alike = tuple(map(pointers.index, pointers))
    key = (kind, alike, *((x.shape, x.stride()) for x in tensors))
    found = kept.get(key)
    if isinstance(found, Replay):
        return found.run(pointers)
    failures = 0 if found is None else found
    if failures == _ATTEMPTS or capturing(tensors[0]):
        return compute()
    recorder = _Recorder(tensors)
    with recorder:
        results = compute()
    replay = recorder.replay(results)
    kept.put(key, failures + 1 if replay is None else replay)
    return results


@dataclass(frozen=True)
class _Memory:
    """A tensor in memory that a call is given or allocates: which of them, and where in it."""

    source: int
    offset: int  # bytes

    def __call__(self, pointers: Pointers) -> int:
        return pointers[self.source] + self.offset


@dataclass(frozen=True)
class _Descriptor:
    """A tensor descriptor whose base moves; it was checked when it was made the first time."""

    kind: type
    fields: dict[str, Any]
    base: _Memory

    def __call__(self, pointers: Pointers) -> Any:
        made: Any = object.__new__(self.kind)
        made.__dict__.update(self.fields, base=_Address(self.base(pointers)))
        return made


def _without_base(descriptor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(descriptor).items() if name != "base"}


class _Address:
    """What a launch reads of the base of a descriptor."""

    __slots__ = ("_pointer",)

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def data_ptr(self) -> int:
        return self._pointer


@dataclass(frozen=True)
class _Tuple:
    """A tuple of which some members move."""

    members: tuple[Any, ...]
    moving: tuple[tuple[int, Callable[[Pointers], Any]], ...]

    def __call__(self, pointers: Pointers) -> tuple[Any, ...]:
        members = list(self.members)
        for index, make in self.moving:
            members[index] = make(pointers)
        return tuple(members)


@dataclass(frozen=True)
class _Launch:
    compiled: Any
    grid: tuple[int, int, int]
    arguments: _Tuple


@dataclass(frozen=True)
class _Allocation:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class _Result:
    """Allocation `index`, seen with these sizes from element `start`; whole: as it was allocated."""

    index: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    whole: bool

    def __call__(self, made: list[Tensor]) -> Tensor:
        base = made[self.index]
        return base if self.whole else base.as_strided(self.size, self.stride, self.start)


@dataclass(frozen=True)
class Replay:
    """All launches of a call, in their order; `constants` keeps alive what they also read."""

    allocations: tuple[_Allocation, ...]
    launches: tuple[_Launch, ...]
    results: tuple[_Result | None, ...]
    constants: tuple[Tensor, ...]

    def run(self, given: list[int]) -> Results:
        made = [allocate() for allocate in self.allocations]
        pointers = given + [x.data_ptr() for x in made]
        for step in self.launches:
            step.compiled[step.grid](*step.arguments(pointers))
        return tuple(None if result is None else result(made) for result in self.results)


def _only_looks(func: Any) -> bool:
    """Whether an operation of PyTorch reads and writes no memory: its result is a view."""
    schema = func._schema
    aliases = [r.alias_info for r in schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


class _Recorder(TorchDispatchMode):
    """Watches a call: where its tensors come from, and what it launches.

    Sound as long as the call only allocates, views and launches.  Launches wait until something is
    computed on the device or the call ends: the kernels of those that wait are compiled side by side.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bases = list(tensors)
        self._given = len(self._bases)
        self._sources = {id(x): index for index, x in enumerate(self._bases)}
        self._views: list[Tensor] = []  # kept, so that no address of an object is used twice
        self._constants: list[Tensor] = []
        self._launches: list[_Launch] = []
        self._waiting: list[Call] = []
        self._sound = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler, which takes seconds, to tell it that this is not to be traced;
        where it traces, a call is one operator."""
        return False

    def __enter__(self) -> _Recorder:
        _recording.recorder = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _recording.recorder = None
        if error[0] is None:
            self._start()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _ALLOCATIONS and not _only_looks(func) and not self._apart(args, kwargs):
            self._start()
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._sources[id(out)] = len(self._bases)
            self._bases.append(out)
        elif self._is_view(func, out, args):
            self._views.append(out)
            source = self._sources.get(id(args[0]))
            if source is not None:
                self._sources[id(out)] = source
        else:
            self._sound = False
        return out

    def _apart(self, *given: Any) -> bool:
        """Whether an operation on these arguments only meets memory that the kernels do not: the host's."""
        if self._bases[0].device.type == "cpu":
            return False
        places = (x.device if isinstance(x, Tensor) else x for x in tree_leaves(given))
        return all(x.type == "cpu" for x in places if isinstance(x, torch.device))

    def _is_view(self, func: Any, out: Any, args: tuple[Any, ...]) -> bool:
        if func._schema.is_mutable or not isinstance(out, Tensor) or not args:
            return False
        if not isinstance(args[0], Tensor):
            return False
        return out.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self._waiting.append((kernel, grid, arguments, options))

    def _start(self) -> None:
        """Launches what waits, in its order."""
        waiting, self._waiting = self._waiting, []
        compile_side_by_side(waiting, self._bases[0].device)
        for kernel, grid, arguments, options in waiting:
            self._add(kernel, kernel[grid](*arguments, **options), grid, arguments, options)

    def _add(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        names = kernel.arg_names
        named = {**dict(zip(names, arguments, strict=False)), **options}
        if compiled is None or not all(name in named for name in names):
            self._sound = False
            return
        x, y, z = (*grid, 1, 1)[:3]
        template = self._tuple(tuple(named[name] for name in names))
        self._launches.append(_Launch(compiled, (x, y, z), template))

    def _tuple(self, members: tuple[Any, ...]) -> _Tuple:
        made = [self._moving(member) for member in members]
        moving = tuple((index, move) for index, move in enumerate(made) if move is not None)
        still = tuple(
            self._constant(m) if move is None else None
            for m, move in zip(members, made, strict=True)
        )
        return _Tuple(still, moving)

    def _moving(self, value: Any) -> Callable[[Pointers], Any] | None:
        """How to make an argument from the pointers of a call, or None if it stays."""
        if isinstance(value, Tensor):
            return self._memory(value)
        if type(value) is tuple:
            inside = self._tuple(value)
            return inside if inside.moving else None
        if isinstance(value, (tuple, list, dict)):
            self._sound = False
        if isinstance(getattr(value, "base", None), Tensor):
            base = self._memory(value.base)
            return None if base is None else _Descriptor(type(value), _without_base(value), base)
        return None

    def _memory(self, x: Tensor) -> _Memory | None:
        source = self._sources.get(id(x))
        if source is None:
            return None
        return _Memory(source, x.data_ptr() - self._bases[source].data_ptr())

    def _constant(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._constants.append(value)
            return value.data_ptr()
        if isinstance(value, tuple):
            return tuple(self._constant(member) for member in value)
        return value

    def replay(self, results: Results) -> Replay | None:
        """What was seen, or None if it cannot be repeated."""
        found = [None if x is None else self._result(x) for x in results]
        if not self._sound or any(
            r is None for r, x in zip(found, results, strict=True) if x is not None
        ):
            return None
        allocations = tuple(
            _Allocation(tuple(x.shape), x.stride(), x.dtype, x.device)
            for x in self._bases[self._given :]
        )
        return Replay(allocations, tuple(self._launches), tuple(found), tuple(self._constants))

    def _result(self, x: Tensor) -> _Result | None:
        source = self._sources.get(id(x))
        if source is None or source < self._given:
            return None
        base = self._bases[source]
        start = (x.data_ptr() - base.data_ptr()) // x.element_size()
        return _Result(source - self._given, tuple(x.shape), x.stride(), start, x is base)
