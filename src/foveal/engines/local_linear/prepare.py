# mypy: ignore-errors
"""What comes before the passes of the Hopper edition."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.early import gdc_launch_dependents
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


@triton.jit
def local_linear_spread(
    p_k, p_noise, p_marks, p_spread, k_strides, tokens, heads, total, rounding,
    D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """As `local_linear_prepare`; and per head the variance of the eigenvalues of a covariance of SOME keys.

    What a covariance of so few has of it by chance, mean^2 D / SOME, is taken off.
    """
    if EARLY:
        gdc_launch_dependents()
    head = tl.program_id(0)
    if head == 0:
        local_linear_prepare(
            p_k, p_noise, p_marks, k_strides, tokens, heads, total, rounding, D, PAD, ROWS
        )
    p_keys = p_k + (head // heads).to(tl.int64) * k_strides[0] + head % heads * k_strides[2]
    second = tl.zeros([PAD, PAD], tl.float32)
    mean = tl.zeros([PAD], tl.float32)
    # Not a loop: the loads of all are under way at once.
    for part in tl.static_range(SOME // ROWS):
        at = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64) * tokens // SOME
        k = load_rows(p_keys + at * k_strides[1], at < tokens, D, PAD, True)
        k = tl.where(k - k == 0.0, k, tl.zeros_like(k))
        second = tl.dot(tl.trans(k), k, second)
        mean += tl.sum(k.to(tl.float32), 0) / SOME
    second = second / SOME - mean[:, None] * mean[None, :]
    diagonal = tl.arange(0, PAD)[:, None] == tl.arange(0, PAD)[None, :]
    average = tl.sum(tl.sum(tl.where(diagonal, second, 0.0), 1), 0) / D
    chance = D / tl.minimum(tokens, SOME)
    spread = tl.sum(tl.sum(second * second, 1), 0) / D - average * average * (1.0 + chance)
    tl.store(p_spread + head, tl.maximum(spread, 0.0))
