# mypy: ignore-errors
"""Where NaN or inf in keys or values spread to rows that do not see them: those rows once more.

The forward multiplies hidden pairs by 0, and 0 x NaN is NaN.  It marks the rows that hold one though
their scores are sound, and flags their boxes; this kernel leaves the others at once.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from foveal.engines.tile.hopper_launch import head_pad
from foveal.engines.tile.hopper_lists import HEADER, bit_rows, list_of
from foveal.engines.tile.hopper_plan import Walk
from foveal.engines.tile.hopper_scores import (
    add_terms,
    box_columns,
    key_terms,
    query_terms,
    row_places,
    scored,
)
from foveal.engines.tile.hopper_walk import following, place, reach, row_bounds
from foveal.engines.tile.replay import launch


@gluon.jit
def row_pointers(p, n, x, y, z, head, strides, AXES: gl.constexpr):
    """Rows of a tensor [N, *grid, H, D]; with three axes p is one batch entry."""
    x = x.to(gl.int64)
    if AXES == 1:
        at = n.to(gl.int64) * strides[0] + x * strides[1] + head * strides[2]
    elif AXES == 2:
        at = n.to(gl.int64) * strides[0] + x * strides[1] + y * strides[2] + head * strides[3]
    else:
        at = x * strides[0] + y * strides[1] + z * strides[2] + head * strides[3]
    return p + at


@gluon.jit
def sees(x, y, z, low, width, AXES: gl.constexpr):
    """Whether each row sees the key at (x, y, z)."""
    seen = (x - low[0]).to(gl.uint32) < width[0].to(gl.uint32)
    if AXES > 1:
        seen &= (y - low[1]).to(gl.uint32) < width[1].to(gl.uint32)
    if AXES > 2:
        seen &= (z - low[2]).to(gl.uint32) < width[2].to(gl.uint32)
    return seen


@gluon.jit
def repair_box(
    t, part,
    p_q, p_k, p_v, p_o, q_strides, k_strides, v_strides, o_strides, p_lse, p_spoilt,
    p_bounds, lists, squash, terms, key_grid, X, Y, Z, heads, groups, shared, scale_log2,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, CAPPED: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """o of one box of rows of work item t."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, M, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    value_column = gl.arange(0, DV, gl.SliceLayout(0, LAYOUT))
    own = column < HEAD_DIM
    value_own = value_column < VALUE_DIM
    if len(lists) > 0:
        n, head, p_list = list_of(t, lists, heads, shared)
        tile = gl.load(p_list)
        x_first = tile * (W * R[0])
        y0 = 0
        z0 = 0
        tested = gl.load(p_list + 1)
        count = gl.load(p_list + 2)
        bx = 0
        by = 0
        bz = 0
        y1 = 0
        z1 = 0
    else:
        n, head, x_first, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, True)
        bx, nx = reach(p_bounds, 0, X, x_first, W * R[0], C[0], 1)
        by, ny = reach(p_bounds, 2 * X, Y, y0, R[1], C[1], 1)
        bz, nz = reach(p_bounds, 2 * X + 2 * Y, Z, z0, R[2], C[2], 1)
        y1 = by + ny * C[1]
        z1 = bz + nz * C[2]
        count = nx * ny * nz
    x0 = x_first + part * R[0]
    rx, ry, rz, inside = row_places(row, x0, y0, z0, X, Y, Z, R)
    token = (rx * Y + ry) * Z + rz
    at = (n.to(gl.int64) * heads + head) * (X * Y * Z) + token
    marks = gl.load(p_spoilt + at, mask=inside, other=0).to(gl.int32)
    if gl.max(marks, 0) > 0:
        lx, wx = row_bounds(p_bounds, 0, X, x0, row, R[1] * R[2], R[0])
        ly, wy = row_bounds(p_bounds, 2 * X, Y, y0, row, R[2], R[1])
        lz, wz = row_bounds(p_bounds, 2 * X + 2 * Y, Z, z0, row, 1, R[2])
        low = (lx, ly, lz)
        width = (wx, wy, wz)
        lse = gl.load(p_lse + at, mask=inside, other=0.0)
        minus_lse = gl.where(lse == float("-inf"), lse, lse * -1.4426950408889634)
        if len(terms) > 0:
            of_queries = query_terms(terms, n, head, token, inside)
        p_rows = row_pointers(p_q, n, rx, ry, rz, head, q_strides, AXES)[:, None]
        mask = inside[:, None] & own[None, :]
        q = gl.load(p_rows + column[None, :], mask=mask, other=0.0).to(gl.float32)
        acc = gl.zeros([M, DV], gl.float32, LAYOUT)
        x, y, z = bx, by, bz
        for j in range(count):
            if len(lists) > 0:
                x = gl.load(p_list + (HEADER + j)) * C[0]
            for c in range(C[0] * C[1] * C[2]):
                kx, ky, kz, held = box_columns(x, y, z, c, key_grid, C, AXES)
                if len(lists) > 6:
                    p_bits = bit_rows(lists, tile, part * M + row, x, C, W * M)
                    seen = ((gl.load(p_bits + c // 32) >> (c % 32)) & 1) != 0
                else:
                    seen = sees(kx, ky, kz, low, width, AXES)
                if len(lists) > 0:
                    seen |= j >= tested
                p_row = row_pointers(p_k, n, kx, ky, kz, head // groups, k_strides, AXES)
                k = gl.load(p_row + column, mask=own & held, other=0.0).to(gl.float32)
                p_row = row_pointers(p_v, n, kx, ky, kz, head // groups, v_strides, AXES)
                v = gl.load(p_row + value_column, mask=value_own & held, other=0.0)
                s = scored(gl.sum(q * k[None, :], 1), squash, CAPPED)
                if len(terms) > 0:
                    of_key = key_terms(terms, n, head, x, y, z, c, key_grid, C, AXES)
                    s = add_terms(s, of_queries, of_key, terms)
                p = gl.exp2(s * scale_log2 + minus_lse)
                more = acc + p[:, None] * v.to(gl.float32)[None, :]
                acc = gl.where(seen[:, None], more, acc)
            if len(lists) == 0:
                x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
        p_rows = row_pointers(p_o, n, rx, ry, rz, head, o_strides, AXES)[:, None]
        mask = inside[:, None] & value_own[None, :]
        gl.store(p_rows + value_column[None, :], acc.to(p_o.dtype.element_ty), mask=mask)


@gluon.jit
def tile_attend_repair(
    p_flags, boxes, p_q, p_k, p_v, p_o, q_strides, k_strides, v_strides, o_strides, p_lse, p_spoilt,
    p_bounds, lists, squash, terms, key_grid, X, Y, Z, heads, groups, shared, scale_log2,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, CAPPED: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    MANY: gl.constexpr,
):  # fmt: skip
    """o of the marked boxes of rows, key by key, so that a hidden key adds nothing.

    A program looks at MANY of the `boxes` flags.  Arguments as of tile_attend_forward; with three axes
    pointers are of one batch entry.
    """
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    first = gl.program_id(0) * MANY
    at = first + gl.arange(0, MANY, LINE)
    flags = gl.load(p_flags + at, mask=at < boxes, other=0).to(gl.int32)
    if gl.max(flags, 0) > 0:
        for i in range(first, gl.minimum(first + MANY, boxes)):
            if gl.load(p_flags + i) != 0:
                repair_box(
                    i // W, i % W,
                    p_q, p_k, p_v, p_o, q_strides, k_strides, v_strides, o_strides, p_lse, p_spoilt,
                    p_bounds, lists, squash, terms, key_grid, X, Y, Z, heads, groups, shared, scale_log2,
                    W, R, C, AXES, CAPPED, HEAD_DIM, VALUE_DIM, D, DV,
                )  # fmt: skip


def launch_repair(
    walk: Walk,
    axes: int,
    flags: Tensor,
    tensors: list[Tensor],
    lse: Tensor,
    spoilt: Tensor,
    given: tuple[Any, ...],
    capped: bool,
) -> None:
    """Writes the marked rows of o; tensors are q, k, v and o on their grids, `given` as the forward's."""
    bounds, listed, squash, terms, sizes, factor = given
    on_grid = [x[0] if axes == 3 else x for x in tensors]
    many = 512
    head_dim, value_dim = tensors[0].shape[-1], tensors[2].shape[-1]
    launch(
        tile_attend_repair,
        (triton.cdiv(len(flags), many),),
        flags,
        len(flags),
        *on_grid,
        *(x.stride()[:-1] for x in on_grid),
        lse,
        spoilt,
        bounds,
        listed,
        squash,
        terms,
        tuple(on_grid[1].shape[: axes + 1]),
        *sizes,
        factor,
        walk.consumers,
        walk.rows,
        walk.columns,
        axes,
        capped,
        head_dim,
        value_dim,
        head_pad(head_dim),
        head_pad(value_dim),
        many,
        num_warps=4,
        enable_fp_fusion=True,
    )
