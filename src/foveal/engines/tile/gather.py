"""Tokens of sub-problems out of the problem and back into it, by one kernel on a GPU.

PyTorch's own operations take more of the host's time than the attention itself on small problems, and
a call that holds them cannot be repeated as launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foveal.engines.common.tiles import load_rows, store_rows
from foveal.engines.tile.replay import launch

_ROWS = 64


@triton.jit
def tile_move(
    pairs, p_tokens, heads, parts, length,
    DIMS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a head: own = whole at `tokens` int64 [parts, length], or the reverse if not OUT.

    pairs: (whole [B, L, heads, D], its strides (batch, token, head), own [B parts, length, heads, D], its
    strides) of tensors that have the heads in common; DIMS: D of each and the power of two above it.
    """
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    h = (program % heads).to(tl.int64)
    n = program // heads // tiles
    row = program // heads % tiles * ROWS + tl.arange(0, ROWS)
    inside = row < length
    token = tl.load(p_tokens + n % parts * length + row, mask=inside, other=0)
    batch = (n // parts).to(tl.int64)
    for i in tl.static_range(len(DIMS)):
        there, here = pairs[i][1], pairs[i][3]
        p_there = pairs[i][0] + batch * there[0] + h * there[2] + token * there[1]
        p_here = pairs[i][2] + n.to(tl.int64) * here[0] + h * here[2] + row.to(tl.int64) * here[1]
        p_from, p_to = (p_there, p_here) if OUT else (p_here, p_there)
        moved = load_rows(p_from, inside, DIMS[i][0], DIMS[i][1], True)
        store_rows(p_to, moved, inside, DIMS[i][0], DIMS[i][1])


def take(tensors: Sequence[Tensor], tokens: Tensor) -> list[Tensor]:
    """Of each x [B, tokens, H, D], [B P, L, H, D] at tokens [P, L]; of x [B, H, tokens], [B P, H, L]."""
    rows, found = len(tensors[0]) * len(tokens), []
    for x in tensors:
        if x.dim() == 3:
            found.append(x.new_empty(rows, x.shape[1], tokens.shape[1]))
        else:
            found.append(x.new_empty(rows, tokens.shape[1], *x.shape[2:]))
    _move(
        [x if x.stride(-1) == 1 or x.dim() == 3 else x.contiguous() for x in tensors],
        found,
        tokens,
        True,
    )
    return found


def put(wholes: Sequence[Tensor], tokens: Tensor, own: Sequence[Tensor]) -> None:
    """The reverse of `take`: writes tensors `own` to the tokens of `wholes`."""
    _move(wholes, [x if x.stride(-1) == 1 else x.contiguous() for x in own], tokens, False)


def _move(wholes: Sequence[Tensor], own: Sequence[Tensor], tokens: Tensor, out: bool) -> None:
    pairs: list[Any] = []
    dims: list[tuple[int, int]] = []
    for pair in zip(wholes, own, strict=True):
        there, here = (x.transpose(1, 2)[..., None] if x.dim() == 3 else x for x in pair)
        D = here.shape[3]
        if D:
            pairs.append((there, there.stride()[:3], here, here.stride()[:3]))
            dims.append((D, 1 << (D - 1).bit_length()))
    (parts, length), entries = tokens.shape, len(own[0])
    heads = own[0].shape[1 if own[0].dim() == 3 else 2]
    programs = entries * -(-length // _ROWS) * heads
    if programs and pairs:
        launch(
            tile_move, (programs,), tuple(pairs), tokens, heads, parts, length,
            DIMS=tuple(dims), ROWS=_ROWS, OUT=out, num_warps=4,
        )  # fmt: skip
