"""One softmax out of several over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._errors import ShapeError


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention of the same queries over the union of disjoint key sets.

    lse = log(sum_n exp(lse_n)),  o = sum_n exp(lse_n - lse) o_n.

    Shapes: outputs[n] [..., H, Dv] and lses[n] [..., H], any number of both, at least one; returns o
    in their dtype and lse in that of the lses.  Computed in float32, or float64 where an output is;
    gradients flow into every output and every lse, so that each branch sees the merged softmax.
    Limits: a row that no branch sees gives o = 0, lse = -inf and gradient 0.
    Equals: one call of `attend` over the concatenated keys.
    """
    if not outputs or len(outputs) != len(lses):
        raise ShapeError(
            "outputs", f"{len(outputs)} with {len(lses)} lses", "as many of both are needed"
        )
    for o, lse in zip(outputs, lses, strict=True):
        if o.shape != outputs[0].shape or lse.shape != o.shape[:-1]:
            raise ShapeError(
                "outputs",
                f"{list(o.shape)} with lse {list(lse.shape)}",
                f"outputs of {list(outputs[0].shape)}, each with an lse of its first axes",
            )
    wide = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(wide) for lse in lses])
    largest = parts.detach().amax(0)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weights = torch.exp(parts - largest)
    total = weights.sum(0)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    terms = (o.to(wide) * (w / safe)[..., None] for o, w in zip(outputs, weights, strict=True))
    first, *others = terms
    o = sum(others, first).to(outputs[0].dtype)
    lse = torch.where(empty, -torch.inf, safe.log() + largest)
    return o, lse.to(lses[0].dtype)
