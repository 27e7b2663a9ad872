"""SHI-Labs' NATTEN: neighborhoods with shifted borders, in one to three dimensions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.bench.baselines.base import Competitor, Inputs, Prepared, plain_softmax, scale_of
from foveal.patterns import Neighborhood, Sliding

if TYPE_CHECKING:
    from foveal.bench.cases import Case


class Natten(Competitor):
    """`na1d`, `na2d`, `na3d`; a one-sided sliding window is its causal one-dimensional case."""

    name = "natten"
    title = "NATTEN"
    package = "natten"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        if plain_softmax(case):
            return plain_softmax(case)
        if _arguments(case) is None:
            return f"it has no {case.pattern.key}"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        natten = importlib.import_module("natten")
        operator = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(case.grid)]
        arguments = (_arguments(case) or {}) | {"scale": scale_of(case)}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = operator(q, k, v, **arguments)
            return out

        q, k, v = (tensor.contiguous() for tensor in inputs)
        return Prepared((q, k, v), attend)


def _arguments(case: Case) -> dict[str, Any] | None:
    pattern = case.pattern
    if (
        isinstance(pattern, Sliding)
        and pattern.left > 0
        and not (pattern.right or pattern.sink_tokens)
    ):
        return {"kernel_size": min(pattern.left + 1, case.tokens), "is_causal": True}
    if not isinstance(pattern, Neighborhood):
        return None
    borders = pattern.border if isinstance(pattern.border, tuple) else (pattern.border,)
    windows = pattern.window if isinstance(pattern.window, tuple) else (pattern.window,)
    if set(borders) != {"shift"} or min(windows) < 2:
        return None
    return {
        "kernel_size": pattern.window,
        "stride": pattern.stride,
        "dilation": pattern.dilation,
        "is_causal": pattern.causal,
    }
