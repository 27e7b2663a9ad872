"""Launches of the kernels of additive rules."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from foveal.engines.state.additive import (
    state_additive_forward,
    state_additive_keys_backward,
    state_additive_queries_backward,
    state_additive_walk_backward,
    state_weight_backward,
)
from foveal.engines.state.launch import Pairs, walked_task
from foveal.engines.state.task import Gradients, Task, padded, run_kernel


class Division(NamedTuple):
    """What o is divided by, as the kernels see it: p_floor [T, Hv] or a number."""

    each: Tensor | None
    floor: float
    signed: bool


class Walked(NamedTuple):
    """o, its weight [T, Hv], the state after every piece, and the final states."""

    o: Tensor
    weight: Tensor | None
    after: Tensor
    final: Tensor


def launch_additive(
    job: Task, pairs: Pairs | None, initial: Tensor | None, divisor: Division | None
) -> Walked:
    table = job.tables()
    dk, dv = job.dims
    wide = dv + (divisor is not None)
    v_tile = min(padded(dv), job.tuning.v_tile)
    v_tiles = triton.cdiv(dv, v_tile)
    o = job.scratch(*job.v.shape)
    weight = None if divisor is None else job.scratch(*job.v.shape[:2], dtype=torch.float32)
    after = job.scratch(len(table.pieces), job.heads, dk, wide, dtype=torch.float32)
    final = job.scratch(len(job.lengths), job.heads, dk, wide, dtype=torch.float32)
    count = len(table.pieces) * job.heads * v_tiles
    ready = torch.zeros(1 + count, dtype=torch.int32, device=o.device)
    each, floor, signed = divisor or (None, 0.0, False)
    inside = None if pairs is None else pairs.pairs
    walked = job if pairs is None else walked_task(job, pairs)
    run_kernel(state_additive_forward, (count,),
        walked.q, walked.k, job.v, job.sums, job.gate, inside, each, initial, after, o, weight, final,
        ready, table.pieces, *walked.strides("q", "k", "v"), job.heads, walked.groups, job.scale,
        floor,
        ONES=divisor is not None, SIGNED=signed, WIDE=wide, ROWS=padded(dk), V_TILE=v_tile,
        **job.constants(), **job.tuning.additive,
    )  # fmt: skip
    return Walked(o, weight, after, final)


def launch_weight(
    o: Tensor, do: Tensor, weight: Tensor, divisor: Division
) -> tuple[Tensor, Tensor]:
    """do over what o was divided by, and the gradient of the weight."""
    tokens, heads, dv = o.shape
    scaled, dweight = torch.empty_like(o), torch.empty_like(weight)
    do = do if do.stride(-1) == 1 else do.contiguous()
    tile = 32
    run_kernel(state_weight_backward, (heads * triton.cdiv(tokens, tile),),
        o, do, weight, divisor.each, scaled, dweight, *o.stride()[:2], *do.stride()[:2], tokens, heads,
        divisor.floor, SIGNED=divisor.signed, DV=dv, WIDTH=padded(dv), TILE=tile, num_warps=4,
    )  # fmt: skip
    return scaled, dweight


def launch_additive_gradients(
    job: Task,
    initial: Tensor | None,
    after: Tensor,
    do: Tensor,
    dweight: Tensor | None,
    dfinal: Tensor,
    wanted: tuple[bool, ...],
) -> Gradients:
    """All gradients of an additive rule; `wanted`: of log_decay, of the write gate, of the initial state."""
    table = job.tables()
    tokens, heads, (dk, dv) = len(job.q), job.heads, job.dims
    ones = dweight is not None
    wide = dv + ones
    v_tile = min(padded(dv), job.tuning.gradient_tile)
    v_tiles = triton.cdiv(dv, v_tile)
    count = len(table.pieces) * heads * v_tiles
    dq = job.scratch(v_tiles, tokens, heads, dk)
    dk_found = torch.empty_like(dq)
    dv_found = job.scratch(tokens, heads, dv)
    terms = states = ddecay = dgate = dinitial = None
    if wanted[0]:
        terms = job.scratch(v_tiles, tokens, heads, dtype=torch.float32)
        ddecay = torch.empty_like(terms)
        states = job.scratch(job.chunk_count, heads, dk, wide)
    if wanted[1]:
        dgate = job.scratch(v_tiles, tokens, heads, dtype=torch.float32)
    if wanted[2]:
        dinitial = job.scratch(len(job.lengths), heads, dk, wide, dtype=torch.float32)
    shared = {"ONES": ones, "WIDE": wide, "ROWS": padded(dk), "V_TILE": v_tile, **job.constants()}
    strides = job.strides("q", "k", "v")
    run_kernel(state_additive_queries_backward, (count,),
        job.q, job.k, job.v, job.sums, job.gate, do, dweight, initial, after, dq, terms, states,
        table.pieces, *strides, tokens, heads, job.groups, job.scale, **shared, **job.tuning.queries,
    )  # fmt: skip
    before, dstates = torch.empty_like(after), job.scratch(job.chunk_count, heads, dk, wide)
    walk_tile = min(padded(dv), job.tuning.v_tile)
    walkers = len(table.pieces) * heads * triton.cdiv(dv, walk_tile)
    ready = torch.zeros(1 + walkers, dtype=torch.int32, device=do.device)
    run_kernel(
        state_additive_walk_backward, (walkers,),
        job.q, job.sums, do, dweight, dfinal, before, dstates, dinitial, ready, table.pieces,
        *job.strides("q"), len(table.pieces), heads, job.groups, job.scale,
        **(shared | {"V_TILE": walk_tile}), **job.tuning.additive,
    )  # fmt: skip
    run_kernel(
        state_additive_keys_backward, (job.chunk_count * heads * v_tiles,),
        job.q, job.k, job.v, job.sums, job.gate, do, dweight, terms, states, dstates, dk_found,
        dv_found, dgate, ddecay, table.chunks, *strides, tokens, heads, job.groups, job.scale,
        **shared, **job.tuning.keys,
    )  # fmt: skip
    dq, dk_found = (_of_tiles(x, job.q.dtype) for x in (dq, dk_found))
    dgate = None if dgate is None else _of_tiles(dgate, torch.float32)
    return Gradients(dq, dk_found, dv_found, ddecay, dgate, dinitial)


def _of_tiles(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over tiles of value channels."""
    return x[0] if len(x) == 1 else x.sum(0, dtype=torch.float32).to(dtype)
