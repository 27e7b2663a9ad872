"""Rows in 8 or 4 bits, with a scale for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal._errors import CacheError
from foveal.caches.base import KVShape, check_shape
from foveal.caches.codec import Codec
from foveal.caches.paged import Paged

Bits = Literal["fp8", "int8", "int4"]


@dataclass(frozen=True)
class ScaledCodec(Codec):
    """A row is scale * (number - zero), with a scale per row; zero is 0 but for "int4".

    "fp8" is e4m3 with the largest entry at 448, "int8" symmetric with the largest at 127, "int4" between
    the smallest entry (0) and the largest (15), two channels to a byte.
    """

    bits: Bits

    @property
    def kind(self) -> str:
        return self.bits

    @property
    def columns(self) -> tuple[tuple[int, torch.dtype], ...]:
        if self.bits == "int4":
            return (-(-self.dim // 2), torch.uint8), (1, torch.float32), (1, torch.float32)
        return (self.dim, torch.uint8 if self.bits == "fp8" else torch.int8), (1, torch.float32)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.float()
        if self.bits == "int4":
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            scale = torch.where(high > low, (high - low) / 15, 1.0)
            zero = -low / scale
            numbers = (x / scale + zero).round().clamp(0, 15).to(torch.uint8)
            if self.dim % 2:
                numbers = torch.cat((numbers, torch.zeros_like(numbers[..., :1])), -1)
            return numbers[..., 0::2] | numbers[..., 1::2] << 4, scale, zero
        largest = x.abs().amax(-1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, largest / (448 if self.bits == "fp8" else 127))
        if self.bits == "fp8":
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale
        return (x / scale).round().clamp(-127, 127).to(torch.int8), scale

    def decode(self, columns: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        numbers, scale = columns[0], columns[1].to(dtype)
        if self.bits == "int4":
            pairs = torch.stack((numbers & 15, numbers >> 4), -1).flatten(-2)[..., : self.dim]
            return (pairs.to(dtype) - columns[2].to(dtype)) * scale
        if self.bits == "fp8":
            numbers = numbers.view(torch.float8_e4m3fn)
        return numbers.to(dtype) * scale


class Quantised(Paged):
    """Pages of rows in 8 or 4 bits, a float32 scale per token and head, keys and values apart.

    Options: bits "fp8" (e4m3), "int8" or "int4"; the others as for `Paged`.
    Limits: a row with NaN or inf comes back as NaN; "fp8" on a GPU needs compute capability 8.9.
    Equals: `Paged` on the rounded rows, whatever is appended later: a scale belongs to one row.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        pages: int,
        bits: Bits = "fp8",
        page_size: int = 16,
        per_head: bool = False,
        max_tokens: int | None = None,
        biased: bool = False,
    ) -> None:
        check_shape(shape)
        if bits not in ("fp8", "int8", "int4"):
            raise CacheError("bits", bits, 'one of "fp8", "int8", "int4" is needed')
        codecs = tuple(
            ScaledCodec(dim, shape.dtype, bits) for dim in (shape.head_dim, shape.values)
        )
        self._build(shape, (codecs[0], codecs[1]), pages, page_size, per_head, max_tokens, biased)
