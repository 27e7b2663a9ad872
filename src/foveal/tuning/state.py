"""Tile sizes, warps and stages of the state engine's kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

CHUNK = 64
"""Tokens of a chunk: a power of two, at least 16."""

LEVELS = CHUNK.bit_length() - 1
"""log2 of CHUNK."""

REACH = 96
"""log2 of the decay inside a block of tokens that a factor of a product may undo."""

LEAST_PIECE = 16
"""Chunks of the shortest piece that a sequence of the delta rule is cut in."""

BULK_STAGES = 3
"""Chunks that bulk copies run ahead of the warps that multiply, of additive rules."""

WALK_STAGES = 4
"""As BULK_STAGES, of the walk of the delta rule."""

READ_STAGES = 3
"""As WALK_STAGES, of a walk that also reads o."""

LEAST_BULK_PIECE = 8
"""Chunks of the shortest piece of a scan by bulk copies without gradients."""

LEFT_CHUNKS = 4
"""Chunks of a program that looks for those that a kernel of `bulk_channels` left: few programs go fast
over what is done, many share what is left."""

STEP_TILE = 32
"""Value channels of a program of the decode step."""


@dataclass(frozen=True)
class Tuning:
    """v_tile, backward_v_tile: value channels of a walk, forward and backward; split_v_tile: of the walks
    of a sequence that is cut in pieces; bulk_v_tile, bulk_split_v_tile: the same with bulk copies;
    pairs_k_tile: key channels of a product inside a chunk; gradient_v_tile, gradient_k_tile:
    channels of the tiles of the gradients; channels, tokens: warps and registers of the kernels in
    `bulk_channels`, two and three programs on a multiprocessor; the rest: warps and stages of each
    kernel."""

    v_tile: int
    piece: int = 32
    gradient_tile: int = 128
    additive: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    queries: dict[str, int] = field(default_factory=lambda: {"num_warps": 8, "num_stages": 1})
    keys: dict[str, int] = field(default_factory=lambda: {"num_warps": 8, "num_stages": 1})
    backward_v_tile: int = 32
    pairs_k_tile: int = 128
    pairs_v_tile: int = 128
    gradient_v_tile: int = 64
    gradient_k_tile: int = 64
    pairs: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    channels: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})
    tokens: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "maxnreg": 168})
    walk: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    split_v_tile: int = 64
    bulk_v_tile: int = 32
    bulk_split_v_tile: int = 64
    split_walk: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    output: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    walk_backward: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    values_backward: dict[str, int] = field(
        default_factory=lambda: {"num_warps": 4, "num_stages": 1}
    )
    keys_backward: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 1})


def tuning(dtype: torch.dtype, head_dim: int, delta: bool, decay: int) -> Tuning:
    """What is used for a recurrence; the delta rule walks in narrow tiles, on more programs."""
    if _FORCED:
        return _FORCED[-1]
    wide = dtype == torch.float32 or head_dim > 128
    warps = 8 if decay == 3 or wide else 4
    walk = {"num_warps": 4, "num_stages": 2}
    v_tile = 32 if wide else 64
    pairs = {"num_warps": warps, "num_stages": 1}
    if delta and warps == 4 and torch.version.hip is None:
        pairs["maxnreg"] = 168  # three programs on a multiprocessor
    if delta:
        v_tile, walk = 16, {"num_warps": 4, "num_stages": 2 if wide else 4}
    elif not wide and decay < 3:
        v_tile = 64
    return Tuning(
        v_tile=v_tile,
        bulk_v_tile=16 if decay == 2 and head_dim > 64 else 32,
        split_v_tile=32 if wide else 64,
        gradient_tile=32 if wide else 128,
        gradient_v_tile=32 if wide else 64,
        gradient_k_tile=32 if wide else 64,
        pairs=pairs,
        walk=walk,
        backward_v_tile=16,
        keys_backward={"num_warps": 8, "num_stages": 1},
        values_backward={"num_warps": 8, "num_stages": 1},
    )


_FORCED: list[Tuning] = []


@contextlib.contextmanager
def forced(found: Tuning) -> Iterator[None]:
    """Within it, `tuning` answers `found`, whatever the recurrence: for measuring."""
    _FORCED.append(found)
    try:
        yield
    finally:
        _FORCED.pop()


def measuring() -> bool:
    """Whether tuning is forced: what is kept of earlier calls does not know of it."""
    return bool(_FORCED)


def piece_of(
    lengths: tuple[int, ...], columns: tuple[int, int], delta: bool, found: Tuning, processors: int
) -> int:
    """Chunks per piece of sequences of these lengths; `columns` = (value heads, key and value channels).

    Additive rules start all pieces at once.  The walks of the delta rule take three times the steps
    in pieces, since the maps of these come first: only long sequences of few heads, which leave most
    of the device idle, are split.
    """
    if not delta and found.piece > 0:
        return found.piece
    heads, channels = columns
    chunks = [-(-length // CHUNK) for length in lengths]
    if not delta:
        return _piece_of_bulk(chunks, heads, processors)
    longest = max(chunks, default=1)
    programs = heads * -(-channels // found.split_v_tile)
    each = max(-(-sum(chunks) * programs // (2 * processors)), LEAST_PIECE)
    return each if longest >= 6 * each else max(longest, 1)


def _piece_of_bulk(chunks: list[int], heads: int, processors: int) -> int:
    """Chunks per piece, so that there is one piece per multiprocessor, or one per sequence and head."""
    if heads * len(chunks) >= processors:
        return max(*chunks, 1)
    each = max(-(-sum(chunks) * heads // processors), LEAST_BULK_PIECE)
    while heads * sum(-(-count // each) for count in chunks) > processors:
        each += 1
    return each


def processors(device: str) -> int:
    """Multiprocessors of the current CUDA device; 1 on the CPU, where Triton's interpreter runs."""
    if device == "cpu" or not torch.cuda.is_available():
        return 1
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)
