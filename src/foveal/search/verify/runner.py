"""A program in a confined process, applied to the judge's tensors; its memory is looked at every time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from foveal.search.isolate.channel import Message, Region, dtype_name, dtype_of
from foveal.search.isolate.measure_ops import FACTS
from foveal.search.isolate.process import Process, ProgramError
from foveal.search.task import Case

RED_ZONE = 4096
"""Bytes around every tensor that nobody may write to."""
_PATTERN = 0xA5
_POISON = 0xFF

Outline = tuple[tuple[tuple[int, ...], str], ...]
"""Shapes and element types of outputs."""


class TamperedError(ProgramError):
    """A program wrote where it must not: to its inputs, or beside its outputs."""


@dataclass(frozen=True)
class Call:
    """What a program is applied to.

    `state`: parameters of a model by name; `cotangents`: weights of the outputs when gradients of the
    `leaves` (numbers of inputs) are wanted; `wide`: compute in float64.
    """

    case: Case
    inputs: tuple[Tensor, ...]
    state: tuple[tuple[str, Tensor], ...] = ()
    cotangents: tuple[Tensor, ...] = ()
    leaves: tuple[int, ...] = ()
    wide: bool = False

    def in_float64(self) -> Call:
        return replace(self, wide=True)

    @property
    def options(self) -> Message:
        return {"arguments": list(self.case.arguments)}


@dataclass
class _Arena:
    """Hands out pieces of shared memory with red zones between them."""

    size: int
    end: int = RED_ZONE
    zones: list[int] = field(default_factory=lambda: [0])

    def place(self, shape: tuple[int, ...], dtype: str, strides: Any = None) -> Region:
        region = Region(self.end, shape, dtype, strides)
        after = -(-(self.end + region.nbytes) // 64) * 64
        self.zones.append(after)
        self.end = after + RED_ZONE
        if self.end > self.size:
            raise ProgramError("its tensors do not fit into the memory that is shared with it")
        return region


class Runner:
    """One program in one process.  Raises ProgramError when the program does not load."""

    def __init__(
        self,
        process: Process,
        program: Message,
        *,
        threads: int = 1,
        device: str = "cpu",
        seconds: float = 20.0,
    ) -> None:
        self.process = process
        self.program = program
        self.seconds = seconds
        self._arranged: list[tuple[list[Region], list[Region]]] = []
        self._loaded_state: tuple[int, ...] = ()
        try:
            process.ask(
                {"do": "load", "program": program, "threads": threads, "device": device}, seconds
            )
        except ProgramError:
            process.close()
            raise

    def outline(self, call: Call) -> Outline:
        """Shapes and types of the outputs, followed by those of the gradients of the leaves."""
        arena = self._arena()
        inputs = [self._put(arena, x) for x in call.inputs]
        self._give_state(arena, call)
        answer = self._ask({"do": "outline", "inputs": _messages(inputs), **call.options})
        found = tuple((tuple(o["shape"]), str(o["dtype"])) for o in answer["outputs"])
        return found + tuple(
            (tuple(call.inputs[i].shape), dtype_name(call.inputs[i].dtype)) for i in call.leaves
        )

    def run(
        self,
        call: Call,
        outline: Outline,
        *,
        poison: bool = False,
        strided: bool = False,
    ) -> list[Tensor]:
        """Outputs and gradients, copied out.  Raises TamperedError and ProgramError."""
        arena = self._arena()
        inputs = [self._put(arena, x, strided) for x in call.inputs]
        weights = [self._put(arena, x) for x in call.cotangents]
        self._give_state(arena, call)
        outputs = [arena.place(shape, self._dtype(d, call)) for shape, d in outline]
        self._spoil(outputs)
        self._paint(arena)
        request = {
            "do": "run",
            "inputs": _messages(inputs),
            "outputs": _messages(outputs),
            "cotangents": _messages(weights),
            "leaves": list(call.leaves),
            "dtype": "float64" if call.wide else None,
            "poison": poison,
        }
        self._ask(request | call.options)
        found = [region.view(self.process.memory).clone() for region in outputs]
        self._inspect(arena, inputs, call.inputs)
        return found

    def draw(self, case: Case, seed: int) -> list[Tensor]:
        """Inputs that the program makes itself."""
        arena = self._arena()
        places = [arena.place(i.shape, i.dtype) for i in case.inputs]
        shapes = {i.name: list(i.shape) for i in case.inputs}
        self._ask({"do": "draw", "seed": seed, "outputs": _messages(places), "shapes": shapes})
        return [region.view(self.process.memory).clone() for region in places]

    def state(self) -> list[tuple[str, Tensor, bool]]:
        """Name, value, and whether it was learned, of the parameters and buffers of a model."""
        names = self._ask({"do": "state"})["state"]
        arena = self._arena()
        places = [arena.place(tuple(s["shape"]), str(s["dtype"])) for s in names]
        self._ask({"do": "state", "outputs": _messages(places)})
        values = [region.view(self.process.memory).clone() for region in places]
        learned = [bool(s["learned"]) for s in names]
        return [(str(s["name"]), x, w) for s, x, w in zip(names, values, learned, strict=True)]

    def profile(self, call: Call) -> dict[str, float]:
        """Facts about one call; a program may lie about them, which harms nobody else."""
        arena = self._arena()
        inputs = [self._put(arena, x) for x in call.inputs]
        self._give_state(arena, call)
        facts = self._ask({"do": "profile", "inputs": _messages(inputs), **call.options})
        found = {name: facts.get(name) for name in FACTS}
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in found.values()):
            raise ProgramError("what it says about a call are not the numbers that were asked for")
        return {name: float(value) for name, value in found.items() if value is not None}

    def arrange(self, call: Call, outline: Outline, calls: int) -> None:
        """Lays out `calls` sets of inputs and outputs for `timed`."""
        arena = self._arena()
        self._give_state(arena, call)
        self._arranged = []
        weights = [self._put(arena, x) for x in call.cotangents]
        for _ in range(calls):
            inputs = [arena.place(tuple(x.shape), dtype_name(x.dtype)) for x in call.inputs]
            outputs = [arena.place(shape, dtype) for shape, dtype in outline]
            self._arranged.append((inputs, outputs))
        sets = [
            {
                "inputs": _messages(inputs),
                "outputs": _messages(outputs),
                "cotangents": _messages(weights),
                "leaves": list(call.leaves),
            }
            for inputs, outputs in self._arranged
        ]
        self._ask({"do": "arrange", "sets": sets})
        self._timed_options = call.options
        self._timed_arena = arena

    def timed(self, sets: Sequence[Sequence[Tensor]]) -> tuple[float, list[list[Tensor]]]:
        """Seconds from the moment at which the inputs are there until all outputs are, and these.

        The process stands still while its inputs are written and while its outputs are read: what is
        not done when it says so is never done.
        """
        self.process.stop()
        memory = self.process.memory
        for tensors, (inputs, outputs) in zip(sets, self._arranged, strict=True):
            for x, region in zip(tensors, inputs, strict=True):
                region.view(memory).copy_(x)
            self._spoil(outputs)
        self._paint(self._timed_arena)
        self.process.post({"do": "go", **self._timed_options})
        start = time.perf_counter()
        self.process.go_on()
        self.process.answer(self.seconds)
        seconds = time.perf_counter() - start
        self.process.stop()
        found = [[r.view(memory).clone() for r in outputs] for _, outputs in self._arranged]
        for tensors, (inputs, _) in zip(sets, self._arranged, strict=True):
            self._inspect(self._timed_arena, inputs, tensors, zones=False)
        self._inspect(self._timed_arena, (), ())
        self.process.go_on()
        return seconds, found

    def close(self) -> None:
        self.process.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _arena(self) -> _Arena:
        return _Arena(len(self.process.memory))

    def _ask(self, request: Message) -> Message:
        return self.process.ask(request, self.seconds)

    def _dtype(self, dtype: str, call: Call) -> str:
        return "float64" if call.wide and dtype_of(dtype).is_floating_point else dtype

    def _put(self, arena: _Arena, x: Tensor, strided: bool = False) -> Region:
        strides = None
        if strided and x.dim():
            steps = [1] * x.dim()
            for axis in range(x.dim() - 2, -1, -1):
                steps[axis] = steps[axis + 1] * (x.shape[axis + 1] + 1)
            strides = tuple(steps)
        region = arena.place(tuple(x.shape), dtype_name(x.dtype), strides)
        region.view(self.process.memory).copy_(x)
        return region

    def _give_state(self, arena: _Arena, call: Call) -> None:
        if not call.state:
            return
        places = [(name, self._put(arena, x)) for name, x in call.state]
        messages = [{"name": name, **region.as_message()} for name, region in places]
        self._ask({"do": "take_state", "state": messages, "dtype": _wide(call)})

    def _spoil(self, outputs: Sequence[Region]) -> None:
        for region in outputs:
            stop = region.offset + region.nbytes
            self.process.memory[region.offset : stop] = bytes([_POISON]) * region.nbytes

    def _paint(self, arena: _Arena) -> None:
        zone = bytes([_PATTERN]) * RED_ZONE
        for start in arena.zones:
            self.process.memory[start : start + RED_ZONE] = zone

    def _inspect(
        self,
        arena: _Arena,
        inputs: Sequence[Region],
        own: Sequence[Tensor],
        zones: bool = True,
    ) -> None:
        zone = bytes([_PATTERN]) * RED_ZONE
        if zones and any(
            self.process.memory[start : start + RED_ZONE] != zone for start in arena.zones
        ):
            raise TamperedError("it wrote beside its outputs")
        for region, x in zip(inputs, own, strict=True):
            now = region.view(self.process.memory)
            if not torch.equal(_bits(now), _bits(x)):
                raise TamperedError("it changed its inputs")


def _messages(places: Sequence[Region]) -> list[Message]:
    return [region.as_message() for region in places]


def _wide(call: Call) -> str:
    """The type that a model computes in."""
    if call.wide:
        return "float64"
    floating = [x.dtype for x in call.inputs if x.is_floating_point()]
    return dtype_name(floating[0]) if floating else "float32"


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)
