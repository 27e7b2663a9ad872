"""Tensors of the operators of this family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def qkv_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Shapes of q, k and v; where fewer heads are timed, as many key heads as divide them."""
    heads, dim = shape["heads"], shape["head_dim"]
    kv_heads = math.gcd(heads, shape["kv_heads"])
    q, kv = ((1, *shape["grid"], each, dim) for each in (heads, kv_heads))
    return q, kv, kv
