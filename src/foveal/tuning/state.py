"""Tile sizes, warps and stages of the state engine's kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk: a power of two, at least 16."""

LEVELS = CHUNK.bit_length() - 1
"""log2 of CHUNK."""


DELTA_TILE = 32
"""Value channels of a walk of the delta rule."""

STEP_TILE = 32
"""Value channels of a program of the decode step."""


@dataclass(frozen=True)
class Tuning:
    """v_tile, backward_v_tile: value channels of a walk, forward and backward; pairs_k_tile: key channels
    of a product inside a chunk; gradient_v_tile, gradient_k_tile: channels of the tiles of the
    gradients; the rest: warps and stages of each kernel."""

    v_tile: int
    backward_v_tile: int = 32
    pairs_k_tile: int = 128
    gradient_v_tile: int = 64
    gradient_k_tile: int = 64
    pairs: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    walk: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    output: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    walk_backward: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    values_backward: dict[str, int] = field(
        default_factory=lambda: {"num_warps": 4, "num_stages": 1}
    )
    keys_backward: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 1})


def tuning(q: Tensor, v: Tensor, delta: bool, decay: int) -> Tuning:
    """What is used for a recurrence; the delta rule walks in narrow tiles, on more programs."""
    wide = q.dtype == torch.float32 or q.shape[-1] > 128
    warps = 8 if decay == 3 or wide else 4
    walk = {"num_warps": 4, "num_stages": 2}
    v_tile = 32 if wide else 64
    if delta:
        v_tile = DELTA_TILE // 2 if wide else DELTA_TILE
    elif not wide and decay < 3:
        v_tile, walk = 128, {"num_warps": 8, "num_stages": 2}
    return Tuning(
        v_tile=v_tile,
        gradient_v_tile=32 if wide else 64,
        gradient_k_tile=32 if wide else 64,
        pairs={"num_warps": warps, "num_stages": 1},
        walk=walk,
        backward_v_tile=16 if wide else 32,
        keys_backward={"num_warps": 8, "num_stages": 1},
        values_backward={"num_warps": 8, "num_stages": 1},
    )
