# mypy: ignore-errors
"""What every kernel of the Hopper backward reads of a row: lse in base 2, and delta = sum(do o) - dlse."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.engines.tile.replay import launch


@triton.jit
def tile_attend_backward_prepare(
    p_o, p_do, p_lse, p_dlse, p_lse2, p_delta, p_sums, length, heads, last, pitch, plane,
    do_n, do_l, do_h, dlse_n, dlse_h, dlse_l,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse2 = lse / ln 2, +inf for rows that see nothing, and delta, fp32 [N, Hq, plane]; clears p_sums.

    The last axis of the grid, `last` tokens long, takes `pitch` elements, so that boxes can be copied.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    column = tl.arange(0, HEAD_PAD)
    inside = (row < length)[:, None] & (column < HEAD_DIM)[None, :]
    token = row.to(tl.int64)[:, None]
    p_rows = p_o + ((n * length + token) * heads + head) * HEAD_DIM + column[None, :]
    o = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
    p_rows = p_do + n * do_n + token * do_l + head * do_h + column[None, :]
    do = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
    if p_sums is not None:
        at = (tl.program_id(1).to(tl.int64) * length + token) * HEAD_DIM + column[None, :]
        tl.store(p_sums + at, tl.zeros([ROWS, HEAD_PAD], tl.float32), mask=inside)
    own = row < length
    p_own = p_dlse + n * dlse_n + head * dlse_h + row.to(tl.int64) * dlse_l
    delta = tl.sum(o * do, 1) - tl.load(p_own, mask=own, other=0.0)
    lse = tl.load(p_lse + tl.program_id(1).to(tl.int64) * length + row, mask=own, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    at = tl.program_id(1).to(tl.int64) * plane + row // last * pitch + row % last
    tl.store(p_lse2 + at, lse2, mask=own)
    tl.store(p_delta + at, delta, mask=own)


def launch_prepare(
    o: Tensor,
    do: Tensor,
    lse: Tensor,
    dlse: Tensor,
    sums: Tensor | None,
    grid: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """lse2 and delta [N, Hq, *grid], the last axis padded to whole groups of four; clears sums."""
    batch, length, heads, head_dim = o.shape
    pitch = -(-grid[-1] // 4) * 4
    shape = (batch, heads, *grid[:-1], pitch)
    lse2, delta = (torch.empty(shape, dtype=torch.float32, device=o.device) for _ in range(2))
    rows = 64
    launch(
        tile_attend_backward_prepare, (triton.cdiv(length, rows), batch * heads),
        o, do, lse, dlse, lse2, delta, sums, length, heads, grid[-1], pitch, lse2[0, 0].numel(),
        *do.stride()[:3], *dlse.stride(),
        HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), ROWS=rows,
        enable_fp_fusion=True,
    )  # fmt: skip
    return lse2, delta
