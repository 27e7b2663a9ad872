"""Lists out of rows of scores and marks: on a GPU by kernels, elsewhere by sorts."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from foveal.patterns.base import FULL, PARTIAL
from foveal.patterns.blocks import places as sorted_places

# Numbers that a program of one warp holds.
_ELEMENTS = 1024
# Rows as wide as those that were compared with sorts on a GPU.
_WIDEST = 1024


def best(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts` [..., 1] largest of the last axis, ties to the lower place, -inf never.  bool"""
    if scores.dtype == torch.float32 and _has_kernels(scores):
        from foveal.engines.tile.row_kernels import row_best

        scores = scores.contiguous()
        wanted = counts.to(torch.int32).expand(*scores.shape[:-1], 1).contiguous()
        found = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        _launch(row_best, scores, (scores, wanted, found.view(torch.int8)))
        return found
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).to(counts.dtype)
    kept = (place < counts).expand_as(order)
    marks = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, kept)
    return marks & (scores > -torch.inf)


def heaviest(scores: Tensor, mass: float) -> Tensor:
    """The shortest prefix of the falling scores >= 0 whose sum reaches `mass` of that of the row.  bool

    At least one, ties to the lower place, -inf never; inf always, and in no sum.
    """
    if scores.dtype == torch.float32 and _has_kernels(scores):
        from foveal.engines.tile.row_kernels import row_mass

        scores = scores.contiguous()
        found = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        _launch(row_mass, scores, (scores, found.view(torch.int8)), float(mass))
        return found
    allowed, forced = scores > -torch.inf, scores == torch.inf
    shares = scores.clamp(min=0).masked_fill(forced, 0.0).masked_fill(~allowed, -1.0)
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.clamp(min=0)
    kept = ordered.cumsum(-1) - ordered < mass * ordered.sum(-1, keepdim=True)
    kept[..., 0] = True
    marks = torch.zeros_like(allowed).scatter_(-1, order, kept)
    return (marks | forced) & allowed


def places(mask: Tensor) -> Tensor:
    """As `foveal.patterns.blocks.places`."""
    if not _has_kernels(mask):
        return sorted_places(mask)
    from foveal.engines.tile.row_kernels import row_places

    most = max(int(mask.sum(-1).max()), 1)
    mask = mask.contiguous()
    found = torch.empty(*mask.shape[:-1], most, dtype=torch.int32, device=mask.device)
    _launch(row_places, mask, (mask.view(torch.int8), found), most)
    return found


def walk_words(states: Tensor, header: int) -> Tensor:
    """`WalkLists.words` of states uint8 [B or 1, lists, tiles, width]: the longest lists first."""
    tested, counts = ((states == PARTIAL).sum(-1), (states > 0).sum(-1))
    order = torch.argsort(counts, dim=2, descending=True, stable=True)
    if _has_kernels(states):
        from foveal.engines.tile.row_kernels import row_walk

        states = states.contiguous()
        shape = (*states.shape[:3], header + states.shape[3])
        words = torch.empty(shape, dtype=torch.int32, device=states.device)
        _launch(
            row_walk, states, (states, order, words), states.shape[2],
            HEADER=header, PARTIAL=PARTIAL, FULL=FULL,
        )  # fmt: skip
        return words
    rank = torch.where(states == PARTIAL, 0, torch.where(states == FULL, 1, 2)).to(torch.uint8)
    columns = torch.argsort(rank, dim=-1, stable=True)
    tiles_ = torch.arange(states.shape[2], device=states.device)[:, None].expand_as(
        counts[..., None]
    )
    words = torch.cat([tiles_, tested[..., None], counts[..., None], columns], dim=-1)
    return words.to(torch.int32).gather(2, order[..., None].expand_as(words))


def _launch(
    kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], *sizes: float, **constants: int
) -> None:
    """One row of x [..., width] per row of a tile."""
    width = x.shape[-1]
    pad = 1 << (width - 1).bit_length()
    rows, at_once = x.numel() // width, max(1, _ELEMENTS // pad)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[(-(-rows // at_once),)](
            *tensors, rows, width, *sizes, **constants,
            ROWS=at_once, WIDTH=pad, num_warps=1,
        )  # fmt: skip


def _has_kernels(x: Tensor) -> bool:
    return x.shape[-1] <= _WIDEST and x.numel() > 0 and has_kernels(x)


def has_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels can work on x here and now."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return _available(x.device.type)


@functools.lru_cache(maxsize=8)
def _available(device: str) -> bool:
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    return (device == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None
