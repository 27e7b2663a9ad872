"""Launches of the kernels that go chunk by chunk: pairs, walks, outputs, gradients, and one step."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from foveal.engines.state.chunk_backward import (
    state_keys_backward,
    state_values_backward,
    state_walk_backward,
)
from foveal.engines.state.chunk_forward import (
    state_output_forward,
    state_pairs_forward,
    state_walk_forward,
)
from foveal.engines.state.launch_join import launch_join
from foveal.engines.state.step import state_step_forward
from foveal.engines.state.task import (
    Gradients,
    Pairs,
    Task,
    copies_in_bulk,
    inside_in_bulk,
    padded,
    run_kernel,
)
from foveal.rules.base import Recurrence
from foveal.tuning.state import CHUNK, LEFT_CHUNKS, LEVELS, STEP_TILE


def launch_pairs(job: Task, keep_inverse: bool) -> Pairs:
    tokens, heads, (dk, dv) = len(job.q), job.heads, job.dims
    pairs = job.scratch(tokens, heads, CHUNK)
    keys = inverse = w = u = since = until = None
    if job.decay == 3:
        since, until = job.scratch(tokens, heads, dk), job.scratch(tokens, heads, dk)
    if job.delta:
        w, u = job.scratch(tokens, heads, dk), job.scratch(tokens, heads, dv)
        if keep_inverse:
            keys, inverse = pairs.new_empty(pairs.shape), pairs.new_empty(pairs.shape)
    tuned = job.tuning
    k_tile, v_tile = min(padded(dk), tuned.pairs_k_tile), min(padded(dv), tuned.pairs_v_tile)
    exact = job.q.dtype == torch.float32
    found = Pairs(pairs, keys, inverse, w, u, since, until)
    left, count, each = None, job.chunk_count * heads, 1
    if job.log_decay is not None:
        from foveal.engines.state.bulk_channels import launch_channels_bulk

        left = launch_channels_bulk(job, found)
    elif not keep_inverse and inside_in_bulk(job):
        from foveal.engines.state.bulk_channels import launch_tokens_bulk

        left = launch_tokens_bulk(job, found)
    if left is not None:
        each = LEFT_CHUNKS
    run_kernel(state_pairs_forward, (triton.cdiv(count, each),),
        job.q, job.k, job.v, job.sums, job.gate, pairs, keys, inverse, w, u, since, until,
        job.tables().chunks, left,
        *job.strides("q", "k", "v"), heads, job.groups, job.scale, count,
        DELTA=job.delta, LEVELS=LEVELS, REACH=job.reach, K_TILE=k_tile, V_TILE=v_tile,
        K_TILES=triton.cdiv(dk, k_tile), V_TILES=triton.cdiv(dv, v_tile),
        INVERSE="ieee" if exact else "tf32", SHORT=not exact, EACH=each, **job.constants(),
        **job.tuning.pairs,
    )  # fmt: skip
    return found


def walked_task(job: Task, inside: Pairs | None) -> Task:
    """The task with q and k as the walks read them."""
    if inside is None or inside.q is None or inside.k is None:
        return job
    return dataclasses.replace(job, q=inside.q, k=inside.k)


class States(NamedTuple):
    """The state before every chunk, the final states, and the maps of the pieces of a split."""

    chunks: Tensor
    final: Tensor
    before: Tensor | None
    maps: Tensor | None


def launch_states(job: Task, inside: Pairs, initial: Tensor | None) -> States:
    """Walks every sequence, or first the maps of its pieces and then all pieces at once."""
    heads, (dk, dv) = job.heads, job.dims
    states = job.scratch(job.chunk_count, heads, dk, dv)
    count = len(job.tables().pieces)
    if count == len(job.lengths):
        final = job.scratch(count, heads, dk, dv, dtype=torch.float32)
        _launch_walk(job, inside, initial, states, final)
        return States(states, final, initial, None)
    maps = job.scratch(count, heads, dk, dv + dk, dtype=torch.float32)
    _launch_walk(job, inside, None, None, maps, maps=True)
    before, final = launch_join(job, maps, None, initial)
    _launch_walk(job, inside, before, states, None)
    return States(states, final, before, maps)


def launch_delta(job: Task, inside: Pairs, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """o and the final states: of a sequence in pieces without the states of its chunks in between."""
    dv = job.dims[1]
    split = len(job.tables().pieces) > len(job.lengths)
    tile = job.tuning.bulk_split_v_tile
    walked = walked_task(job, inside)
    if not (split and dv % tile == 0 and copies_in_bulk(walked)):
        states = launch_states(job, inside, initial)
        return launch_output(job, inside, states.chunks), states.final
    from foveal.engines.state.bulk_walk import launch_walk_bulk

    heads, dk = job.heads, job.dims[0]
    maps = job.scratch(len(job.tables().pieces), heads, dk, dv + dk, dtype=torch.float32)
    _launch_walk(job, inside, None, None, maps, maps=True)
    before, final = launch_join(job, maps, None, initial)
    o = job.scratch(*job.v.shape)
    launch_walk_bulk(walked, inside, before, None, None, job.tables().pieces, tile, False, o)
    return o, final


def _launch_walk(
    job: Task, inside: Pairs, before: Tensor | None, states: Tensor | None, final: Tensor | None,
    maps: bool = False,
) -> None:  # fmt: skip
    dk, dv = job.dims
    pieces = job.tables().pieces
    split = len(pieces) > len(job.lengths)
    v_tile = min(padded(dv), job.tuning.split_v_tile if split else job.tuning.v_tile)
    stages = job.tuning.split_walk if split else job.tuning.walk
    job = walked_task(job, inside)
    bulk_tile = job.tuning.bulk_split_v_tile if split else job.tuning.bulk_v_tile
    if job.delta and dv % bulk_tile == 0 and copies_in_bulk(job):
        from foveal.engines.state.bulk_walk import launch_walk_bulk

        launch_walk_bulk(job, inside, before, states, final, pieces, bulk_tile, maps)
        return
    columns = dv + dk if maps else dv
    run_kernel(state_walk_forward, (len(pieces) * job.heads * triton.cdiv(columns, v_tile),),
        job.k, job.v, job.sums, job.gate, inside.w, inside.u, before, states, final, pieces,
        *job.strides("k", "v"), job.heads, job.groups,
        DELTA=job.delta, MAPS=maps, ROWS=padded(dk), V_TILE=v_tile, **job.constants(), **stages,
    )  # fmt: skip


def launch_output(job: Task, inside: Pairs, states: Tensor) -> Tensor:
    dk, dv = job.dims
    job = walked_task(job, inside)
    o = job.scratch(*job.v.shape)
    v_tile = min(padded(dv), 128)
    run_kernel(state_output_forward, (job.chunk_count * job.heads * triton.cdiv(dv, v_tile),),
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
    run_kernel(state_step_forward, (count * heads * triton.cdiv(value_dim, v_tile),),
        q, k, v, *gates, initial, final, o, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        heads, heads // q.shape[1], linear.scale,
        DELTA=linear.delta, DECAY=0 if linear.log_decay is None else linear.log_decay.dim(),
        DK=head_dim, DV=value_dim, ROWS=padded(head_dim), V_TILE=v_tile, num_warps=4,
    )  # fmt: skip
    return o, final


def launch_gradients(
    job: Task,
    inside: Pairs,
    states: States,
    do: Tensor,
    dfinal: Tensor,
    wanted: tuple[bool, ...],
) -> Gradients:
    """All gradients; `wanted`: of log_decay, of the write gate, of the initial state."""
    tokens, heads, (dk, dv) = len(job.q), job.heads, job.dims
    table, constants = job.tables(), job.constants()
    dstates, dz = states.chunks.new_empty(states.chunks.shape), job.scratch(tokens, heads, dv)
    behind, dinitial = dfinal, None
    if states.maps is None:
        if wanted[2]:
            dinitial = dfinal.new_empty(dfinal.shape)
    else:
        added = job.scratch(len(table.pieces), heads, dk, dv, dtype=torch.float32)
        _launch_walk_backward(job, inside, do, None, None, None, added)
        behind, dinitial = launch_join(job, states.maps, added, dfinal)
    first = dinitial if states.maps is None else None
    _launch_walk_backward(job, inside, do, behind, dstates, dz, first)
    rows = padded(dk)
    dv_found = job.scratch(tokens, heads, dv)
    dgate = job.scratch(tokens, heads, dtype=torch.float32) if wanted[1] else None
    dpairs = inside.pairs.new_empty(inside.pairs.shape)
    dkeys = inside.pairs.new_empty(inside.pairs.shape) if job.delta else None
    v_tile = min(padded(dv), job.tuning.gradient_v_tile)
    v_tiles = triton.cdiv(dv, v_tile)
    run_kernel(state_values_backward, (job.chunk_count * heads,),
        job.k, job.v, job.sums, job.gate, inside.keys, inside.inverse, inside.u, dz, do, states.chunks,
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
    run_kernel(state_keys_backward, (job.chunk_count * heads * k_tiles,),
        job.q, job.k, job.v, job.sums, job.gate, inside.u, dv_found, do, states.chunks, dstates,
        dpairs,
        dkeys, dq, dk_found, ddecay, table.chunks, *job.strides("q", "k", "v"), tokens, heads,
        job.groups, job.scale,
        DELTA=job.delta, LEVELS=LEVELS, REACH=job.reach, K_TILE=k_tile, V_TILE=v_tile, V_TILES=v_tiles,
        **constants, **job.tuning.keys_backward,
    )  # fmt: skip
    return Gradients(dq, dk_found, dv_found, ddecay, dgate, dinitial)


def _launch_walk_backward(
    job: Task, inside: Pairs, do: Tensor, behind: Tensor | None, dstates: Tensor | None,
    dz: Tensor | None, dinitial: Tensor | None,
) -> None:  # fmt: skip
    dk, dv = job.dims
    v_tile = min(padded(dv), job.tuning.backward_v_tile)
    pieces = job.tables().pieces
    walked = walked_task(job, inside)
    run_kernel(state_walk_backward, (len(pieces) * job.heads * triton.cdiv(dv, v_tile),),
        walked.q, walked.k, job.sums, inside.pairs, inside.w, do, behind, dstates, dz, dinitial,
        pieces, *walked.strides("q", "k"), job.heads, walked.groups, job.scale,
        DELTA=job.delta, ROWS=padded(dk), V_TILE=v_tile, **job.constants(),
        **job.tuning.walk_backward,
    )  # fmt: skip
