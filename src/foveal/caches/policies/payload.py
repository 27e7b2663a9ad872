"""Rows of keys or values as they are kept: whole, in 8 bits, or without their small elements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 448.0  # of the 8-bit format e4m3


class Payload(ABC):
    """N rows of D numbers, [N, D] when read back."""

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop - start, D], in the precision they came in."""

    @abstractmethod
    def select(self, rows: Tensor) -> Payload:
        """The rows of an index, in its order."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes of memory that the rows take."""


@dataclass(frozen=True)
class Whole(Payload):
    """The rows as they are."""

    rows: Tensor

    def dense(self, start: int, stop: int) -> Tensor:
        return self.rows[start:stop]

    def select(self, rows: Tensor) -> Whole:
        return Whole(self.rows[rows])

    def bytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()


@dataclass(frozen=True)
class Eight(Payload):
    """e4m3 with one scale per row, the largest magnitude of the row over 448."""

    rows: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Eight:
        scale = x.float().abs().amax(-1) / _LARGEST
        rows = x.float() / scale.clamp(min=1e-30)[:, None]
        return cls(rows.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale, x.dtype)

    def dense(self, start: int, stop: int) -> Tensor:
        return (self.rows[start:stop].float() * self.scale[start:stop, None]).to(self.dtype)

    def select(self, rows: Tensor) -> Eight:
        return Eight(self.rows[rows], self.scale[rows], self.dtype)

    def bytes(self) -> int:
        return self.rows.numel() + self.scale.numel() * 4


@dataclass(frozen=True)
class Sparse(Payload):
    """The same number of elements of every row: their values, and one bit per element for where."""

    values: Tensor  # [N, kept]
    bits: Tensor  # uint8 [N, ceil(D / 8)]
    width: int

    @classmethod
    def of(cls, x: Tensor, sparsity: float) -> Sparse:
        """Keeps the D - floor(sparsity D) largest magnitudes of every row; NaN counts as largest."""
        width = x.shape[-1]
        kept = width - math.floor(sparsity * width)
        size = x.abs().float().nan_to_num(torch.inf, torch.inf, torch.inf)
        places = size.argsort(dim=-1, descending=True, stable=True)[:, :kept].sort(-1).values
        marks = torch.zeros(x.shape, dtype=torch.uint8, device=x.device).scatter_(-1, places, 1)
        marks = torch.nn.functional.pad(marks, (0, -width % 8)).unflatten(-1, (-1, 8))
        powers = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
        bits = (marks * powers).sum(-1, dtype=torch.uint8)
        return cls(x.gather(-1, places), bits, width)

    def dense(self, start: int, stop: int) -> Tensor:
        bits, values = self.bits[start:stop], self.values[start:stop]
        shifts = torch.arange(8, device=bits.device)
        marks = (bits[..., None] >> shifts) & 1
        mask = marks.flatten(-2)[:, : self.width].bool()
        return values.new_zeros(mask.shape).masked_scatter_(mask, values)

    def select(self, rows: Tensor) -> Sparse:
        return Sparse(self.values[rows], self.bits[rows], self.width)

    def bytes(self) -> int:
        return self.values.numel() * self.values.element_size() + self.bits.numel()
