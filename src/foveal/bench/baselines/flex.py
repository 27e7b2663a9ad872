"""PyTorch's FlexAttention, compiled, with mask functions as its users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveal.bench.baselines.base import (
    Competitor,
    Inputs,
    Prepared,
    heads_first,
    heads_last,
    plain_softmax,
    scale_of,
)
from foveal.patterns import Blocks, Extent, Intersection, Pattern, Union
from foveal.patterns.base import FULL, PARTIAL
from foveal.patterns.documents import Packed

if TYPE_CHECKING:
    from foveal.bench.cases import Case

_BLOCK = 128

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Flex(Competitor):
    """Tokens in raster order, blocks of 128, compiled once per case with static shapes.

    Documents are looked up by the owner of a token, block lists in a table; the lists of blocks come
    from the pattern's own tile map, which spares the matrix of all pairs that `create_block_mask` makes.
    """

    name = "flex"
    title = "FlexAttention, compiled"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        if case.pattern.depends_on_data and not isinstance(case.pattern, Blocks):
            return "its adapter writes static patterns and block lists, not both joined"
        return plain_softmax(case)

    def refuses_backward(self, case: Case, device: torch.device) -> str | None:
        if device.type == "cpu":
            return "FlexAttention has no backward on CPU"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        q, k, v = (heads_first(tensor) for tensor in inputs)
        extent = case.extent
        # Dynamo counts recompilations per function and stops compiling after a few shapes.
        torch.compiler.reset()
        states = _states(case, q.device)
        partial, full = (_listed(states == kind) for kind in (PARTIAL, FULL))
        mask = BlockMask.from_kv_blocks(
            *partial,
            *full,
            BLOCK_SIZE=_BLOCK,
            mask_mod=mask_function(case.pattern, extent, case.q_heads, q.device),
            seq_lengths=(extent.Lq, extent.Lk),
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        scale, grouped = scale_of(case), case.q_heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
            return out

        lists = [tensor for tensor in mask.as_tuple() if isinstance(tensor, Tensor)]
        held = sum(tensor.nbytes for tensor in lists)
        return Prepared((q, k, v), attend, heads_last(case), held_bytes=held)


def mask_function(pattern: Pattern, extent: Extent, q_heads: int, device: torch.device) -> Mask:
    """The pattern as a function of indices (batch, head, query, key)."""
    if isinstance(pattern, Blocks):
        return _listed_blocks(pattern, extent, q_heads, device)
    if isinstance(pattern, Packed):
        return _documents(pattern, device)
    if isinstance(pattern, Union | Intersection):
        either = isinstance(pattern, Union)
        members = [mask_function(p, extent, q_heads, device) for p in pattern.members]

        def joined(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = members[0](b, h, q, k)
            for member in members[1:]:
                seen = seen | member(b, h, q, k) if either else seen & member(b, h, q, k)
            return seen

        return joined

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.allows(q, k, extent)

    return allowed


def _documents(pattern: Packed, device: torch.device) -> Mask:
    lengths = torch.tensor(pattern.lengths)
    first = lengths.cumsum(0) - lengths
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    start = torch.repeat_interleave(first, lengths).to(device)
    longest = Extent((max(pattern.lengths),), (max(pattern.lengths),))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = pattern.inner.allows(q - start[q], k - start[k], longest)
        return (owner[q] == owner[k]) & inside

    return visible


def _listed_blocks(pattern: Blocks, extent: Extent, q_heads: int, device: torch.device) -> Mask:
    selection = pattern.selection
    table = selection.block_mask(-(-extent.Lk // selection.kv_block))[0].to(device)
    shared = q_heads // len(table)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen: Tensor = table[h // shared, q // selection.q_block, k // selection.kv_block]
        return seen

    return visible


def _states(case: Case, device: torch.device) -> Tensor:
    """States of blocks of 128 x 128, [1, 1 or q_heads, q_blocks, kv_blocks]."""
    pattern, extent = case.pattern, case.extent
    if not isinstance(pattern, Blocks):
        return pattern.tile_map(extent, _BLOCK, _BLOCK)[None, None].to(device)
    selection = pattern.selection
    rows, columns = max(_BLOCK // selection.q_block, 1), max(_BLOCK // selection.kv_block, 1)
    unit = min(_BLOCK, selection.q_block), min(_BLOCK, selection.kv_block)
    fine = pattern.tile_map(extent, *unit)[0] == FULL
    height, width = (
        -(-n // size) * size for n, size in zip(fine.shape[1:], (rows, columns), strict=True)
    )
    padded = torch.zeros(len(fine), height, width, dtype=torch.bool)
    padded[:, : fine.shape[1], : fine.shape[2]] = fine.cpu()
    count = padded.unflatten(1, (-1, rows)).unflatten(3, (-1, columns)).sum((2, 4))
    states: Tensor = (count > 0).to(torch.uint8) + (count == rows * columns).to(torch.uint8)
    return states.repeat_interleave(case.q_heads // len(states), dim=0)[None].to(device)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks and their indices, those that count first."""
    order = torch.argsort(chosen.to(torch.uint8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1).to(torch.int32), order.to(torch.int32)
