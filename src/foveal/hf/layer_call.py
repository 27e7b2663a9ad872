"""One call of one layer, in the words of this library, and its exact attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.patterns import Pattern
from foveal.scores import KeyBias, Score


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer, in the words of this library.

    Shapes: q [B, Lq, Hq, D], k and v [B, Lk, Hkv, D]; the last query stands at the last key.
    padding: bool [B, Lk], False at padding.  documents: int64 [B, L].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    score: Score
    padding: Tensor | None = None
    documents: Tensor | None = None

    @property
    def reads_a_whole(self) -> bool:
        """Whether every key has its query."""
        return self.q.shape[1] == self.k.shape[1]


def solve(call: LayerCall, return_lse: bool = False) -> Any:
    """o [B, Lq, Hq, Dv] of a call, or (o, lse); rows at padding are 0, or what their keys give."""
    if call.documents is not None:
        return _packed(call, *_cut(call.documents), return_lse)
    if call.padding is None:
        return attend(call.q, call.k, call.v, call.pattern, call.score, return_lse=return_lse)  # type: ignore[call-overload]
    if call.reads_a_whole and _in_one_piece(call.padding):
        return _packed(call, *_real(call.padding), return_lse)
    score = call.score + KeyBias(hidden_keys(call.padding, call.k.dtype))
    return attend(call.q, call.k, call.v, call.pattern, score, return_lse=return_lse)  # type: ignore[call-overload]


def hidden_keys(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, Lk]: 0 at real keys, -inf at padding."""
    wide = torch.promote_types(dtype, torch.float32)
    terms = torch.zeros(padding.shape, dtype=wide, device=padding.device)
    return terms.masked_fill_(~padding, -torch.inf)[:, None]


def _in_one_piece(padding: Tensor) -> bool:
    """Whether the real tokens of every row are neighbours."""
    starts = padding & ~torch.nn.functional.pad(padding[:, :-1], (1, 0))
    return bool((starts.sum(-1) <= 1).all())


def _real(padding: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the real tokens in B x L, and the offsets of the rows among them."""
    counts = torch.nn.functional.pad(padding.sum(-1).cumsum(0), (1, 0))
    return padding.flatten().nonzero()[:, 0], counts.to(torch.int32)


def _cut(documents: Tensor) -> tuple[Tensor, Tensor]:
    """All places of B x L, and the offsets of the documents among them."""
    numbers = (
        documents
        + documents.shape[1] * torch.arange(len(documents), device=documents.device)[:, None]
    )
    _, counts = numbers.flatten().unique_consecutive(return_counts=True)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return torch.arange(documents.numel(), device=documents.device), offsets


def _packed(call: LayerCall, places: Tensor, offsets: Tensor, return_lse: bool) -> Any:
    """The real tokens of all rows one behind the other: padding costs nothing."""
    q, k, v = (x.flatten(0, 1)[places][None] for x in (call.q, call.k, call.v))
    o, lse = (
        attend(q, k, v, call.pattern, call.score, cu_seqlens=offsets.cpu(), return_lse=True)
        if return_lse
        else (attend(q, k, v, call.pattern, call.score, cu_seqlens=offsets.cpu()), None)
    )
    B, L, H, _ = call.q.shape
    whole = o.new_zeros(B * L, H, o.shape[-1]).index_copy(0, places, o[0]).unflatten(0, (B, L))
    if lse is None:
        return whole
    empty = lse.new_full((B * L, H), -torch.inf).index_copy(0, places, lse[0])
    return whole, empty.unflatten(0, (B, L))
