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
)
from foveal.engines.state.launch import walked_task
from foveal.engines.state.normaliser import (
    state_column_added,
    state_column_walk,
    state_weight_backward,
    state_weight_forward,
)
from foveal.engines.state.task import Gradients, Pairs, Task, padded, run_kernel
from foveal.tuning.state import CHUNK


class Division(NamedTuple):
    """What o is divided by, as the kernels see it: p_floor [T, Hv] or a number."""

    each: Tensor | None
    floor: float
    signed: bool


class Weight(NamedTuple):
    """w [T, Hv] and the normaliser before every chunk [chunks, Hv, Dk]; with a gradient, those of both."""

    weight: Tensor
    normaliser: Tensor


class Walked(NamedTuple):
    """o, its weight, the state after every piece, and the final states."""

    o: Tensor
    weight: Weight | None
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
    after = job.scratch(len(table.pieces), job.heads, dk, dv, dtype=torch.float32)
    final = job.scratch(len(job.lengths), job.heads, dk, wide, dtype=torch.float32)
    if job.bulk:
        from foveal.engines.state.bulk import launch_bulk

        launch_bulk(job, initial, o, after, final, table.pieces)
        return Walked(o, None, after, final)
    count = len(table.pieces) * job.heads * v_tiles
    ready = torch.zeros(1 + count, dtype=torch.int32, device=o.device)
    each, floor, signed = divisor or (None, 0.0, False)
    weight = None if divisor is None else launch_weight(job, initial, final)
    inside = None if pairs is None else pairs.pairs
    walked = job if pairs is None else walked_task(job, pairs)
    run_kernel(state_additive_forward, (count,),
        walked.q, walked.k, job.v, job.sums, job.gate, inside, weight and weight.weight, each, initial,
        after, o, final, ready, table.pieces, *walked.strides("q", "k", "v"), job.heads, walked.groups,
        job.scale, floor,
        SIGNED=signed, WIDE=wide, ROWS=padded(dk), V_TILE=v_tile, **job.constants(),
        **job.tuning.additive,
    )  # fmt: skip
    return Walked(o, weight, after, final)


def launch_weight(job: Task, initial: Tensor | None, final: Tensor) -> Weight:
    """The weight of every token; fills the last column of `final`."""
    normaliser = _walk_column(job, job.k, job.gate, initial, final, backward=False)
    dk = job.dims[0]
    weight = job.scratch(*job.v.shape[:2], dtype=torch.float32)
    constants = {name: x for name, x in job.constants().items() if name != "DV"}
    run_kernel(state_weight_forward, (job.chunk_count * job.heads,),
        job.q, job.k, job.sums, job.gate, normaliser, weight, job.tables().chunks,
        *job.strides("q", "k"), job.heads, job.groups, job.scale,
        ROWS=padded(dk), **constants, num_warps=4,
    )  # fmt: skip
    return Weight(weight, normaliser)


def _walk_column(
    job: Task, x: Tensor, gate: Tensor | None, first: Tensor | None, last: Tensor | None,
    backward: bool,
) -> Tensor:  # fmt: skip
    """The normaliser before, or its gradient behind, every chunk [chunks, Hv, Dk]."""
    table, (dk, dv) = job.tables(), job.dims
    added = job.scratch(job.chunk_count, job.heads, dk, dtype=torch.float32)
    found = added.new_empty(added.shape)
    shared = {"BACKWARD": backward, "DECAY": job.decay, "DK": dk, "ROWS": padded(dk)}
    run_kernel(state_column_added, (job.chunk_count * job.heads,),
        x, gate, job.sums, added, table.chunks, *x.stride()[:2], job.heads, job.groups, job.scale,
        CHUNK=CHUNK, **shared, num_warps=4,
    )  # fmt: skip
    run_kernel(state_column_walk, (len(job.lengths) * job.heads,),
        added, job.sums, first, found, last, table.sequences, table.chunks, job.heads,
        WIDE=dv + 1, BLOCK=16, **shared, num_warps=4, num_stages=2,
    )  # fmt: skip
    return found


def launch_division(
    o: Tensor, do: Tensor, weight: Tensor, divisor: Division
) -> tuple[Tensor, Tensor]:
    """do over what o was divided by, and the gradient of the weight."""
    tokens, heads, dv = o.shape
    scaled, dweight = o.new_empty(o.shape), weight.new_empty(weight.shape)
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
    normaliser: Tensor | None,
    dweight: Tensor | None,
    dfinal: Tensor,
    wanted: tuple[bool, ...],
) -> Gradients:
    """All gradients of an additive rule; `wanted`: of log_decay, of the write gate, of the initial state."""
    table = job.tables()
    tokens, heads, (dk, dv) = len(job.q), job.heads, job.dims
    wide = dv + (dweight is not None)
    v_tile = min(padded(dv), job.tuning.gradient_tile)
    v_tiles = triton.cdiv(dv, v_tile)
    count = len(table.pieces) * heads * v_tiles
    dq = job.scratch(v_tiles, tokens, heads, dk)
    dk_found = dq.new_empty(dq.shape)
    dv_found = job.scratch(tokens, heads, dv)
    terms = states = ddecay = dgate = dinitial = None
    if wanted[0]:
        terms = job.scratch(v_tiles, tokens, heads, dtype=torch.float32)
        ddecay = terms.new_empty(terms.shape)
        states = job.scratch(job.chunk_count, heads, dk, dv)
    if wanted[1]:
        dgate = job.scratch(v_tiles, tokens, heads, dtype=torch.float32)
    if wanted[2]:
        dinitial = job.scratch(len(job.lengths), heads, dk, wide, dtype=torch.float32)
    shared = {"ROWS": padded(dk), "V_TILE": v_tile, **job.constants()}
    dnormaliser = None
    if dweight is not None:
        dnormaliser = _walk_column(job, job.q, dweight, dfinal, dinitial, backward=True)
    strides = job.strides("q", "k", "v")
    run_kernel(state_additive_queries_backward, (count,),
        job.q, job.k, job.v, job.sums, job.gate, do, dweight, normaliser, initial, after, dq, terms,
        states, table.pieces, *strides, tokens, heads, job.groups, job.scale,
        WIDE=wide, **shared, **job.tuning.queries,
    )  # fmt: skip
    before, dstates = after.new_empty(after.shape), job.scratch(job.chunk_count, heads, dk, dv)
    walk_tile = min(padded(dv), job.tuning.v_tile)
    walkers = len(table.pieces) * heads * triton.cdiv(dv, walk_tile)
    ready = torch.zeros(1 + walkers, dtype=torch.int32, device=do.device)
    run_kernel(
        state_additive_walk_backward, (walkers,),
        job.q, job.sums, do, dfinal, before, dstates, dinitial, ready, table.pieces,
        *job.strides("q"), len(table.pieces), heads, job.groups, job.scale,
        WIDE=wide, **(shared | {"V_TILE": walk_tile}), **job.tuning.additive,
    )  # fmt: skip
    run_kernel(
        state_additive_keys_backward, (job.chunk_count * heads * v_tiles,),
        job.q, job.k, job.v, job.sums, job.gate, do, dweight, normaliser, dnormaliser, terms, states,
        dstates, dk_found, dv_found, dgate, ddecay, table.chunks, *strides, tokens, heads, job.groups,
        job.scale, **shared, **job.tuning.keys,
    )  # fmt: skip
    dq, dk_found = (_of_tiles(x, job.q.dtype) for x in (dq, dk_found))
    dgate = None if dgate is None else _of_tiles(dgate, torch.float32)
    return Gradients(dq, dk_found, dv_found, ddecay, dgate, dinitial)


def _of_tiles(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over tiles of value channels."""
    return x[0] if len(x) == 1 else x.sum(0, dtype=torch.float32).to(dtype)
