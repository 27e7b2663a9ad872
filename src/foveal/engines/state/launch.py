"""Launches of the state engine's kernels: tables of chunks and walks, scratch memory, tile sizes."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from foveal.engines.state.chunk_backward import (
    state_keys_backward,
    state_values_backward,
    state_walk_backward,
)
from foveal.engines.state.chunk_forward import (
    state_join_forward,
    state_output_forward,
    state_pairs_forward,
    state_sums_forward,
    state_walk_forward,
)
from foveal.engines.state.step import state_step_forward
from foveal.rules.base import Recurrence
from foveal.tuning.state import CHUNK, LEVELS, STEP_TILE, Tuning, tuning


class Tables(NamedTuple):
    """int32 tables on the device: chunks (first token, past the last), walks (first chunk, past the
    last, first token, past the last), and pieces [N + 1]: which walks are of which sequence."""

    chunks: Tensor
    walks: Tensor
    pieces: Tensor


@functools.lru_cache(maxsize=64)
def tables(lengths: tuple[int, ...], pieces: int, device: torch.device) -> Tables:
    """Tables of sequences of these lengths, each walked in up to `pieces` pieces."""
    chunks: list[tuple[int, int]] = []
    walks: list[tuple[int, int, int, int]] = []
    firsts = [0]
    start = 0
    for length in lengths:
        stop, count = start + length, -(-length // CHUNK)
        begin, each = len(chunks), max(-(-count // pieces), 1)
        places = range(start, stop, CHUNK)
        chunks.extend((place, min(place + CHUNK, stop)) for place in places)
        for own in range(0, max(count, 1), each):
            last = min(own + each, count)
            edges = start + own * CHUNK, min(start + last * CHUNK, stop)
            walks.append((begin + own, begin + last, *edges))
        firsts.append(len(walks))
        start = stop
    rows = (chunks or [(0, 0)], walks or [(0, 0, 0, 0)], firsts)
    return Tables(*(torch.tensor(x, dtype=torch.int32).to(device) for x in rows))


@dataclass(frozen=True)
class Task:
    """A recurrence on a device, as its kernels see it; `sums` as `p_sums` in `tiles`."""

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor | None
    gate: Tensor | None
    decay: int
    scale: float
    delta: bool
    lengths: tuple[int, ...]
    tuning: Tuning

    @property
    def heads(self) -> int:
        return int(self.v.shape[1])

    @property
    def groups(self) -> int:
        return self.heads // int(self.q.shape[1])

    @property
    def dims(self) -> tuple[int, int]:
        return int(self.k.shape[-1]), int(self.v.shape[-1])

    @property
    def chunk_count(self) -> int:
        return sum(-(-length // CHUNK) for length in self.lengths)

    def tables(self, pieces: int = 1) -> Tables:
        return tables(self.lengths, pieces, self.q.device)

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def constants(self) -> dict[str, Any]:
        """Compile-time constants that all kernels share."""
        dk, dv = self.dims
        precision = "ieee" if self.q.dtype == torch.float32 else "tf32"
        return {"DECAY": self.decay, "CHUNK": CHUNK, "DK": dk, "DV": dv, "PRECISION": precision}

    def strides(self, *names: str) -> tuple[int, ...]:
        return tuple(s for name in names for s in getattr(self, name).stride()[:2])


def padded(width: int) -> int:
    """The width of a tile that holds `width` channels."""
    return max(1 << max(width - 1, 0).bit_length(), 16)


def task(linear: Recurrence) -> Task:
    """The recurrence with its gates in float32 and their running sums."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (linear.q, linear.k, linear.v))
    gate = None if linear.write_gate is None else linear.write_gate.float().contiguous()
    decay = 0 if linear.log_decay is None else linear.log_decay.dim()
    found = tuning(q, v, linear.delta, decay)
    job = Task(q, k, v, None, gate, decay, linear.scale, linear.delta, linear.lengths, found)
    return dataclasses.replace(job, sums=_sums(job, linear.log_decay))


def _sums(plain: Task, log_decay: Tensor | None) -> Tensor | None:
    if log_decay is None:
        return None
    dtype = torch.float64 if plain.q.dtype == torch.float32 else torch.float32
    if plain.decay == 1:
        return (log_decay.to(dtype) * math.log2(math.e)).contiguous()
    log_decay = log_decay.contiguous()
    sums = torch.empty_like(log_decay, dtype=dtype)
    width = log_decay[0].numel() if len(log_decay) else 0
    if plain.chunk_count:
        tile = min(padded(width), 128)
        programs = (plain.chunk_count, triton.cdiv(width, tile))
        state_sums_forward[programs](
            log_decay, sums, plain.tables().chunks, width, CHUNK=CHUNK, TILE=tile, num_warps=4
        )
    return sums


class Pairs(NamedTuple):
    """What `state_pairs_forward` finds: P; for the delta rule a, M, w and u; with decay 3 q and k with
    their decays; else None."""

    pairs: Tensor
    keys: Tensor | None
    inverse: Tensor | None
    w: Tensor | None
    u: Tensor | None
    q: Tensor | None
    k: Tensor | None


def launch_pairs(job: Task, keep_inverse: bool) -> Pairs:
    tokens, heads, (dk, dv) = len(job.q), job.heads, job.dims
    pairs = job.scratch(tokens, heads, CHUNK)
    keys = inverse = w = u = since = until = None
    if job.decay == 3:
        since, until = job.scratch(tokens, heads, dk), job.scratch(tokens, heads, dk)
    if job.delta:
        w, u = job.scratch(tokens, heads, dk), job.scratch(tokens, heads, dv)
        if keep_inverse:
            keys, inverse = torch.empty_like(pairs), torch.empty_like(pairs)
    k_tile, v_tile = min(padded(dk), job.tuning.pairs_k_tile), min(padded(dv), 128)
    exact = job.q.dtype == torch.float32
    state_pairs_forward[(job.chunk_count * heads,)](
        job.q, job.k, job.v, job.sums, job.gate, pairs, keys, inverse, w, u, since, until,
        job.tables().chunks,
        *job.strides("q", "k", "v"), heads, job.groups, job.scale,
        DELTA=job.delta, LEVELS=LEVELS, K_TILE=k_tile, V_TILE=v_tile,
        K_TILES=triton.cdiv(dk, k_tile), V_TILES=triton.cdiv(dv, v_tile),
        INVERSE="ieee" if exact else "tf32", **job.constants(), **job.tuning.pairs,
    )  # fmt: skip
    return Pairs(pairs, keys, inverse, w, u, since, until)


def _walked(job: Task, inside: Pairs | None) -> Task:
    """The task with q and k as the walks read them."""
    if inside is None or inside.q is None or inside.k is None:
        return job
    return dataclasses.replace(job, q=inside.q, k=inside.k)


def launch_walk(
    job: Task,
    inside: Pairs | None,
    initial: Tensor | None,
    pieces: int,
    *,
    o: Tensor | None = None,
    states: Tensor | None = None,
    final: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Walks every piece from its row of `initial`; writes the tensors that are given."""
    table = job.tables(pieces)
    dk, dv = job.dims
    rows, v_tile = padded(dk), min(padded(dv), job.tuning.v_tile)
    job = _walked(job, inside)
    pairs, _, _, w, u, _, _ = (None,) * 7 if inside is None else inside
    state_walk_forward[(len(table.walks) * job.heads * triton.cdiv(dv, v_tile),)](
        job.q, job.k, job.v, job.sums, job.gate, pairs, w, u, initial, states, o,
        final, total, table.walks, *job.strides("q", "k", "v"), job.heads, job.groups, job.scale,
        DELTA=job.delta, ROWS=rows, V_TILE=v_tile, **job.constants(), **job.tuning.walk,
    )  # fmt: skip


def launch_join(
    job: Task, added: Tensor, total: Tensor, initial: Tensor | None, pieces: int
) -> Tensor:
    """The state before each piece."""
    table = job.tables(pieces)
    dk, dv = job.dims
    before = torch.empty_like(added)
    v_tile = min(padded(dv), 16)
    state_join_forward[(len(job.lengths) * job.heads * triton.cdiv(dv, v_tile),)](
        added, total, initial, before, table.pieces, job.heads,
        DK=dk, DV=dv, ROWS=padded(dk), V_TILE=v_tile, num_warps=4,
    )  # fmt: skip
    return before


def launch_output(job: Task, inside: Pairs, states: Tensor) -> Tensor:
    dk, dv = job.dims
    job = _walked(job, inside)
    o = job.scratch(*job.v.shape)
    v_tile = min(padded(dv), 128)
    state_output_forward[(job.chunk_count * job.heads * triton.cdiv(dv, v_tile),)](
        job.q, job.sums, inside.pairs, inside.u, states, o, job.tables().chunks,
        *job.strides("q"), job.heads, job.groups, job.scale,
        ROWS=padded(dk), V_TILE=v_tile, **job.constants(), **job.tuning.output,
    )  # fmt: skip
    return o


def launch_step(linear: Recurrence) -> tuple[Tensor, Tensor]:
    """o [N, Hv, Dv] and the final states of sequences of one token each."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (linear.q, linear.k, linear.v))
    count, heads, value_dim = v.shape
    head_dim = q.shape[-1]
    gates = (None if x is None else x.contiguous() for x in (linear.log_decay, linear.write_gate))
    initial = None if linear.initial is None else linear.initial.float().contiguous()
    final = v.new_empty(count, heads, head_dim, value_dim, dtype=torch.float32)
    o = v.new_empty(v.shape)
    v_tile = min(padded(value_dim), STEP_TILE)
    state_step_forward[(count * heads * triton.cdiv(value_dim, v_tile),)](
        q, k, v, *gates, initial, final, o, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        heads, heads // q.shape[1], linear.scale,
        DELTA=linear.delta, DECAY=0 if linear.log_decay is None else linear.log_decay.dim(),
        DK=head_dim, DV=value_dim, ROWS=padded(head_dim), V_TILE=v_tile, num_warps=4,
    )  # fmt: skip
    return o, final


class Gradients(NamedTuple):
    """dq and dk per value head, dv, dgate and ddecay in float32, dinitial; None where not wanted."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    ddecay: Tensor | None
    dgate: Tensor | None
    dinitial: Tensor | None


def launch_gradients(
    job: Task,
    inside: Pairs,
    states: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """All gradients; `wanted`: of log_decay, of the write gate, of the initial state."""
    tokens, heads, (dk, dv) = len(job.q), job.heads, job.dims
    table, constants = job.tables(), job.constants()
    dinitial = None
    if wanted[2]:
        dinitial = job.scratch(len(job.lengths), heads, dk, dv, dtype=torch.float32)
    dstates, dz = torch.empty_like(states), job.scratch(tokens, heads, dv)
    rows, v_tile = padded(dk), min(padded(dv), job.tuning.backward_v_tile)
    walked = _walked(job, inside)
    state_walk_backward[(len(job.lengths) * heads * triton.cdiv(dv, v_tile),)](
        walked.q, walked.k, job.sums, inside.pairs, inside.w, do, dfinal, dstates, dz, dinitial,
        table.walks, *walked.strides("q", "k"), heads, walked.groups, job.scale,
        DELTA=job.delta, ROWS=rows, V_TILE=v_tile, **constants, **job.tuning.walk_backward,
    )  # fmt: skip
    dv_found = job.scratch(tokens, heads, dv)
    dgate = job.scratch(tokens, heads, dtype=torch.float32) if wanted[1] else None
    dpairs = torch.empty_like(inside.pairs)
    dkeys = torch.empty_like(inside.pairs) if job.delta else None
    v_tile = min(padded(dv), job.tuning.gradient_v_tile)
    v_tiles = triton.cdiv(dv, v_tile)
    state_values_backward[(job.chunk_count * heads,)](
        job.k, job.v, job.sums, job.gate, inside.keys, inside.inverse, inside.u, dz, do, states,
        dv_found, dgate, dpairs, dkeys, table.chunks, *job.strides("k", "v"), heads, job.groups,
        job.scale,
        DELTA=job.delta, ROWS=rows, V_TILE=v_tile, V_TILES=v_tiles, **constants,
        **job.tuning.values_backward,
    )  # fmt: skip
    dq, dk_found = job.scratch(tokens, heads, dk), job.scratch(tokens, heads, dk)
    k_tile = min(padded(dk), job.tuning.gradient_k_tile)
    k_tiles = triton.cdiv(dk, k_tile)
    ddecay = None
    if wanted[0]:
        shape = (tokens, heads, dk) if job.decay == 3 else (k_tiles, tokens, heads)
        ddecay = job.scratch(*shape, dtype=torch.float32)
    state_keys_backward[(job.chunk_count * heads * k_tiles,)](
        job.q, job.k, job.v, job.sums, job.gate, inside.u, dv_found, do, states, dstates, dpairs,
        dkeys, dq, dk_found, ddecay, table.chunks, *job.strides("q", "k", "v"), tokens, heads,
        job.groups, job.scale,
        DELTA=job.delta, LEVELS=LEVELS, K_TILE=k_tile, V_TILE=v_tile, V_TILES=v_tiles,
        **constants, **job.tuning.keys_backward,
    )  # fmt: skip
    return Gradients(dq, dk_found, dv_found, ddecay, dgate, dinitial)
