"""Scores as jit functions: the shape of the product, and the terms added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from foveal.engines.common.hooks import Hooks
from foveal.engines.common.softmax import LOG2E


@dataclass(frozen=True)
class Shape(Hooks):
    """value: the score of a product, in base 2 after a factor of `unit`; slope: its derivative by the
    scaled product, given the value before terms.
    """

    value: Any
    unit: Any
    slope: Any


@dataclass(frozen=True)
class Term(Hooks):
    """value: what is added (natural units); i_q and i_k are raster indices, broadcast against each other.

    share: what a row of queries adds to the gradient of a slope, else 0; entry: which of the entries that
    a query may meet (keys, or a table's) the pair reads.
    """

    value: Any
    share: Any
    entry: Any


@triton.jit
def _product(product, scale, cap):
    return product


@triton.jit
def _scale_as_unit(scale):
    return scale


@triton.jit
def _scaled(product, scale, cap):
    return product * scale


@triton.jit
def _no_unit(scale):
    return 1.0


@triton.jit
def _no_slope(value, cap):
    return 1.0


@triton.jit
def tanh(x):
    """Odd polynomial near 0 (coefficients of the Cephes library), exponentials elsewhere."""
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = (near * square - 3.33332819422e-1) * square * x + x
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def _capped(product, scale, cap):
    return cap * tanh(product * scale)


@triton.jit
def _cap_slope(value, cap):
    share = value / cap
    return 1.0 - share * share


@triton.jit
def _nothing(term, n, h, i_q, i_k, here):
    return 0.0


@triton.jit
def _per_pair(term, n, h, i_q, i_k, here):
    """term: (values, strides of batch, head, query, key)."""
    p = term[0] + tl.cast(n, tl.int64) * term[1] + tl.cast(h, tl.int64) * term[2]
    p += tl.cast(i_q, tl.int64) * term[3]
    return tl.load(p + tl.cast(i_k, tl.int64) * term[4], mask=here, other=0.0).to(tl.float32)


@triton.jit
def _per_key(term, n, h, i_q, i_k, here):
    """term: (values, strides of batch, head, key, query heads per head of the values, keys)."""
    p = term[0] + tl.cast(n, tl.int64) * term[1] + tl.cast(h // term[4], tl.int64) * term[2]
    return tl.load(p + i_k * term[3], mask=i_k < term[5], other=0.0).to(tl.float32)


@triton.jit
def _steps(term, n, i_q, i_k, here):
    """Code of the key minus code of the query.

    term: (values, stride of head, codes of queries, of keys, queries, keys, sub-problems, last entry).
    """
    part = (n % term[6]).to(tl.int32)
    q_code = tl.load(term[2] + part * term[4] + i_q, mask=i_q < term[4], other=0)
    return tl.load(term[3] + part * term[5] + i_k, mask=i_k < term[5], other=0) - q_code


@triton.jit
def _by_distance(term, n, h, i_q, i_k, here):
    slope = tl.load(term[0] + tl.cast(h, tl.int64) * term[1]).to(tl.float32)
    return -slope * tl.abs(_steps(term, n, i_q, i_k, here)).to(tl.float32)


@triton.jit
def _table_entry(term, n, i_q, i_k, here):
    return tl.minimum(tl.maximum(_steps(term, n, i_q, i_k, here), 0), term[7])


@triton.jit
def _from_table(term, n, h, i_q, i_k, here):
    entry = _table_entry(term, n, i_q, i_k, here)
    return tl.load(term[0] + tl.cast(h, tl.int64) * term[1] + entry).to(tl.float32)


@triton.jit
def _key_entry(term, n, i_q, i_k, here):
    return i_q * 0 + i_k


@triton.jit
def _no_share(term, n, ds, i_q, i_k, here):
    return 0.0


@triton.jit
def _distance_share(term, n, ds, i_q, i_k, here):
    return -tl.sum(ds * tl.abs(_steps(term, n, i_q, i_k, here)).to(tl.float32), 1)


PRODUCT = Shape(_product, _scale_as_unit, _no_slope)
SCALED = Shape(_scaled, _no_unit, _no_slope)
CAPPED = Shape(_capped, _no_unit, _cap_slope)

NOTHING = Term(_nothing, _no_share, _key_entry)
PER_PAIR = Term(_per_pair, _no_share, _key_entry)
PER_KEY = Term(_per_key, _no_share, _key_entry)
BY_DISTANCE = Term(_by_distance, _distance_share, _key_entry)
FROM_TABLE = Term(_from_table, _no_share, _table_entry)
