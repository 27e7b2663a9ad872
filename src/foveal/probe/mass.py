"""How much of the softmax a pattern keeps, measured on real q, k and v.

The share of row i's softmax that a pattern keeps is exp(lse_i(pattern) - lse_i(all)): two calls of
`attend`, no L x L matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import SelectionError
from foveal.patterns import BlockSelection, Causal, Extent, Pattern
from foveal.scores import Score, Softmax

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Kept:
    """What is left of attention when a pattern takes pairs away.

    Shapes: mass, error, keys [B, Hq].  mass: share of the softmax that falls on kept pairs, mean
    over the rows, 0 to 1.  error: |o - o_kept| / |o| over all rows of a head.  keys: kept pairs
    per row, mean over the rows.
    """

    mass: Tensor
    error: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Whole:
    """Attention before anything is taken away, to compare several patterns with."""

    o: Tensor
    lse: Tensor
    within: Pattern


def whole(
    q: Tensor, k: Tensor, v: Tensor, score: Score = Softmax(), within: Pattern = Causal()
) -> Whole:
    """Attention over all pairs of `within`, in float32 or better."""
    o, lse = attend(q, k, v, within, score, return_lse=True)
    return Whole(o, lse, within)


def kept_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    score: Score = Softmax(),
    within: Pattern | Whole = Causal(),
) -> Kept:
    """Softmax mass that `pattern & within` keeps of `within`, and what that does to the output.

    mass = mean_i exp(lse_i(pattern & within) - lse_i(within)).

    Shapes: q [B, *grid, Hq, D], k [B, *grid, Hkv, D], v [B, *grid, Hkv, Dv] as in `attend`.
    Options: within, what the pattern is compared with; a `Whole` where several patterns share it.
    Cost: one `attend` per pattern, and one for `within`.
    Equals: pattern = within keeps mass 1 at error 0.
    Limits: rows that see no key in `within` are left out of the mean of the mass.
    """
    everything = within if isinstance(within, Whole) else whole(q, k, v, score, within)
    kept = pattern & everything.within
    o, lse = attend(q, k, v, kept, score, return_lse=True)
    share = torch.exp(lse.double() - everything.lse.double()).flatten(1, -2)  # [B, Lq, Hq]
    exact = everything.o.flatten(1, -3).double()
    lost = exact - o.flatten(1, -3).double()
    extent = Extent(tuple(q.shape[1:-2]), tuple(k.shape[1:-2]))
    return Kept(
        mass=share.nanmean(1),
        error=lost.norm(dim=(1, 3)) / exact.norm(dim=(1, 3)),
        keys=_of_heads(keys_per_row(kept, extent), q.shape[-2]).expand(q.shape[0], q.shape[-2]),
    )


def _of_heads(keys: Tensor, heads: int) -> Tensor:
    """Counts of the query heads, where they are those of the key heads."""
    if keys.dim() < 2 or keys.shape[1] in (1, heads):
        return keys
    return keys.repeat_interleave(heads // keys.shape[1], dim=1)


def keys_per_row(pattern: Pattern, extent: Extent) -> Tensor:
    """Visible pairs divided by rows, [] or [B or 1, Hq or 1] where the pattern depends on data."""
    k_pos = extent.k_positions()[None]
    pairs = torch.zeros((), dtype=torch.int64)
    for q_pos in extent.q_positions().split(_ROWS_AT_ONCE):
        pairs = pairs + pattern.allows(q_pos[:, None], k_pos, extent).sum((-2, -1))
    return pairs.double() / max(extent.Lq, 1)


def block_mass(
    q: Tensor,
    k: Tensor,
    pattern: Pattern = Causal(),
    score: Score = Softmax(),
    block: int = 64,
) -> Tensor:
    """Softmax mass of every pair of blocks, mean over the queries of a block: [B, Hq, blocks, blocks].

    The values are one-hot vectors of the key's block, so that the output of attention is the mass per
    block, whatever the pattern and the score.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D].  Cost: one `attend` with Dv = Lk / block.
    """
    owner = torch.arange(k.shape[1], device=k.device) // block
    one_hot = torch.nn.functional.one_hot(owner, -(-k.shape[1] // block)).to(k.dtype)
    v = one_hot[None, :, None].expand(*k.shape[:3], -1)
    per_row = attend(q, k, v, pattern, score).transpose(1, 2)  # [B, Hq, Lq, blocks]
    return torch.stack([rows.mean(-2) for rows in per_row.split(block, dim=-2)], dim=-2)


def heaviest_blocks(mass: Tensor, count: int, block: int = 64) -> BlockSelection:
    """The `count` key blocks of largest mass for every query block and head.

    With the mass of the exact softmax this is an oracle: no selection of as many blocks keeps more,
    and finding it costs more than it saves.  It bounds what a real selector can reach.
    Shapes: mass [B, Hq, q_blocks, kv_blocks] as `block_mass` returns it.
    """
    if count < 1:
        raise SelectionError("count", count, "at least 1 block is needed")
    chosen = mass.topk(min(count, mass.shape[-1]), dim=-1).indices
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, chosen, True)
    return BlockSelection.from_block_mask(kept & (mass > 0), block, block)
