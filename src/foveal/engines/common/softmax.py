"""Jit functions: the running softmax, in base 2, and products that keep hidden pairs out."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def running_softmax(s, unit, largest, total):
    """Weights of the scores s * unit [Q, K] and the state of every row after them.

    Returns p [Q, K], the factor on what was summed before, the largest score and the sum of weights.
    A row that saw nothing yet keeps -inf and 0.
    """
    found = tl.maximum(largest, tl.max(s, 1) * unit)
    base = tl.where(found == float("-inf"), 0.0, found)
    p = tl.exp2(s * unit - base[:, None])
    factor = tl.exp2(largest - base)
    return p, factor, found, total * factor + tl.sum(p, 1)


@triton.jit
def row_lse(largest, total):
    """Base-2 log-sum-exp of rows; -inf for a row that saw nothing."""
    return tl.where(
        total == 0.0, float("-inf"), largest + tl.log2(tl.where(total == 0.0, 1.0, total))
    )


@triton.jit
def any_not_finite(x):
    """1 where a matrix holds NaN or inf, else 0."""
    return tl.max(tl.max(tl.where(x - x == 0.0, 0, 1), 1), 0)


@triton.jit
def visible_product(weights, seen, values, total):
    """total + weights @ values in which a hidden pair adds nothing, even where its value is NaN or inf.

    Non-finite values are taken out of the product; a second product counts, per kind, how many of
    them each row sees: 2^-14 for inf, 2^-6 for -inf, 2^2 for NaN, exact in every dtype for tiles of at
    most 255 keys.
    """
    finite = values - values == 0.0
    total = tl.dot(
        weights.to(values.dtype),
        tl.where(finite, values, 0.0).to(values.dtype),
        total,
        input_precision="ieee",
    )
    kind = tl.where(values == values, tl.where(values > 0, 0.00006103515625, 0.015625), 4.0)
    found = tl.dot(
        seen.to(values.dtype),
        tl.where(finite, 0.0, kind).to(values.dtype),
        input_precision="ieee",
    )
    counts = (found * 16384.0).to(tl.int32)
    total += tl.where(counts % 256 > 0, float("inf"), 0.0)
    total += tl.where(counts // 256 % 256 > 0, float("-inf"), 0.0)
    return total + tl.where(counts >= 65536, float("nan"), 0.0)


@triton.jit
def contained_product(weights, seen, values, total):
    """total + weights @ values in which a hidden pair adds nothing, even where its value is NaN or inf.

    A row that sees such a value becomes NaN.
    """
    finite = values - values == 0.0
    total = tl.dot(
        weights.to(values.dtype),
        tl.where(finite, values, 0.0).to(values.dtype),
        total,
        input_precision="ieee",
    )
    bad = tl.dot(
        seen.to(values.dtype),
        tl.where(finite, 0.0, 1.0).to(values.dtype),
        input_precision="ieee",
    )
    return tl.where(bad > 0.0, float("nan"), total)
