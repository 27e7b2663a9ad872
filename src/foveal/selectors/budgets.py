"""Budgets B1-B9: which of the scored blocks are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal._arguments import finite
from foveal._errors import SelectionError
from foveal._shares import share_of
from foveal.engines.tile.rows import best, heaviest
from foveal.selectors.base import Budget, Tiling


@dataclass(frozen=True, slots=True)
class TopK:
    """B1: the `blocks` best of every tile; ties go to the lower block."""

    blocks: int

    def __post_init__(self) -> None:
        _whole("blocks", self.blocks)

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        return best(scores, torch.full_like(scores[..., :1], self.blocks))


@dataclass(frozen=True, slots=True)
class TopRatio:
    """B2: of the n blocks that a tile may keep, the ceil(ratio n) best, 0 <= ratio <= 1."""

    ratio: float

    def __post_init__(self) -> None:
        _between("ratio", self.ratio)

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        allowed = (scores > -torch.inf).sum(-1, keepdim=True)
        return best(scores, share_of(allowed, self.ratio))


@dataclass(frozen=True, slots=True)
class Mass:
    """B3: the shortest prefix of the sorted scores whose sum reaches `mass` of the whole, at least 1 block.

    Scores are shares >= 0, such as a softmax over blocks; a block is kept if those before it do not
    reach `mass` yet, so that rounding never leaves a tile without any, and never all in doubt.  +inf is kept
    and in no sum: the mass is that of the others.
    """

    mass: float

    def __post_init__(self) -> None:
        _between("mass", self.mass)

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        return heaviest(scores, self.mass)


@dataclass(frozen=True, slots=True)
class Threshold:
    """B4, and B5 where scores are relative to a local mass: every block whose score is above `value`."""

    value: float

    def __post_init__(self) -> None:
        if not isinstance(self.value, Real) or math.isnan(self.value):
            raise SelectionError("value", self.value, "a number is needed")

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        return scores > self.value


@dataclass(frozen=True, slots=True)
class Forced:
    """B6: the first `sinks` blocks and the `locals` last ones that a tile may see, then `budget`.

    locals counts back from the block of the tile's first query; those between it and the last query's are
    always kept.  `blocks` are kept by every tile.  counted: forced blocks are among those of a top-k
    budget (their scores become +inf); else they come on top of it.
    """

    budget: Budget
    sinks: int = 1
    locals: int = 1
    blocks: tuple[int, ...] = ()
    counted: bool = True

    def __post_init__(self) -> None:
        if not hasattr(self.budget, "keep"):
            raise SelectionError("budget", repr(self.budget), "a budget is needed")
        _whole("sinks", self.sinks)
        _whole("locals", self.locals)
        for block in self.blocks:
            _whole("blocks", block)

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        block = torch.arange(tiling.kv_blocks, device=scores.device)
        near = tiling.first(scores.device)[:, None] // tiling.kv_block - block
        forced = block < self.sinks
        if self.locals:
            forced = forced | (near < self.locals)
        for each in self.blocks:
            forced = forced | (block == each)
        forced = (forced & (scores > -torch.inf)).expand_as(scores)
        if self.counted:
            return self.budget.keep(scores.masked_fill(forced, torch.inf), tiling) | forced
        return self.budget.keep(scores, tiling) | forced


@dataclass(frozen=True, slots=True)
class PerHead:
    """B7: a budget of its own for every head of the scores, as a search found them."""

    budgets: tuple[Budget, ...]

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        if scores.shape[1] != len(self.budgets):
            raise SelectionError(
                "budgets", len(self.budgets), f"one for each of {scores.shape[1]} heads"
            )
        each = (b.keep(scores[:, h : h + 1], tiling) for h, b in enumerate(self.budgets))
        return torch.cat(list(each), dim=1)


@dataclass(frozen=True, slots=True)
class Projection:
    """B8: the blocks with p > 0 in the projection of the scores onto 0 <= p <= 1, sum p = blocks."""

    blocks: float

    def __post_init__(self) -> None:
        if not finite(self.blocks) or self.blocks < 0:
            raise SelectionError("blocks", self.blocks, "a number of at least 0 is needed")

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        return self.shares(scores) > 0

    def shares(self, scores: Tensor) -> Tensor:
        """p = clip(scores - tau, 0, 1) with sum p = min(blocks, allowed); 0 where the score is -inf."""
        allowed = scores > -torch.inf
        low = scores.masked_fill(~allowed, torch.inf).amin(-1, keepdim=True) - 1
        high = scores.amax(-1, keepdim=True)
        goal = allowed.sum(-1, keepdim=True).clamp(max=self.blocks).to(scores.dtype)
        for _ in range(60 if scores.dtype == torch.float64 else 40):
            middle = (low + high) / 2
            above = (scores - middle).clamp(0, 1).sum(-1, keepdim=True) > goal
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (scores - (low + high) / 2).clamp(0, 1).masked_fill(~allowed, 0.0)


@dataclass(frozen=True, slots=True)
class Levels:
    """B9: how coarsely a block is read, by the rank of its score: 1 exactly, h pooled by h, 0 not at all.

    shares: (level, share of the allowed blocks up to which it reaches), ascending; the rest is skipped.
    Paper: Pyramid Sparse Attention (2512.04025), default table.
    """

    shares: tuple[tuple[int, float], ...] = field(default=((1, 0.1), (2, 0.15), (8, 0.35)))

    def __post_init__(self) -> None:
        check_levels(self.shares)

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        return self.levels(scores) > 0

    def levels(self, scores: Tensor) -> Tensor:
        """uint8 like scores."""
        allowed = scores > -torch.inf
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
        )
        count = allowed.sum(-1, keepdim=True)
        found = torch.zeros_like(scores, dtype=torch.uint8)
        for level, share in reversed(self.shares):
            found = torch.where(rank < share_of(count, share), level, found)
        return found.masked_fill(~allowed, 0)


def check_levels(levels: Sequence[tuple[int, float]]) -> None:
    """Raises unless these are pairs (whole number from 1 up, share), of ascending shares from 0 to 1."""
    needed = "pairs (level of at least 1, share) with ascending shares from 0 to 1 are needed"
    if not isinstance(levels, Sequence) or not levels:
        raise SelectionError("levels", levels, needed)
    reached = 0.0
    for pair in levels:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise SelectionError("levels", levels, needed)
        level, share = pair
        if not isinstance(level, int) or level < 1 or not finite(share):
            raise SelectionError("levels", levels, needed)
        if not reached <= share <= 1:
            raise SelectionError("levels", levels, needed)
        reached = share


def load_plan(path: str | Path) -> Mapping[str, Any]:
    """A plan of heads from JSON: {"layer": [[name, options of head 0], ...], ...}, for `PerHead`."""
    plan: Mapping[str, Any] = json.loads(Path(path).read_text())
    return plan


def save_plan(plan: Mapping[str, Sequence[Any]], path: str | Path) -> None:
    Path(path).write_text(json.dumps(plan, indent=1, sort_keys=True))


def _whole(name: str, value: object) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise SelectionError(name, value, "a whole number of at least 0 is needed")


def _between(name: str, value: object) -> None:
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise SelectionError(name, value, "a share between 0 and 1 is needed")
