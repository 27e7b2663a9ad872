"""How many of n a share of them is: one rounding for Python numbers and for tensors of counts."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

_DECIMALS = 9
"""Rounded to so many before the ceiling: 0.07 x 100 is 7.000000000000001 in float64, and 7 is meant."""


@overload
def share_of(count: int, share: float) -> int: ...
@overload
def share_of(count: Tensor, share: float) -> Tensor: ...
def share_of(count: int | Tensor, share: float) -> int | Tensor:
    """ceil(share x count), of a whole number or of a tensor of them (int64 like it)."""
    if isinstance(count, Tensor):
        part = count.to(torch.float64) * share
        return torch.ceil(part.round(decimals=_DECIMALS)).long()
    return math.ceil(round(share * count, _DECIMALS))
