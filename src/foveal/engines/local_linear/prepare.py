# mypy: ignore-errors
"""What comes before the passes of the Hopper edition."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import load_rows


@triton.jit
def local_linear_prepare(
    p_k, p_noise, p_marks, k_strides, tokens, heads, total, rounding,
    D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Clears both marks; noise: rounding squared times the mean square of ROWS of the `total` keys."""
    at = (tl.arange(0, ROWS).to(tl.int64) * total) // ROWS
    n = at // heads // tokens
    place = n * k_strides[0] + at // heads % tokens * k_strides[1] + at % heads * k_strides[2]
    k = load_rows(p_k + place, at < total, D, PAD, True).to(tl.float32)
    k = tl.where(k - k == 0.0, k, 0.0)
    square = tl.sum(tl.sum(k * k, 1), 0) / ROWS
    tl.store(p_noise, rounding * rounding * square)
    tl.store(p_marks + tl.arange(0, 2), tl.zeros([2], tl.int32))
