"""A small problem as one call of PyTorch's fused attention on all pairs, with -inf added to the hidden ones.

A tile is a chain of calls, whose price does not depend on what it holds: where tiles are few and small,
all pairs at once cost less.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal._kept import kept
from foveal._problem import Problem
from foveal.engines.common.once import once_differentiable
from foveal.engines.tile.walk import Runs, walk
from foveal.patterns.base import Extent, Pattern
from foveal.scores.normal import NormalForm

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# The mask of all pairs is kept between calls, and read for every head: it has to stay in cache.
_MASK_BYTES = 4 << 20

# Nanoseconds on one thread, measured at D from 32 to 128 (AVX-512): a pair of one head in the fused call,
# which a tile of 64 rows computes at two thirds of that speed, and the calls that no thread shares.
_PAIR, _PAIR_AND_CHANNEL = 0.9, 0.067
_IN_TILES = 1.65
_WHOLE_CALL, _TILED_CALL, _SWEEP, _TILE = 500e3, 400e3, 250e3, 200e3
# By which all pairs have to cost less forward, so that they do not cost more with the backward.
_MARGIN = 1.3


@dataclass(frozen=True)
class Estimate:
    """Seconds of a forward pass by all `pairs` at once, and by tiles."""

    pairs: int
    whole: float
    tiled: float

    def __str__(self) -> str:
        return (
            f"all {self.pairs:,} pairs at once in PyTorch's fused attention with a mask, "
            f"{self.whole * 1e3:.1f} ms by estimate against {self.tiled * 1e3:.1f} by tiles"
        )


def estimate(problem: Problem, pattern: Pattern, score: NormalForm) -> Estimate | None:
    """What speaks for all pairs at once, or None where tiles cost less or alone can do it."""
    extent, threads = problem.extent, torch.get_num_threads()
    pairs, matrices = extent.Lq * extent.Lk, problem.batch * problem.q_heads
    bytes_each = 8 if problem.dtype == torch.float64 else 4
    if not score.plain or problem.return_lse or problem.head_dim != problem.value_dim:
        return None
    if not 0 < pairs * bytes_each <= _MASK_BYTES or not matrices or pattern.depends_on_data:
        return None
    elements, sweeps, tiles = _tiled_work(pattern, extent, matrices)
    pair = matrices * (_PAIR + _PAIR_AND_CHANNEL * problem.head_dim) / threads
    whole = _WHOLE_CALL + pair * pairs
    tiled = _TILED_CALL + _IN_TILES * pair * elements + _SWEEP * sweeps + _TILE * tiles
    if whole * _MARGIN > tiled or not _all_rows_see(pattern, extent):
        return None
    return Estimate(pairs, whole * 1e-9, tiled * 1e-9)


@functools.lru_cache(maxsize=256)
def _tiled_work(pattern: Pattern, extent: Extent, matrices: int) -> tuple[int, int, int]:
    """Elements of one score matrix that tiles compute, sweeps, and tiles."""
    pattern = pattern.simplify(extent)
    parts = pattern.parts(extent)
    if parts:
        elements = sweeps = tiles = 0
        for part in parts:
            count = len(part.q_tokens)
            own = _tiled_work(part.pattern, part.extent, matrices * count)
            elements, sweeps, tiles = elements + count * own[0], sweeps + own[1], tiles + own[2]
        return elements, sweeps, tiles
    walked = walk(pattern, extent, matrices)
    sizes = [(tile.height, tile.columns) for sweep in walked for tile in sweep.tiles]
    elements = sum(rows * runs.width for rows, runs in sizes if isinstance(runs, Runs))
    return elements, len(walked), len(sizes)


@functools.lru_cache(maxsize=256)
def _all_rows_see(pattern: Pattern, extent: Extent) -> bool:
    return bool(_seen(pattern, extent).any(-1).all())


def _seen(pattern: Pattern, extent: Extent) -> Tensor:
    return pattern.allows(extent.q_positions()[:, None], extent.k_positions()[None], extent)


@kept(8)
def hidden_pairs(pattern: Pattern, extent: Extent, dtype: torch.dtype) -> Tensor:
    """-inf where a pair is hidden, else 0.  [Lq, Lk]"""
    seen = _seen(pattern, extent)
    return torch.zeros(extent.Lq, extent.Lk, dtype=dtype).masked_fill_(~seen, -torch.inf)


class WholeAttention(torch.autograd.Function):
    """o [B, H, Lq, D] of q [B, H, Lq, D], k and v [B, H, Lk, D].

    hidden [Lq, Lk] is 0 for a pair that is seen, else -inf; every row sees a key.  The gradients are not
    those of the fused call, whose exponentials are short of float32 by some roundings.
    """

    @staticmethod
    def forward(ctx: Any, scale: float, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(hidden, q, k, v)
        o: Tensor = _FUSED(q, k, v, 0.0, False, attn_mask=hidden, scale=scale)[0]
        return o

    @staticmethod
    @once_differentiable("cpu")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        hidden, q, k, v = ctx.saved_tensors
        every = tuple(x.flatten(0, 1) for x in (q, k, v, do))
        totals = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in every[:3]]
        step = max(1, _MASK_BYTES // hidden.nbytes)
        for own in zip(*(x.split(step) for x in (*every, *totals)), strict=True):
            _gradients(ctx.scale, hidden, own[:4], own[4:])
        found = (d.view(x.shape) for d, x in zip(totals, (q, k, v), strict=True))
        return (None, None, *found)


def _gradients(
    scale: float, hidden: Tensor, tensors: tuple[Tensor, ...], found: tuple[Tensor, ...]
) -> None:
    """Writes dq, dk, dv of q, k, v, do, all [M, L, D]."""
    (q, k, v, do), (dq, dk, dv) = tensors, found
    weights = torch.baddbmm(hidden, q, k.mT, alpha=scale)
    torch.softmax(weights, dim=-1, out=weights)
    torch.bmm(weights.mT, do, out=dv)
    ds = torch.bmm(do, v.mT)
    torch.ops.aten._softmax_backward_data.out(ds, weights, -1, ds.dtype, grad_input=ds)
    torch.baddbmm(dq, ds, k, beta=0, alpha=scale, out=dq)
    torch.baddbmm(dk, ds.mT, q, beta=0, alpha=scale, out=dk)


def attend_whole(hidden: Tensor, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o [B, Lq, Hq, D] of q [B, Lq, Hq, D], k and v [B, Lk, Hkv, D]."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    # The fused kernel reads rows of D neighbouring elements only.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        o: Tensor = WholeAttention.apply(scale, hidden, q, k, v)  # type: ignore[no-untyped-call]
    else:
        o = _FUSED(q, k, v, 0.0, False, attn_mask=hidden, scale=scale)[0]
    return o.transpose(1, 2)
