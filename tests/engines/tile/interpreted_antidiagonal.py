"""What a process with Triton's interpreter runs: antidiagonal scores by kernels, in tiny tiles."""

from __future__ import annotations

import torch

from foveal.engines.tile import antidiagonal
from foveal.selectors import Antidiagonal, Tiling

SMALL = antidiagonal.Shape(16, 32, 16, 2, 1, 1)


def difference(sizes: tuple[int, ...], causal: bool, seed: int) -> float:
    """Largest difference from float64; sizes: Lq, Lk, heads, kv_heads, dim, stride, q_block, kv_block."""
    Lq, Lk, heads, kv_heads, dim, stride, *blocks = sizes
    antidiagonal._LEVELS = 400  # some heads at a time
    source = torch.Generator().manual_seed(seed)
    q = torch.randn(2, Lq, heads, dim, generator=source)
    k = torch.randn(2, Lk, kv_heads, dim, generator=source)
    tiling = Tiling(Lq, Lk, blocks[0], blocks[1], causal)
    plain = Antidiagonal(stride).scores(q.double(), k.double(), tiling)
    found = antidiagonal.scores(q, k, stride, (blocks[0], blocks[1]), causal, SMALL)
    return float((found - plain).abs().max())
