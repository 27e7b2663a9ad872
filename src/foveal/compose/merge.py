"""One softmax out of several over disjoint sets of keys."""

from __future__ import annotations

import functools
import importlib.util
import os
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
    if _on_gpu(outputs, lses):
        from foveal.compose.merge_kernel import MergedPair

        merged = MergedPair.apply(outputs[0], lses[0], outputs[1], lses[1])  # type: ignore[no-untyped-call]
        pair: tuple[Tensor, Tensor] = merged
        return pair
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


def _on_gpu(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    """Whether one kernel can do it: elementwise operations move the outputs ten times instead of three."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if len(outputs) != 2 or not _has_kernel(outputs[0].device.type):
        return False
    kinds = {o.dtype for o in outputs}
    plain = len(kinds) == 1 and kinds <= {torch.bfloat16, torch.float16, torch.float32}
    return plain and all(lse.dtype == torch.float32 for lse in lses)


@functools.lru_cache(maxsize=8)
def _has_kernel(device: str) -> bool:
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    return (device == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None
