# mypy: ignore-errors
"""Rows of gradients that NaN or inf of pairs which they do not see have reached, once more.

The Hopper kernels multiply hidden pairs by 0, and 0 x NaN is NaN.  They mark the rows of dQ, dK and dV
that are not finite; this kernel takes those alone, and touches visible pairs only.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foveal.engines.tile.lists import WalkLists
from foveal.engines.tile.replay import launch

HEADER = tl.constexpr(WalkLists.HEADER)


@triton.jit
def _finite(x):
    return x - x == 0.0


@triton.jit
def _visit(
    own, others, strides, token, seen, statistics, bias, factors, sums,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Adds some tokens of the other side to the sums of one row.

    own: q and do of a query, or k and v of a key; others: pointers to the other two.
    statistics: lse2 and delta, of the row or at every token; bias: of the keys, in base 2.
    """
    column = tl.arange(0, HEAD_PAD)
    inside = seen[:, None] & (column < HEAD_DIM)[None, :]
    at = token.to(tl.int64)[:, None]
    a = tl.load(others[0] + at * strides[0] + column[None, :], mask=inside, other=0.0)
    b = tl.load(others[1] + at * strides[1] + column[None, :], mask=inside, other=0.0)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    s = tl.sum(own[0][None, :] * a, 1)
    dp = tl.sum(own[1][None, :] * b, 1)
    p = tl.exp2(s * factors[0] - (statistics[0] - bias))
    ds = p * (dp - statistics[1])
    first = sums[0] + tl.sum(tl.where(inside, ds[:, None] * a, 0.0), 0)
    second = sums[1]
    if BY_KEY:
        second += tl.sum(tl.where(inside, p[:, None] * b, 0.0), 0)
    return first, second


@triton.jit
def _row(
    r, line, own, others, p_lse2, p_delta, outs, p_bounds, lists, biases, grid, other_grid, fold,
    own_strides, other_strides, heads, divide, multiply, factors, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, WIDTH: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Writes one row; what the kernels found finite stays."""
    n = (line // heads).to(tl.int64)
    head = line % heads
    column = tl.arange(0, HEAD_PAD)
    within = column < HEAD_DIM
    at = n * own_strides[0][0] + r.to(tl.int64) * own_strides[0][1] + head * own_strides[0][2]
    first = tl.load(own[0] + at + column, mask=within, other=0.0).to(tl.float32)
    at = n * own_strides[1][0] + r.to(tl.int64) * own_strides[1][1] + head * own_strides[1][2]
    second = tl.load(own[1] + at + column, mask=within, other=0.0).to(tl.float32)
    length = grid[0] * grid[1] * grid[2]
    out = ((n * length + r) * heads + head) * HEAD_DIM + column
    kept = tl.load(outs[0] + out, mask=within, other=0.0).to(tl.float32)
    kept_second = tl.zeros([HEAD_PAD], tl.float32)
    if BY_KEY:
        kept_second = tl.load(outs[1] + out, mask=within, other=0.0).to(tl.float32)

    x, y, z = r // (grid[1] * grid[2]), r // grid[2] % grid[1], r % grid[2]
    p_y = p_bounds + 2 * grid[0]
    p_z = p_y + 2 * grid[1]
    lx, ux = tl.load(p_bounds + x), tl.load(p_bounds + grid[0] + x)
    l2, u2 = lx, lx
    if len(lists) > 6:
        l2, u2 = tl.load(lists[6] + x), tl.load(lists[6] + grid[0] + x)
    ly, uy = tl.load(p_y + y), tl.load(p_y + grid[1] + y)
    lz, uz = tl.load(p_z + z), tl.load(p_z + grid[2] + z)
    ny = uy - ly
    nz = uz - lz
    boxed = tl.maximum(ux - lx, 0) * tl.maximum(ny, 0) * tl.maximum(nz, 0)
    nz = tl.maximum(nz, 1)
    ny = tl.maximum(ny, 1)

    sums = tl.zeros([HEAD_PAD], tl.float32), tl.zeros([HEAD_PAD], tl.float32)
    for member in range(multiply):
        other = head // divide * multiply + member
        bases = (
            others[0] + n * other_strides[0][0] + other * other_strides[0][2],
            others[1] + n * other_strides[1][0] + other * other_strides[1][2],
        )
        strides = other_strides[0][1], other_strides[1][1]
        q_line = n * heads + head
        if BY_KEY:
            q_line = (n * heads + head) * multiply + member
        p_l = p_lse2 + q_line * fold[2]
        p_d = p_delta + q_line * fold[2]
        visits = tl.cdiv(boxed, WIDTH)
        tested = 0
        p_list = p_bounds
        if len(lists) > 0:
            q_head = other if BY_KEY else head
            shared = n * lists[5] + q_head // lists[3] * lists[4]
            p_list = lists[0] + shared * lists[2]
            while tl.load(p_list) != r // TILE:
                p_list += lists[2]
            tested = tl.load(p_list + 1)
            visits = tl.load(p_list + 2)
        j = 0
        open_columns = 1
        while (j < visits) & (open_columns > 0):
            if len(lists) > 0:
                token = tl.load(p_list + HEADER + j) * WIDTH + tl.arange(0, WIDTH)
                tokens = other_grid[0] * other_grid[1] * other_grid[2]
                lower, upper = tl.where(j < tested, lx, 0), tl.where(j < tested, ux, tokens)
                seen = (token >= lower) & (token < upper) | (token >= l2) & (token < u2)
            else:
                c = j * WIDTH + tl.arange(0, WIDTH)
                seen = c < boxed
                c = tl.where(seen, c, 0)
                token = (lx + c // (ny * nz)) * other_grid[1] + ly + c // nz % ny
                token = token * other_grid[2] + lz + c % nz
            query = tl.where(seen, token, 0) if BY_KEY else tl.where(seen, r, r)
            at_query = query // fold[0] * fold[1] + query % fold[0]
            statistics = tl.load(p_l + at_query), tl.load(p_d + at_query)
            bias = 0.0
            if len(biases) > 0:
                q_head = other if BY_KEY else head
                p_bias = biases[0] + n * biases[1] + q_head // biases[3] * biases[2]
                key = tl.where(seen, r, r) if BY_KEY else tl.where(seen, token, 0)
                bias = tl.load(p_bias + key).to(tl.float32) * 1.4426950408889634
            sums = _visit(
                (first, second), bases, strides, token, seen, statistics, bias, factors, sums,
                HEAD_DIM, HEAD_PAD, BY_KEY,
            )  # fmt: skip
            still = _finite(sums[0]) & (_finite(kept) == 0)
            if BY_KEY:
                still |= _finite(sums[1]) & (_finite(kept_second) == 0)
            open_columns = tl.sum(still.to(tl.int32), 0)
            j += 1
    value = tl.where(_finite(kept), kept, sums[0] * factors[1])
    tl.store(outs[0] + out, value.to(outs[0].dtype.element_ty), mask=within)
    if BY_KEY:
        value = tl.where(_finite(kept_second), kept_second, sums[1])
        tl.store(outs[1] + out, value.to(outs[1].dtype.element_ty), mask=within)


@triton.jit
def tile_attend_backward_repair(
    p_spoilt, own, others, p_lse2, p_delta, outs, p_bounds, lists, biases, grid, other_grid, fold,
    own_strides, other_strides, heads, divide, multiply, scale_log2, scale, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, WIDTH: tl.constexpr, BY_KEY: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """dQ, or dK and dV, of the rows that p_spoilt int8 [N, heads, rows] marks.

    own: q, do or k, v; others: k, v or q, do, all [N, tokens, heads, D] with strides (batch, token,
    head); outs: dq or dk, dv, contiguous.  A head h of the rows meets the heads
    h // divide * multiply + [0, multiply) of the others.  fold: length, pitch and plane of the grid that
    lse2 and delta stand on.  p_bounds as in hopper_walk, lists as in hopper_lists, for tiles of TILE
    rows and WIDTH of the others; biases as in hopper_backward_joint.
    """
    length = grid[0] * grid[1] * grid[2]
    line = tl.program_id(1)
    start = tl.program_id(0) * CHUNK
    row = start + tl.arange(0, CHUNK)
    p_own = p_spoilt + line.to(tl.int64) * length
    marks = tl.load(p_own + row, mask=row < length, other=0).to(tl.int32)
    if tl.sum(marks, 0) > 0:
        for i in range(tl.minimum(CHUNK, length - start)):
            r = start + i
            if tl.load(p_own + r) != 0:
                _row(
                    r, line, own, others, p_lse2, p_delta, outs, p_bounds, lists, biases, grid, other_grid,
                    fold, own_strides, other_strides, heads, divide, multiply, (scale_log2, scale), TILE,
                    HEAD_DIM, HEAD_PAD, WIDTH, BY_KEY,
                )  # fmt: skip


def launch_repair(
    marks: Tensor,
    own: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor],
    outs: tuple[Tensor, ...],
    bounds: Tensor,
    lengths: tuple[int, int, int],
    other_lengths: tuple[int, int, int],
    fold: tuple[int, int, int],
    scales: tuple[float, float],
    lists: tuple[Any, ...] = (),
    tile: int = 1,
    width: int = 32,
    biases: tuple[Any, ...] = (),
) -> None:
    """Writes the marked rows of outs, (dq,) or (dk, dv); arguments as of the kernel.

    lists as `list_arguments`, of tiles of `tile` rows and `width` others.
    """
    batch, rows, heads, head_dim = own[0].shape
    other_heads = others[0].shape[2]
    by_key = len(outs) == 2
    chunk = 256
    launch(
        tile_attend_backward_repair, (triton.cdiv(rows, chunk), batch * heads),
        marks, own, others, *statistics, (outs[0], outs[-1]), bounds, lists, biases,
        lengths, other_lengths, fold,
        *(tuple(x.stride()[:3] for x in side) for side in (own, others)),
        heads, 1 if by_key else heads // other_heads, other_heads // heads if by_key else 1, *scales,
        TILE=tile, HEAD_DIM=head_dim, HEAD_PAD=max(16, triton.next_power_of_2(head_dim)), WIDTH=width,
        BY_KEY=by_key, CHUNK=chunk, enable_fp_fusion=True,
    )  # fmt: skip
