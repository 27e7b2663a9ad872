"""Antidiagonal scores of blocks on a GPU: two launches, no folded copy and no reduced map."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.engines.common.current import on
from foveal.engines.tile.replay import launch
from foveal.engines.tile.rows import has_kernels

# Sums of rows and blocks that are in memory at once.
_LEVELS = 1 << 26
# Blocks of a row that a program of the second kernel reads together.
_WIDEST = 512


@dataclass(frozen=True)
class Shape:
    """Folded queries and keys of a tile, how much of head_dim is multiplied at once, tiles of rows that walk
    side by side, warps and stages."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


# As measured to be best on an H100, and what fits into less shared memory.
_SHAPE = Shape(128, 256, 64, 16, 8, 3)
_SMALLER = Shape(128, 128, 64, 16, 8, 2)


def shape_for(hip: bool, shared: int) -> Shape:
    """By the shared memory of a multiprocessor, in bytes."""
    return _SMALLER if hip or shared < 200 << 10 else _SHAPE


def serves(q: Tensor, k: Tensor, stride: int, kv_block: int) -> bool:
    """Half types on a GPU, a power of two of folded keys in a block, head_dim 64, 128 or 256."""
    half = q.dtype in (torch.bfloat16, torch.float16) and k.dtype == q.dtype
    if not half or not q.is_cuda or not has_kernels(q):
        return False
    per = kv_block // stride
    fits = q.shape[3] in (64, 128, 256) and per & (per - 1) == 0 and per <= _SMALLER.columns
    return fits and q.numel() > 0 and k.numel() > 0


def scores(
    q: Tensor,
    k: Tensor,
    stride: int,
    blocks: tuple[int, int],
    causal: bool,
    shape: Shape | None = None,
) -> Tensor:
    """As `Antidiagonal(stride).scores`: float32 [B, Hq, q_blocks, kv_blocks], 0 where a tile sees nothing.

    q [B, Lq, Hq, D], k [B, Lk, Hkv, D]; blocks of queries and of keys, multiples of the stride.
    """
    shape = shape or _shape(q.device)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, Lq, heads, _ = q.shape
    Lk, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    rows, tiles, width = -(-Lq // stride), -(-Lq // blocks[0]), -(-Lk // blocks[1])
    found = q.new_empty(B, heads, tiles, width, dtype=torch.float32)
    step = max(groups, _LEVELS // (rows * width) // groups * groups)
    with on(q.device):
        for n in range(B):
            for first in range(0, heads, step):
                last = min(first + step, heads)
                own_k = k[n, :, first // groups : last // groups]
                _some_heads(
                    q[n, :, first:last], own_k, found[n, first:last], stride, blocks, causal, shape
                )
    return found


def _some_heads(
    q: Tensor, k: Tensor, found: Tensor, stride: int, blocks: tuple[int, int], causal: bool, shape: Shape
) -> None:  # fmt: skip
    from foveal.engines.tile.antidiagonal_kernels import antidiagonal_levels, antidiagonal_shares

    (Lq, heads, D), (Lk, kv_heads, _) = q.shape, k.shape
    rows, columns = -(-Lq // stride), -(-Lk // stride)
    tiles, width = found.shape[1:]
    shift, together = Lk - Lq, blocks[0] // stride
    levels = q.new_empty(heads, rows, width, dtype=torch.float32)
    options: dict[str, Any] = {
        "S": stride, "PER": blocks[1] // stride, "D": D, "ROWS": shape.rows, "COLUMNS": shape.columns,
        "DEPTH": min(shape.depth, D), "GROUP": shape.group, "CAUSAL": causal, "STAGES": shape.stages,
        "num_warps": shape.warps,
    }  # fmt: skip
    grid = -(-rows // shape.rows) * -(-columns // shape.columns), heads
    launch(
        antidiagonal_levels, grid, q, k, levels, q.stride()[:2], k.stride()[:2], heads // kv_heads,
        Lq, Lk, rows, columns, width, shift, 1 / (stride * D**0.5), **options,
    )  # fmt: skip
    launch(
        antidiagonal_shares, (heads * tiles,), levels, found, rows, width, tiles, blocks[1], shift,
        S=stride, TOGETHER=together, TOGETHER_PAD=_power(together), WIDTH=min(_WIDEST, _power(width)),
        CAUSAL=causal, num_warps=4,
    )  # fmt: skip


def _power(size: int) -> int:
    """The power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


@functools.lru_cache(maxsize=16)
def _shape(device: torch.device) -> Shape:
    properties = torch.cuda.get_device_properties(device)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 64 << 10))
    return shape_for(torch.version.hip is not None, shared)
