"""How a row of numbers is kept in memory: as it is, or in fewer bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """Turns rows [..., dim] into the columns of a store and back.

    `kind` names the loads of the decode kernel.  Every column is [..., width] of one dtype.
    """

    dim: int
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        return "plain"

    @property
    def columns(self) -> tuple[tuple[int, torch.dtype], ...]:
        """(width, dtype) of every column, that of the values first."""
        return ((self.dim, self.dtype),)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Columns of rows x [..., dim]."""
        return (x.to(self.dtype),)

    def decode(self, columns: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Rows [..., dim] of the columns, computed in `dtype`."""
        return columns[0].to(dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all its columns."""
        return sum(width * dtype.itemsize for width, dtype in self.columns)
