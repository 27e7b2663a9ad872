"""The attention function that transformers calls in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import PatternError, RefusedError
from foveal.patterns import Causal, Dense, Extent, Pattern, Sliding
from foveal.scores import Bias, KeyBias, Score, Softmax

NAME = "foveal"


class Chooser(Protocol):
    """Finds the pairs to keep in q and k of one layer."""

    def __call__(self, q: Tensor, k: Tensor) -> Pattern: ...


@dataclass(frozen=True)
class Selected:
    """What `use` asks of one layer beside what the layer itself says: fewer pairs.

    `pattern` gives the pairs of a sequence of some length; `chooser` finds them in q and k, where a
    whole sequence is read.
    """

    pattern: Callable[[int], Pattern] | None = None
    chooser: Chooser | None = None


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


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, exact unless `use` chose fewer pairs for it.

    Shapes: query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D]; returns [B, Lq, Hq, D] and no weights.
    attention_mask: what `masks.visibility` returns, or a mask [B, 1 or Hq, Lq, Lk] of the caller.
    """
    _refuse(dropout, options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    score: Score = Softmax(scale=scaling, soft_cap=softcap, sink=s_aux)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    call = LayerCall(q, k, v, _own_pattern(bool(causal), sliding_window), score)
    if attention_mask is not None and attention_mask.dim() == 4:
        call = replace(call, pattern=Dense(), score=score + Bias(_additive(attention_mask, k)))
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        call = replace(call, padding=attention_mask[:, -k.shape[1] :])
    elif attention_mask is not None:
        call = replace(call, documents=attention_mask)
    selected = getattr(module, "_foveal_selected", None)
    stored = module.__dict__.pop("_foveal_layer", None)
    if stored is not None:
        return stored.attend(call, selected).contiguous(), None
    return solve(call if selected is None else fewer(call, selected)).contiguous(), None


def _refuse(dropout: float, options: dict[str, Any]) -> None:
    reason = None
    if dropout > 0:
        reason = f"it drops no weights at random (dropout {dropout}); set attention_dropout to 0"
    elif options.get("output_attentions"):
        reason = "it never forms the weights that output_attentions asks for"
    elif options.get("position_bias") is not None:
        reason = "this model adds a position bias of its own inside the layer"
    elif options.get("cache") is not None:
        reason = "continuous batching keeps its own pages; call generate instead"
    if reason is not None:
        raise RefusedError(NAME, reason)


def _own_pattern(causal: bool, window: int | None) -> Pattern:
    if window is None:
        return Causal() if causal else Dense()
    return Sliding(window - 1) if causal else Sliding(window, window)


def _additive(mask: Tensor, k: Tensor) -> Tensor:
    """A mask of the caller [B, H, Lq, >= Lk] as terms of the score."""
    mask = mask[..., : k.shape[1]]
    if mask.dtype != torch.bool:
        return mask
    hidden = torch.zeros(mask.shape, dtype=torch.promote_types(k.dtype, torch.float32))
    return hidden.to(k.device).masked_fill_(~mask, -torch.inf)


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


def fewer(call: LayerCall, selected: Selected) -> LayerCall:
    """The call with the pairs that `selected` leaves of it."""
    if selected.pattern is None:
        if selected.chooser is None or not call.reads_a_whole or call.documents is not None:
            return call
        return replace(call, pattern=selected.chooser(call.q, call.k) & call.pattern)
    kept = selected.pattern(call.k.shape[1]) & call.pattern
    if call.reads_a_whole:
        return replace(call, pattern=kept)
    try:
        kept.validate(Extent((call.q.shape[1],), (call.k.shape[1],)))
    except PatternError:
        return _last_rows(call, selected.pattern)
    return replace(call, pattern=kept)


def _last_rows(call: LayerCall, pattern: Callable[[int], Pattern]) -> LayerCall:
    """The last queries of the sequence so far, for patterns that need a query for every key."""
    Lq, Lk = call.q.shape[1], call.k.shape[1]
    lengths = [Lk] if call.padding is None else call.padding.sum(-1).tolist()
    terms = torch.full((len(lengths), 1, Lq, Lk), -torch.inf)
    for row, length in enumerate(lengths):
        extent = Extent((length,), (length,))
        q_pos = torch.arange(length - min(Lq, length), length)
        kept = pattern(length) & call.pattern
        visible = kept.allows(q_pos[:, None], torch.arange(length)[None], extent)
        terms[row, 0, Lq - len(q_pos) :, Lk - length :].masked_fill_(visible, 0.0)
    return replace(call, pattern=Dense(), score=call.score + Bias(terms.to(call.q.device)))
