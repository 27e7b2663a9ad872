# mypy: ignore-errors
"""Outputs over parts of the keys as one: o = sum of exp(lse_i - lse) o_i, lse = log sum of exp(lse_i).

The forward cuts the work items of its last round, so that each program takes as many boxes of keys.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from foveal.engines.tile.hopper_launch import head_pad
from foveal.engines.tile.hopper_plan import Walk
from foveal.engines.tile.hopper_walk import place
from foveal.engines.tile.replay import launch

FLOOR = gl.constexpr(-3.0e38)


@gluon.jit
def programs_of(item, rest, split):
    """The first and the last program that took boxes of one of the `rest` items that were cut."""
    boxes, sharing, _ = split
    first = gl.cdiv(sharing * (item * boxes + 1), rest * boxes) - 1
    last = (sharing * (item + 1) * boxes - 1) // (rest * boxes)
    return first, last


@gluon.jit
def slot_of(program, item, rest, split):
    """Where a program wrote its part of an item, as `part_slot` has it."""
    boxes, sharing, _ = split
    return 2 * program + (program * rest * boxes // sharing < item * boxes).to(gl.int32)


@gluon.jit
def tile_attend_merge(
    p_o, p_lse, parts, split, X, heads, shared, total,
    W: gl.constexpr, R: gl.constexpr, DIM: gl.constexpr, PAD: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """o [N, X, heads, DIM] and lse [N, heads, X]; other arguments as of tile_attend_forward."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    rest = total % split[1]
    item = gl.program_id(0)
    n, head, x0, _, _ = place(total - rest + item, X, 1, 1, heads, shared, W, R, True)
    row = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, PAD, gl.SliceLayout(0, LAYOUT))
    m = gl.full([ROWS], FLOOR, gl.float32, gl.SliceLayout(1, LAYOUT))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LAYOUT))
    o = gl.zeros([ROWS, PAD], gl.float32, LAYOUT)
    first, last = programs_of(item, rest, split)
    for program in range(first, last + 1):
        at = slot_of(program, item, rest, split) * (W * R[0]) + row
        lse = gl.load(parts[1] + at)
        part = gl.load(parts[0] + (at.to(gl.int64)[:, None] * PAD + column[None, :]))
        top = gl.maximum(m, lse)
        kept = gl.exp(m - top)
        share = gl.exp(lse - top)
        l = l * kept + share
        o = o * kept[:, None] + part * share[:, None]
        m = top
    o = o * gl.where(l == 0.0, 0.0, 1.0 / l)[:, None]
    x = x0 + row
    at = ((n.to(gl.int64) * X + x) * heads + head)[:, None] * DIM + column[None, :]
    gl.store(p_o + at, o.to(p_o.dtype.element_ty), mask=(x < X)[:, None] & (column < DIM)[None, :])
    lse = gl.where(l == 0.0, float("-inf"), m + gl.log(l))
    gl.store(p_lse + ((n.to(gl.int64) * heads + head) * X + x), lse, mask=x < X)


@gluon.jit
def tile_attend_backward_merge(
    p_dk, p_dv, parts, split, X, heads, shared, total,
    W: gl.constexpr, R: gl.constexpr, DIM: gl.constexpr, PAD: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """dk and dv [N, X, heads, DIM]; other arguments as of tile_attend_backward_joint."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    rest = total % split[1]
    item = gl.program_id(0)
    n, head, x0, _, _ = place(total - rest + item, X, 1, 1, heads, shared, W, R, False)
    row = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, PAD, gl.SliceLayout(0, LAYOUT))
    dk = gl.zeros([ROWS, PAD], gl.float32, LAYOUT)
    dv = gl.zeros([ROWS, PAD], gl.float32, LAYOUT)
    first, last = programs_of(item, rest, split)
    for program in range(first, last + 1):
        at = slot_of(program, item, rest, split) * (W * R[0]) + row
        at = at.to(gl.int64)[:, None] * PAD + column[None, :]
        dk += gl.load(parts[0] + at)
        dv += gl.load(parts[1] + at)
    x = x0 + row
    inside = (x < X)[:, None] & (column < DIM)[None, :]
    at = ((n.to(gl.int64) * X + x) * heads + head)[:, None] * DIM + column[None, :]
    gl.store(p_dk + at, dk.to(p_dk.dtype.element_ty), mask=inside)
    gl.store(p_dv + at, dv.to(p_dv.dtype.element_ty), mask=inside)


def launch_merge(
    kernel: Any,
    outs: tuple[Tensor, Tensor],
    parts: tuple[Tensor, ...],
    split: tuple[int, ...],
    walk: Walk,
    sizes: tuple[int, ...],
) -> None:
    """Writes the rows of the items that were cut.

    outs are o and lse, or dk and dv; sizes: tokens, heads, heads that are walked together, items.
    """
    tile, rows = walk.consumers * walk.rows[0], 16
    dim = outs[0].shape[-1]
    launch(
        kernel, (sizes[-1] % split[1], tile // rows), *outs, parts, split, *sizes,
        walk.consumers, walk.rows, dim, head_pad(dim), rows, num_warps=4,
    )  # fmt: skip
