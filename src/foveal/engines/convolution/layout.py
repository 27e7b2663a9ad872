"""Changes between channels last and channels first, tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "columns"])
def convolution_layout_forward(
    p_x, p_y, rows, columns, x_stride_b, x_stride_row, y_stride_b, y_stride_column,
    TILE: tl.constexpr,
):  # fmt: skip
    """y [b, column, row] = x [b, row, column], both contiguous along their last axis."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    b = tl.program_id(2).to(tl.int64)
    place = row.to(tl.int64)[:, None] * x_stride_row + column[None, :]
    there = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(p_x + b * x_stride_b + place, mask=there, other=0.0)
    place = column.to(tl.int64)[:, None] * y_stride_column + row[None, :]
    there = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(p_y + b * y_stride_b + place, tl.trans(x), mask=there)
