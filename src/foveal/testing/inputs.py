"""Random q, k, v with the shapes and memory layouts that implementations get wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "heads_first", "strided", "broadcast"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "heads_first", "strided", "broadcast")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one problem: q [batch, *q_grid, q_heads, head_dim], k and v on kv_grid.

    Options: kv_grid None is q_grid, kv_heads None is q_heads (else it divides q_heads), value_dim
    None is head_dim.
    """

    q_grid: tuple[int, ...]
    kv_grid: tuple[int, ...] | None = None
    batch: int = 1
    q_heads: int = 1
    kv_heads: int | None = None
    head_dim: int = 8
    value_dim: int | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of q, k and v."""
        kv_grid = self.q_grid if self.kv_grid is None else self.kv_grid
        kv_heads = self.q_heads if self.kv_heads is None else self.kv_heads
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        return (
            (self.batch, *self.q_grid, self.q_heads, self.head_dim),
            (self.batch, *kv_grid, kv_heads, self.head_dim),
            (self.batch, *kv_grid, kv_heads, value_dim),
        )


def qkv(
    sizes: Sizes,
    source: torch.Generator,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v from a standard normal distribution, drawn on the CPU so that devices agree.

    Options: layout "contiguous"; "heads_first" (stored [B, H, *grid, D]); "strided" (every second
    element of a larger buffer, also along D); "broadcast" (all batches and heads share memory).
    """
    q, k, v = (_draw(shape, source, dtype, layout, device) for shape in sizes.shapes)
    return q, k, v


def packed_lengths(total: int, documents: int, source: torch.Generator) -> Tensor:
    """`cu_seqlens` int32 [documents + 1] that cut `total` tokens at random; some may be empty."""
    cuts = torch.randint(0, total + 1, (max(documents - 1, 0),), generator=source).sort().values
    ends = (torch.zeros(1, dtype=torch.int64), cuts, torch.full((1,), total))
    return torch.cat(ends).to(torch.int32)


def _draw(
    shape: tuple[int, ...],
    source: torch.Generator,
    dtype: torch.dtype,
    layout: Layout,
    device: torch.device | str,
) -> Tensor:
    if layout == "broadcast":
        shared = (min(shape[0], 1), *shape[1:-2], 1, shape[-1])
        return torch.randn(shared, generator=source).to(device, dtype).expand(shape)
    x = torch.randn(shape, generator=source).to(device, dtype)
    if layout == "contiguous":
        return x
    if layout == "heads_first":
        return x.movedim(-2, 1).contiguous().movedim(1, -2)
    buffer = torch.full([2 * size for size in shape], torch.nan, dtype=dtype, device=device)
    return buffer[(slice(None, None, 2),) * len(shape)].copy_(x)
