"""Sizes of the portable tile kernels: one table per architecture class, looked up, never searched."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tile = tuple[int, int, int]


@dataclass(frozen=True)
class Config:
    """Tokens of a query tile and of a key tile, warps of a program, stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD, BACKWARD_Q, BACKWARD_KV = "forward", "backward_q", "backward_kv"

# By the larger of head_dim and value_dim, padded; each row holds up to the size it names.
_TABLES: dict[str, dict[str, tuple[tuple[int, Config], ...]]] = {
    "sm_80": {
        FORWARD: (
            (64, Config(128, 64, 4, 3)),
            (128, Config(128, 64, 8, 3)),
            (256, Config(64, 32, 4, 2)),
        ),
        BACKWARD_Q: (
            (64, Config(128, 64, 8, 2)),
            (128, Config(64, 64, 8, 2)),
            (256, Config(32, 32, 4, 1)),
        ),
        BACKWARD_KV: (
            (64, Config(64, 128, 8, 2)),
            (128, Config(64, 64, 8, 2)),
            (256, Config(32, 32, 4, 1)),
        ),
    },
    "sm_90": {
        FORWARD: (
            (64, Config(128, 128, 8, 3)),
            (128, Config(128, 128, 8, 2)),
            (256, Config(128, 64, 8, 2)),
        ),
        BACKWARD_Q: (
            (64, Config(128, 128, 8, 2)),
            (128, Config(128, 64, 8, 2)),
            (256, Config(64, 32, 8, 1)),
        ),
        BACKWARD_KV: (
            (64, Config(64, 128, 8, 2)),
            (128, Config(64, 128, 8, 2)),
            (256, Config(32, 64, 8, 1)),
        ),
    },
    "gfx942": {
        FORWARD: (
            (64, Config(128, 64, 4, 2)),
            (128, Config(128, 64, 4, 1)),
            (256, Config(64, 32, 4, 1)),
        ),
        BACKWARD_Q: (
            (64, Config(64, 64, 4, 1)),
            (128, Config(64, 64, 4, 1)),
            (256, Config(32, 32, 4, 1)),
        ),
        BACKWARD_KV: (
            (64, Config(64, 64, 4, 1)),
            (128, Config(64, 64, 4, 1)),
            (256, Config(32, 32, 4, 1)),
        ),
    },
}
_TABLES["sm_100"] = _TABLES["sm_90"]
_FLOAT32 = ((64, Config(64, 32, 4, 2)), (128, Config(32, 32, 4, 2)), (256, Config(16, 32, 4, 1)))
_INTERPRETED = Config(32, 16, 1, 1)


def architecture(device: torch.device) -> str:
    """The class of a device: a key of the tables, "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


def lookup(stage: str, architecture: str, dim: int, dtype: torch.dtype) -> Config:
    """Sizes of one kernel; dim is the larger of head_dim and value_dim.

    Blocks that a selection or a small problem demands are cut from these by the caller.
    """
    if architecture == "interpreter":
        return _INTERPRETED
    table = _FLOAT32 if dtype == torch.float32 else _TABLES[architecture][stage]
    return next(config for largest, config in table if dim <= largest)


def shapes(size: int, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Boxes of `size` tokens (a power of two) whose sides are powers of two, none twice its axis."""
    sides = [2**power for power in range(int(math.log2(size)) + 1)]
    boxes = [box for box in itertools.product(sides, repeat=len(lengths)) if math.prod(box) == size]
    fitting = [box for box in boxes if all(s < 2 * n for s, n in zip(box, lengths, strict=True))]
    return fitting or boxes


def choose_shapes(
    lower: Sequence[Tensor], upper: Sequence[Tensor], lengths: Sequence[int], own: int, other: int
) -> tuple[Tile, Tile]:
    """The shapes of own and other tiles that visit the fewest boxes.

    Own token i sees lower[a][i] <= j < upper[a][i] on axis a of `lengths` tokens.
    """
    axes = range(len(lower))

    @functools.cache
    def boxes(axis: int, own_side: int, other_side: int) -> int:
        low, high = lower[axis], upper[axis]
        first = torch.arange(0, len(low), own_side)
        last = (first + own_side).clamp(max=len(low)) - 1
        span = (high[last] - low[first]).clamp(min=0)
        return int(((span + other_side - 1) // other_side).sum())

    own_shapes = shapes(own, [len(axis) for axis in lower])
    other_shapes = shapes(other, lengths)
    best = min(
        itertools.product(own_shapes, other_shapes),
        key=lambda pair: (math.prod(boxes(a, pair[0][a], pair[1][a]) for a in axes), pair[0]),
    )
    return _in_three(best[0]), _in_three(best[1])


def _in_three(box: tuple[int, ...]) -> Tile:
    x, y, z = (1,) * (3 - len(box)) + box
    return x, y, z
