"""The attention function that transformers calls in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveal._errors import RefusedError
from foveal.hf.layer_call import LayerCall, solve
from foveal.hf.prefill import NAME
from foveal.patterns import Causal, Dense, Pattern, Sliding
from foveal.scores import Bias, Score, Softmax


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
    call = LayerCall(q, k, v, _own_pattern(module, bool(causal), sliding_window), score)
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
    o = solve(call) if selected is None else selected.solve(call)
    return o.contiguous(), None


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


def _own_pattern(module: Any, causal: bool, window: int | None) -> Pattern:
    if window is None:
        return Causal() if causal else Dense()
    if causal:
        return Sliding(window - 1)
    # Masks of both ways are made from the configuration; some layers hold one more than it says.
    window = getattr(getattr(module, "config", None), "sliding_window", window)
    return Sliding(window, window)


def _additive(mask: Tensor, k: Tensor) -> Tensor:
    """A mask of the caller [B, H, Lq, >= Lk] as terms of the score."""
    mask = mask[..., : k.shape[1]]
    if mask.dtype != torch.bool:
        return mask
    hidden = torch.zeros(mask.shape, dtype=torch.promote_types(k.dtype, torch.float32))
    return hidden.to(k.device).masked_fill_(~mask, -torch.inf)
