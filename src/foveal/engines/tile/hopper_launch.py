"""Tensors as what the Hopper kernels take: descriptors of boxes, and bounds in one array."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from foveal._kept import kept
from foveal.engines.tile.hopper_plan import Box, Walk
from foveal.engines.tile.hopper_scores import tile_attend_biases
from foveal.engines.tile.launch import bits
from foveal.engines.tile.lists import WalkLists, boxes
from foveal.engines.tile.replay import launch
from foveal.engines.tile.spans import spans
from foveal.engines.tile.terms import PER_KEY, LocalTerm
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.dense import Dense

# What writing and merging parts of items costs, in boxes of a program.
_MERGE_BOXES = 12

_ELEMENT: dict[torch.dtype, Any] = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@kept(64)
def packed_bounds(
    pattern: Pattern, extent: Extent, device: torch.device, of_keys: bool
) -> tuple[tuple[int, int, int], int, Tensor]:
    """Lengths of three axes, how many the pattern has, and `p_bounds` of queries or of keys."""
    found = boxes(pattern, extent, device)
    assert found is not None, "refuses() lets separable patterns pass only"
    lower, upper = (found.q_lower, found.q_upper) if of_keys else (found.lower, found.upper)
    axes = len(lower)
    rows = [len(axis) for axis in lower] + [1] * (3 - axes)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    pairs = [*zip(lower, upper, strict=True), *[(none, none + 1)] * (3 - axes)]
    x, y, z = rows
    return (x, y, z), axes, torch.cat([end for pair in pairs for end in pair])


@kept(64)
def intervals(
    pattern: Pattern, extent: Extent, device: torch.device, of_keys: bool
) -> tuple[tuple[tuple[int, int, int], int, Tensor], tuple[Tensor, ...]]:
    """packed_bounds; and the second interval of each row [2 rows], where rows see two."""
    if pattern.bounds(extent) is not None:
        return packed_bounds(pattern, extent, device, of_keys), ()
    found = spans(pattern, extent, of_keys)
    assert found is not None, "tested tiles hide one or two intervals"
    first, first_stop, second, second_stop = (x.to(device) for x in found)
    none = torch.tensor([0, 1, 0, 1], dtype=torch.int32, device=device)
    bounds = torch.cat([first, first_stop, none])
    return ((len(first), 1, 1), 1, bounds), (torch.cat([second, second_stop]),)


def head_pad(head_dim: int) -> int:
    """Columns of a box: the copy fills those that a head does not have with zeros."""
    return 1 << (head_dim - 1).bit_length()


def on_grid(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """x [N, L, H, D] as [N, *grid, H, D], copied if its memory does not suit a descriptor."""
    x = x.unflatten(1, grid)
    strides = [
        stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1
    ]
    suits = x.stride(-1) == 1 and all(s > 0 and s % 8 == 0 for s in strides)
    return x if suits and x.data_ptr() % 16 == 0 else x.contiguous()


@functools.lru_cache(maxsize=256)
def _layout(sides: tuple[int, ...], dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(sides))
    return gl.NVMMASharedLayout.get_default_for(list(sides), _ELEMENT[dtype])


@functools.lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def descriptor(x: Tensor, box: Box, axes: int) -> TensorDescriptor:
    """Boxes of one head of x [N, *grid, H, D]; of x [1, X, Y, Z, H, D] with three axes."""
    sides = [*box[:axes], 1, head_pad(x.shape[-1])]
    if axes == 3:
        x = x[0]
    else:
        sides = [1, *sides]
    # Strides of axes of one element mean nothing, yet have to be multiples of 16 bytes.
    strides = [s if n > 1 else 8 for s, n in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(
        x, list(x.shape), [*strides[:-1], 1], sides, _layout(tuple(sides), x.dtype)
    )


def statistics_descriptor(x: Tensor, box: Box, grid: tuple[int, ...]) -> TensorDescriptor:
    """Boxes of x [N, H, *grid], fp32, whose last axis is padded."""
    x = x.flatten(0, 1)
    sides = [1, *box[: len(grid)]]
    shape = [len(x), *grid]
    return TensorDescriptor(x, shape, list(x.stride()), sides, _layout(tuple(sides), x.dtype))


def sums_descriptor(x: Tensor, box: Box, whole: bool) -> TensorDescriptor:
    """Boxes of x [N, H, *grid, D], fp32, of all columns or of half of them."""
    x = x.flatten(0, 1)
    columns = head_pad(x.shape[-1]) // (1 if whole else 2)
    sides = [1, *box[: x.dim() - 2], columns]
    layout = gl.NVMMASharedLayout.get_default_for(sides, gl.float32)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), sides, layout)


def list_arguments(lists: WalkLists) -> tuple[Any, ...]:
    """The first of `lists` of the kernels."""
    words = lists.words
    strides = (lists.list_stride, lists.batch_stride)
    return words, words.shape[2], lists.pitch, lists.heads_per_list, *strides


@kept(64)
def tested_pairs(
    pattern: Pattern, extent: Extent, q_tile: int, kv_tile: int, device: torch.device
) -> tuple[Tensor, tuple[Any, ...]]:
    """`p_bounds` of queries and the last of `lists`: what the pattern hides in tested tiles."""
    bounds = pattern.bounds(extent)
    if bounds is not None and len(bounds.lower) == 1:
        return packed_bounds(pattern, extent, device, False)[2], ()
    words, marks = (x.to(device) for x in bits(pattern, extent, q_tile, kv_tile))
    return packed_bounds(Dense(), extent, device, False)[2], (words, marks, marks.shape[1])


def term_arguments(term: LocalTerm, heads: int, entries: slice) -> tuple[Any, ...]:
    """`terms` of the kernels behind their first, for some entries of the batch."""
    values = term.values
    if term.kind == PER_KEY:
        return bias_arguments(values[entries] if len(values) > 1 else values, heads)
    assert term.q_codes is not None
    assert term.k_codes is not None
    parts, queries = term.q_codes.shape
    codes = term.q_codes, term.k_codes
    return values.contiguous(), *codes, queries, term.k_codes.shape[1], parts


def bias_arguments(values: Tensor, heads: int) -> tuple[Any, ...]:
    """`biases` of the kernels of the backward, of values [N or 1, heads of them, Lk]."""
    values = values if values.stride(-1) == 1 else values.contiguous()
    strides = (s if n > 1 else 0 for s, n in zip(values.stride()[:2], values.shape, strict=False))
    return values, *strides, heads // values.shape[1]


def programs(walk: Walk, lengths: tuple[int, int, int], rows: Tensor) -> tuple[int, int]:
    """How many work items the rows [N, *grid, H, D] make, and how many programs share them."""
    x, y, z = walk.rows
    tiles = triton.cdiv(lengths[0], walk.consumers * x) * triton.cdiv(lengths[1], y)
    items = tiles * triton.cdiv(lengths[2], z) * len(rows) * rows.shape[-2]
    if not walk.persistent:
        return items, items
    return items, min(items, multiprocessors(rows.device))


def split_boxes(walk: Walk, columns: int, items: int, device: torch.device) -> tuple[int, ...]:
    """`split` of hopper_walk, of a walk over all columns, where cutting the last items pays; else ().

    It does where programs without an item would wait longer than writing and merging parts takes.
    """
    sharing = multiprocessors(device)
    boxes = triton.cdiv(columns, walk.columns[0])
    rest = items % sharing
    pays = rest > 0 and (sharing - rest) * boxes > _MERGE_BOXES * sharing
    return (boxes, sharing, 0) if pays else ()


def scaled_biases(values: Tensor, grid: tuple[int, ...], factor: float) -> Tensor:
    """factor times biases per key [N or 1, heads, Lk], fp32 [N or 1, heads, *grid], last axis padded."""
    values = values if values.stride(-1) == 1 else values.contiguous()
    batch, heads, length = values.shape
    pitch = -(-grid[-1] // 4) * 4
    scaled = values.new_empty(batch, heads, *grid[:-1], pitch, dtype=torch.float32)
    launch(
        tile_attend_biases, (triton.cdiv(length, 1024), batch * heads),
        values, scaled, heads, length, grid[-1], pitch, scaled[0, 0].numel(), *values.stride()[:2],
        factor, WIDTH=1024,
    )  # fmt: skip
    return scaled
