"""Largest estimates by Triton's interpreter beside those of the plain path; run in a process of its own."""

from __future__ import annotations

import torch

from foveal.engines.tile import low_bit

Sizes = tuple[int, int, int, int, int, int, int, int, int]


def differences(sizes: Sizes, seed: int) -> tuple[float, float]:
    """Median and largest difference of the far tiles, relative to the largest estimate."""
    Lq, Lk, heads, kv_heads, dim, bits, local, q_block, kv_block = sizes
    source = torch.Generator().manual_seed(seed)
    q = torch.randn(2, Lq, heads, dim, generator=source).half()
    k = (torch.randn(2, Lk, kv_heads, dim, generator=source) + 1).half()
    level = torch.randn(2, Lq, heads, generator=source)
    options = (bits, local, q_block, kv_block)
    found = low_bit.largest_estimates(q, k, level, *options)
    plain = low_bit.largest_estimates(q.float(), k.float(), level, *options)
    first = torch.arange(found.shape[2])[:, None] * q_block + Lk - Lq
    last = torch.arange(found.shape[3]) * kv_block + kv_block - 1
    far = last <= first - local
    away = (found - plain)[..., far].abs() / plain[..., far].abs().max()
    return float(away.median()), float(away.max())
