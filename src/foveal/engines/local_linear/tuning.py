"""Tiles of the kernels, as measured on one H100; smaller ones where less fits."""

from __future__ import annotations

import torch

from foveal.tuning.config import Config
from foveal.tuning.tile import architecture

_HALF = {
    "moments": {64: Config(64, 64, 4, 4), 128: Config(64, 64, 4, 4), 256: Config(64, 32, 8, 2)},
    "solve": {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 2)},
    "output": {64: Config(64, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
    "adjoint": {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
    "backward_q": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2), 256: Config(32, 32, 8, 1)},
    "backward_kv": {
        64: Config(64, 128, 8, 1),
        128: Config(32, 128, 8, 2),
        256: Config(32, 32, 8, 1),
    },
}
_SINGLE = {64: Config(32, 32, 4, 1), 128: Config(32, 32, 4, 1), 256: Config(32, 16, 8, 1)}
_INTERPRETED = Config(32, 16, 1, 1)


def sizes(name: str, dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Tiles of a kernel; dim is the larger of head_dim and value_dim, at most 256."""
    if architecture(device) == "interpreter":
        return _INTERPRETED
    return shipped(name, dim, dtype)


def shipped(name: str, dim: int, dtype: torch.dtype) -> Config:
    """Tiles of a kernel on a GPU."""
    table = _SINGLE if dtype == torch.float32 else _HALF[name]
    return next(config for largest, config in table.items() if dim <= largest)
