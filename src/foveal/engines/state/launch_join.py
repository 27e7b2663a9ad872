"""Launches that join the maps S' = P S + R of the pieces of sequences to the states before them."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from foveal.engines.state.chunk_forward import state_join_forward
from foveal.engines.state.join import (
    state_apply_forward,
    state_compose_forward,
    state_groups_forward,
)
from foveal.engines.state.task import Task, padded, run_kernel

_LEAST_GROUPED = 9
"""Pieces of one sequence from which on they are joined in groups."""


def launch_join(
    job: Task, maps: Tensor, added: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state before each piece and the final states; with `added`, the gradients of the states
    behind each piece and of the initial ones."""
    dk, dv = job.dims
    if added is None and len(job.lengths) == 1 and len(maps) >= _LEAST_GROUPED:
        return _launch_grouped(job, maps, initial)
    found = job.scratch(*maps.shape[:2], dk, dv, dtype=torch.float32)
    last = job.scratch(len(job.lengths), job.heads, dk, dv, dtype=torch.float32)
    v_tile = min(padded(dv), 16)
    exact = job.q.dtype == torch.float32
    run_kernel(state_join_forward, (len(job.lengths) * job.heads * triton.cdiv(dv, v_tile),),
        maps, added, initial, found, last, job.tables().pieces, job.heads,
        BACKWARD=added is not None, DK=dk, DV=dv, ROWS=padded(dk), V_TILE=v_tile,
        PRECISION="ieee" if exact else "tf32", num_warps=8, num_stages=1,
    )  # fmt: skip
    return found, last


def _launch_grouped(job: Task, maps: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """`launch_join` of one sequence, in about 2 sqrt(pieces) steps one behind the other."""
    dk, dv = job.dims
    count, heads = maps.shape[:2]
    each = math.isqrt(count - 1) + 1
    groups = triton.cdiv(count, each)
    prefix = torch.empty_like(maps)
    starts = job.scratch(groups, heads, dk, dv, dtype=torch.float32)
    found = job.scratch(count, heads, dk, dv, dtype=torch.float32)
    last = job.scratch(1, heads, dk, dv, dtype=torch.float32)
    tile = min(padded(dv), 16)
    precision = "ieee" if job.q.dtype == torch.float32 else "tf32"
    sizes = {"DK": dk, "DV": dv, "ROWS": padded(dk), "TILE": tile, "PRECISION": precision}
    sizes |= {"num_warps": 8, "num_stages": 1}
    run_kernel(state_compose_forward, (groups * heads * triton.cdiv(dv + dk, tile),),
        maps, prefix, count, each, heads, **sizes)  # fmt: skip
    run_kernel(state_groups_forward, (heads * triton.cdiv(dv, tile),),
        prefix, initial, starts, last, count, each, heads, **sizes)  # fmt: skip
    run_kernel(state_apply_forward, (count * heads * triton.cdiv(dv, tile),),
        prefix, starts, found, each, heads, **sizes)  # fmt: skip
    return found, last
