"""lucidrains' local-attention: windows that look around, in one dimension."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from foveal.patterns import Causal, Intersection, Partition, Pattern, Sliding

if TYPE_CHECKING:
    from foveal.bench.cases import Case

_LEAST_WINDOW = 16
"""Tokens; a reach cut in smaller windows would time the cutting."""


@dataclass(frozen=True)
class _Windows:
    """Query i sees the windows floor(i / size) - backward to floor(i / size) + forward.

    `exact` cuts them to i - size backward <= j <= i + size forward, `causal` to j <= i.
    """

    size: int
    backward: int
    forward: int
    causal: bool
    exact: bool


class LocalAttention(Competitor):
    """`LocalAttention` without rotary embeddings, where it can say exactly what the case says."""

    name = "local_attention"
    title = "local-attention"
    package = "local_attention"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        if plain_softmax(case):
            return plain_softmax(case)
        if len(case.grid) != 1:
            return "it has one axis only"
        if case.q_heads != case.kv_heads:
            return "it needs as many key heads as query heads"
        windows = _windows(case.pattern, case.tokens)
        if windows is None:
            return f"it has no {case.pattern.key}"
        if case.tokens % windows.size or windows.size < _LEAST_WINDOW:
            return (
                f"its windows must divide the length and the reach: for {case.pattern.key} on "
                f"{case.tokens} tokens that leaves windows of {windows.size}"
            )
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        package = importlib.import_module("local_attention")
        windows = _windows(case.pattern, case.tokens)
        assert windows is not None
        module: Any = package.LocalAttention(
            window_size=windows.size,
            causal=windows.causal,
            look_backward=windows.backward,
            look_forward=windows.forward,
            exact_windowsize=windows.exact,
            use_rotary_pos_emb=False,
            scale=scale_of(case),
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = module(q, k, v)
            return out

        q, k, v = (heads_first(tensor) for tensor in inputs)
        return Prepared((q, k, v), attend, heads_last(case))


def _windows(pattern: Pattern, length: int) -> _Windows | None:
    causal = isinstance(pattern, Intersection) and Causal() in pattern.members
    if isinstance(pattern, Intersection) and causal and len(pattern.members) == 2:
        pattern = next(member for member in pattern.members if member != Causal())
    if isinstance(pattern, Sliding) and pattern.left and not pattern.sink_tokens:
        step = math.gcd(pattern.left, pattern.right, length)
        causal = causal or pattern.right == 0
        forward = 0 if causal else pattern.right // step
        return _Windows(step, pattern.left // step, forward, causal, exact=True)
    if not isinstance(pattern, Partition):
        return None
    size, before, after = pattern.size, pattern.before, pattern.after
    if not (isinstance(size, int) and isinstance(before, int) and isinstance(after, int)):
        return None
    if pattern.shift != 0 or before % size or after % size:
        return None
    return _Windows(size, before // size, 0 if causal else after // size, causal, exact=False)
