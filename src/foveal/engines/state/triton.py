"""The GPU edition of the state engine, written in Triton: NVIDIA sm_80 and later, AMD gfx942."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from foveal.engines.state.problem import ScanProblem
from foveal.rules.base import Parts, Recurrence, Rule
from foveal.tuning.state import CHUNK, DELTA_TILE

_LARGEST_DIM = 256
_LEAST_CHUNKS = 4
"""Chunks that a piece of a sequence should have, so that joining the pieces stays cheap."""


def refuses(problem: ScanProblem, rule: Rule) -> str | None:
    if problem.device != "cuda" and not (problem.device == "cpu" and _interpreted()):
        return f"it runs on CUDA tensors; these are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if problem.dtype == torch.float64:
        return "GPU matrix units have no float64 edition here; use float32 or less"
    if problem.dtype == torch.bfloat16 and problem.device == "cpu":
        return "Triton's interpreter computes bfloat16 products wrongly"
    if problem.head_dim > _LARGEST_DIM:
        return f"its tiles hold a head_dim of at most {_LARGEST_DIM}; here is {problem.head_dim}"
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or later; this device has {capability}"
    return None


def caveat(problem: ScanProblem) -> str | None:
    """Why the plan passes by this edition although it runs when it is named."""
    if problem.device != "cuda":
        return None
    return "its results are not yet checked against float64 on a GPU; name it to run it"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def scan(
    problem: ScanProblem, rule: Rule, plain: Recurrence, initial: Parts | None
) -> tuple[Tensor, Parts]:
    """o [T, Hv, Dv] in the dtype of v and the final state."""
    linear, finish = rule.recurrence(plain, initial)
    if not problem.needs_grad and set(problem.lengths) == {1}:
        from foveal.engines.state.launch import launch_step

        o, state = finish(*launch_step(linear))
        return o.to(plain.v.dtype), state
    o, state = finish(*_run_pieces(linear, _pieces_of_delta(linear)))
    return o.to(plain.v.dtype), state


def _run(linear: Recurrence, with_o: bool = True) -> tuple[Tensor, Tensor]:
    """o, or an empty tensor in its place, and the final states."""
    rest = dataclasses.replace(linear, log_decay=None, write_gate=None, initial=None)
    rest = dataclasses.replace(rest, **dict.fromkeys(("q", "k", "v")))  # type: ignore[arg-type]
    o, memory = _StateScan.apply(  # type: ignore[no-untyped-call]
        linear.q,
        linear.k,
        linear.v,
        linear.log_decay,
        linear.write_gate,
        linear.initial,
        rest,
        with_o,
    )
    return o, memory


def _run_pieces(linear: Recurrence, pieces: int) -> tuple[Tensor, Tensor]:
    """Cuts every sequence in `pieces`, finds the affine map of each, then runs all from their states."""
    if pieces == 1:
        return _run(linear)
    count, length = len(linear.lengths), linear.lengths[0]
    size = _piece_size(length, pieces)
    lasting = tuple(min(size, length - start) for start in range(0, length, size))
    cut = dataclasses.replace(linear, lengths=lasting * count)
    dk, dv = linear.k.shape[-1], linear.v.shape[-1]
    heads = linear.v.shape[1]
    eye = torch.eye(dk, device=linear.v.device)
    start = F.pad(eye, (dv, 0)).expand(count * len(lasting), heads, dk, dv + dk)
    _, maps = _run(dataclasses.replace(cut, v=F.pad(linear.v, (0, dk)), initial=start), False)
    maps = maps.unflatten(0, (count, len(lasting)))
    added, transitions = maps.split([dv, dk], dim=-1)
    state = linear.initial
    if state is None:
        state = maps.new_zeros(count, heads, dk, dv)
    before = []
    for transition, addition in zip(transitions.unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = transition @ state + addition
    o, finals = _run(dataclasses.replace(cut, initial=torch.stack(before, 1).flatten(0, 1)))
    return o, finals.unflatten(0, (count, len(lasting)))[:, -1]


def _piece_size(length: int, pieces: int) -> int:
    """Tokens of a piece: whole chunks."""
    chunks = -(-length // CHUNK)
    return -(-chunks // pieces) * CHUNK


class _StateScan(torch.autograd.Function):
    """o [T, Hv, Dv] and the final state [N, Hv, Dk, Dv] of a recurrence."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        write_gate: Tensor | None,
        initial: Tensor | None,
        rest: Recurrence,
        with_o: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, log_decay, write_gate, initial)
        ctx.rest = rest
        ctx.with_o = with_o
        linear = _whole(rest, (q, k, v, log_decay, write_gate, initial))
        return _forward(linear, with_o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        linear = _whole(ctx.rest, ctx.saved_tensors)
        do = do if ctx.with_o else torch.zeros_like(linear.v)
        return (*_backward(linear, do, dfinal), None, None)


def _whole(rest: Recurrence, tensors: tuple[Any, ...]) -> Recurrence:
    names = ("q", "k", "v", "log_decay", "write_gate", "initial")
    return dataclasses.replace(rest, **dict(zip(names, tensors, strict=True)))


def _forward(linear: Recurrence, with_o: bool) -> tuple[Tensor, Tensor]:
    from foveal.engines.state.launch import launch_output, launch_pairs, launch_walk, task

    job = task(linear)
    shape = (len(job.lengths), job.heads, *job.dims)
    final = job.scratch(*shape, dtype=torch.float32)
    initial = None if linear.initial is None else linear.initial.float().contiguous()
    if not len(job.q):
        return torch.zeros_like(linear.v), final.zero_() if initial is None else initial.clone()
    if linear.delta:
        inside = launch_pairs(job, keep_inverse=False)
        o = job.scratch(0)
        states = job.scratch(job.chunk_count, *shape[1:]) if with_o else None
        launch_walk(job, inside, initial, 1, states=states, final=final)
        return o if states is None else launch_output(job, inside, states), final
    pairs = launch_pairs(job, keep_inverse=False) if job.decay == 3 else None
    o = job.scratch(*job.v.shape)
    pieces = _pieces(linear, job.tuning.v_tile)
    if pieces == 1:
        launch_walk(job, pairs, initial, 1, o=o, final=final)
        return o, final
    before = _before_pieces(job, pairs, initial, pieces)
    finals = torch.empty_like(before)
    launch_walk(job, pairs, before, pieces, o=o, final=finals)
    ends = job.tables(pieces).pieces[1:] - 1
    return o, finals.index_select(0, ends)


def _before_pieces(job: Any, pairs: Any, initial: Tensor | None, pieces: int) -> Tensor:
    """The state of an additive rule before each piece of a sequence."""
    from foveal.engines.state.launch import launch_join, launch_walk

    count = len(job.tables(pieces).walks)
    added = job.scratch(count, job.heads, *job.dims, dtype=torch.float32)
    total = torch.zeros(count, job.heads, job.dims[0], device=added.device)
    launch_walk(job, pairs, None, pieces, final=added, total=total if job.decay else None)
    return launch_join(job, added, total, initial, pieces)


def _pieces(linear: Recurrence, v_tile: int) -> int:
    """Pieces per sequence that an additive walk is cut in, so that programs fill the device."""
    programs = len(linear.lengths) * linear.v.shape[1] * -(-linear.v.shape[2] // v_tile)
    chunks = max(linear.lengths) // CHUNK
    return max(min(_wanted_programs(linear.v) // max(programs, 1), chunks // _LEAST_CHUNKS), 1)


def _pieces_of_delta(linear: Recurrence) -> int:
    """Pieces per sequence of the delta rule: their maps cost two more walks, so only few heads gain."""
    if not linear.delta or len(set(linear.lengths)) != 1:
        return 1
    tiles = -(-linear.v.shape[2] // DELTA_TILE)
    programs = len(linear.lengths) * linear.v.shape[1] * tiles
    pieces = min(_wanted_programs(linear.v) // (6 * programs), linear.lengths[0] // (16 * CHUNK))
    return max(pieces, 1)


def _wanted_programs(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 8
    return 4 * int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def _backward(linear: Recurrence, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    from foveal.engines.state.launch import launch_gradients, launch_pairs, launch_walk, task

    job = task(linear)
    if not len(job.q):
        dinitial = None if linear.initial is None else dfinal.to(linear.initial.dtype)
        inputs = (linear.q, linear.k, linear.v, linear.log_decay, linear.write_gate)
        return (*(None if x is None else torch.zeros_like(x) for x in inputs), dinitial)
    initial = None if linear.initial is None else linear.initial.float().contiguous()
    inside = launch_pairs(job, keep_inverse=True)
    states = job.scratch(job.chunk_count, job.heads, *job.dims)
    pieces = 1 if linear.delta else _pieces(linear, job.tuning.v_tile)
    if pieces > 1:
        initial = _before_pieces(job, inside, initial, pieces)
    launch_walk(job, inside, initial, pieces, states=states)
    wanted = (
        linear.log_decay is not None,
        linear.write_gate is not None,
        linear.initial is not None,
    )
    do = do.to(job.q.dtype).contiguous()
    found = launch_gradients(job, inside, states, do, dfinal.float().contiguous(), wanted)
    return (
        _of_groups(found.dq, linear.q),
        _of_groups(found.dk, linear.k),
        found.dv,
        _of_decay(found.ddecay, linear.log_decay),
        _as(found.dgate, linear.write_gate),
        _as(found.dinitial, linear.initial),
    )


def _of_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """The sum over the value heads that read with one head."""
    groups = gradient.shape[1] // x.shape[1]
    if groups == 1:
        return gradient
    summed: Tensor = gradient.unflatten(1, (-1, groups)).sum(2, dtype=torch.float32)
    return summed.to(x.dtype)


def _of_decay(gradient: Tensor | None, log_decay: Tensor | None) -> Tensor | None:
    if gradient is None or log_decay is None:
        return None
    if log_decay.dim() < 3:
        gradient = gradient.sum((0, 1) if log_decay.dim() == 1 else 0)
    return gradient.to(log_decay.dtype)


def _as(gradient: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if gradient is None or x is None else gradient.to(x.dtype)
