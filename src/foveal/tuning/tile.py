"""Sizes of the portable tile kernels: looked up, never searched in a call.

`foveal tune` measures other sizes on a device; what it found goes before the shipped tables.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from foveal.tuning.config import Config
from foveal.tuning.store import Store
from foveal.tuning.tables import (
    BACKWARD_KV,
    BACKWARD_Q,
    EXCEPTIONS,
    FLOAT32,
    FORWARD,
    HALF,
    rows,
)

__all__ = [
    "BACKWARD_KV",
    "BACKWARD_Q",
    "FORWARD",
    "Config",
    "architecture",
    "choose_shapes",
    "forced",
    "forget_tuned",
    "kernel_name",
    "lookup",
    "measuring",
    "shapes",
    "shipped",
    "store",
]

Tile = tuple[int, int, int]
_LITTLE_SHARED_MEMORY = ((8, 6), (8, 9))
SIZES = (64, 128, 256)
"""Largest head_dim of each row of the tables."""

_INTERPRETED = Config(32, 16, 1, 1)


def architecture(device: torch.device) -> str:
    """The class of a device: a key of the tables, "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability in _LITTLE_SHARED_MEMORY or capability[0] >= 12:
        return "sm_86"
    return {8: "sm_80", 9: "sm_90"}.get(capability[0], "sm_100")


def kernel_name(stage: str, dim: int, dtype: torch.dtype, pattern: str | None = None) -> str:
    """What sizes are kept by, such as "forward/128/half", or "forward/128/half/causal" where they hold for
    one class of patterns; dim as in `lookup`."""
    name = f"{stage}/{_size(dim)}/{_kind(dtype)}"
    return name if pattern is None else f"{name}/{pattern}"


def _size(dim: int) -> int:
    return next(size for size in SIZES if dim <= size)


def _kind(dtype: torch.dtype) -> str:
    return FLOAT32 if dtype == torch.float32 else HALF


@functools.lru_cache(maxsize=1024)
def shipped(
    stage: str, architecture: str, dim: int, dtype: torch.dtype, pattern: str | None = None
) -> Config:
    """Sizes of one kernel from the shipped tables; arguments as of `lookup`, None for all patterns."""
    if architecture == "interpreter":
        return _INTERPRETED
    kind = _kind(dtype)
    if pattern is not None:
        own = EXCEPTIONS.get((architecture, kind, stage, _size(dim), pattern))
        if own is not None:
            return own
    return next(config for largest, config in rows(architecture, kind, stage) if dim <= largest)


def lookup(
    stage: str,
    architecture: str,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    pattern: str | None = None,
) -> Config:
    """Sizes of one kernel; dim is the larger of head_dim and value_dim, pattern a class of `tables`.

    On a device that was tuned the sizes measured there, else the shipped ones; those of the class of
    patterns before those of all patterns.  Blocks that a selection or a small problem demands are cut from
    these by the caller.
    """
    if stage in _FORCED:
        return _FORCED[stage]
    if device is not None and device.type == "cuda":
        found = _tuned(device, stage, dim, dtype, pattern)
        if found is not None:
            return found
    return shipped(stage, architecture, dim, dtype, pattern)


@functools.lru_cache(maxsize=1024)
def _tuned(
    device: torch.device, stage: str, dim: int, dtype: torch.dtype, pattern: str | None
) -> Config | None:
    stored = _stored(device)
    for own in (pattern, None):
        found = stored.get(kernel_name(stage, dim, dtype, own))
        if found is not None:
            return found
    return None


@functools.lru_cache(maxsize=16)
def _stored(device: torch.device) -> Mapping[str, Config]:
    return {
        kernel: found.config
        for kernel, found in store(device).read().items()
        if found.config is not None
    }


def forget_tuned() -> None:
    """Makes the next `lookup` read the stored sizes again."""
    _tuned.cache_clear()
    _stored.cache_clear()


def store(device: torch.device) -> Store:
    """Where sizes measured on this device are kept; they hold for these kernels and this compiler."""
    return Store(torch.cuda.get_device_name(device), _conditions())


@functools.cache
def _conditions() -> str:
    source = hashlib.sha256()
    engines = Path(__file__).parent.parent / "engines"
    for name in ("forward.py", "backward.py", "routes.py"):
        source.update((engines / "tile" / name).read_bytes())
    for name in ("softmax.py", "tiles.py"):
        source.update((engines / "common" / name).read_bytes())
    return f"triton {importlib.metadata.version('triton')}, kernels {source.hexdigest()[:12]}"


_FORCED: dict[str, Config] = {}


@contextlib.contextmanager
def forced(stage: str, config: Config) -> Iterator[None]:
    """Within it, `lookup` answers `config` for one stage, whatever the problem: for measuring."""
    before = dict(_FORCED)
    _FORCED[stage] = config
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


def measuring() -> bool:
    """Whether sizes are forced, so that launches prepared earlier must not be repeated."""
    return bool(_FORCED)


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
