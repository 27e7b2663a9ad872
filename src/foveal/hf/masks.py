"""What hides pairs beside the pattern of a layer: padding, documents, masks of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Rules of transformers that a layer's own window and direction already say.
_SAID_BY_THE_LAYER = frozenset(
    {
        "causal_mask_function",
        "bidirectional_mask_function",
        "sliding_window_overlay.<locals>.inner_mask",
        "sliding_window_bidirectional_overlay.<locals>.inner_mask",
    }
)
_BOTH = "and_masks.<locals>.and_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_WITHIN = "remap_positions_for_packed_sequence.<locals>.inner_mask"


def visibility(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask that transformers hands to the attention function "foveal", once per kind of layer.

    Returns None where the pattern of the layer says all; bool [B, Lk], False at padding; int64 [B, L],
    the document of every token; or bool [B, 1, Lq, Lk] for a rule that is none of these.
    """
    rules = list(_rules(mask_function))
    documents = [held["packed_sequence_mask"] for name, held in rules if name == _PACKED]
    known = all(name in _SAID_BY_THE_LAYER or name == _PACKED for name, _ in rules)
    ends_together = int(q_offset) + q_length == kv_offset + kv_length
    if not known or not ends_together or len(documents) > 1:
        return _every_pair(
            **options,
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
        )
    if documents:
        numbers: Tensor = documents[0].long()
        return numbers
    if attention_mask is None:
        return None
    seen = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if seen.shape[1] < kv_length:
        seen = torch.nn.functional.pad(seen, (0, kv_length - seen.shape[1]))
    return None if bool(seen.all()) else seen


def _rules(function: Callable[..., Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and held values of every rule that a mask function is made of."""
    if function is None:
        return
    name = getattr(function, "__qualname__", "")
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    names = () if code is None else code.co_freevars
    held = dict(zip(names, (cell.cell_contents for cell in cells or ()), strict=True))
    if name == _BOTH:
        for part in held["mask_functions"]:
            yield from _rules(part)
    elif name == _WITHIN:
        yield from _rules(held["mask_function"])
    else:
        yield name, held


def _every_pair(**arguments: Any) -> Tensor:
    from transformers.masking_utils import sdpa_mask

    arguments["allow_is_causal_skip"] = False
    arguments["allow_is_bidirectional_skip"] = False
    mask: Tensor | None = sdpa_mask(**arguments)
    assert mask is not None
    return mask
