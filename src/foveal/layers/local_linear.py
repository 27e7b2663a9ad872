"""Causal layers that fit a line around every query: solved for, or with a learned slope."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._attend import attend
from foveal._errors import ScoreError, ShapeError
from foveal.layers.causal import rotary
from foveal.layers.state import (
    LayerState,
    StateLayer,
    beside,
    one_by_one,
    positions,
    sequences,
)
from foveal.patterns import Causal, Pattern, Sliding
from foveal.scores import LocalLinear, Parallax, Score


class _LineLayer(StateLayer):
    """Projections, positions and the keys kept, for a score that a layer makes."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None,
        head_dim: int | None,
        window: int | None,
        qk_norm: bool,
        rotary_base: float | None,
        implementation: str | None,
    ) -> None:
        super().__init__(dim, heads)
        self.implementation = implementation
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ShapeError("kv_heads", kv_heads, f"a divisor of heads, {heads}, is needed")
        if window is not None and window < 1:
            raise ShapeError("window", window, "at least 1 is needed")
        head_dim = dim // heads if head_dim is None else head_dim
        self.window, self.qk_norm, self.rotary_base = window, qk_norm, rotary_base
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if state is not None and (
            cu_seqlens is not None or bool((state.tails[2] != state.tails[2][:1]).any())
        ):
            return one_by_one(x, state, cu_seqlens, lambda row, own: self.mix(row, own, None))
        places, seen = positions(x, None if state is None else state.tails[2], cu_seqlens)
        q, r = self._turned(self.split(self.q(x)), places), self.slope(x, places)
        k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (self.k(x), self.v(x)))
        k = self._turned(k, places)
        if state is not None:
            past = min(state.tails[0].shape[1], int(state.tails[2][0]) if len(seen) else 0)
            kept = (y[:, y.shape[1] - past :] for y in state.tails[:2])
            k, v = (torch.cat(pair, dim=1) for pair in zip(kept, (k, v), strict=True))
        pattern: Pattern = Causal() if self.window is None else Sliding(self.window - 1)
        o = attend(
            q,
            k,
            v,
            pattern,
            self.score(r),
            cu_seqlens=cu_seqlens,
            implementation=self.implementation,
        )
        if cu_seqlens is not None:
            k, v = (beside(list(sequences(y, cu_seqlens))) for y in (k, v))
        if self.window is not None:
            k, v = (y[:, max(y.shape[1] - self.window + 1, 0) :] for y in (k, v))
        return self.out(o.flatten(-2)), LayerState((k, v, seen))

    def _turned(self, x: Tensor, places: Tensor) -> Tensor:
        """Normalised to length sqrt(D) and turned by positions, where the layer does so."""
        if self.qk_norm:
            x = F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])
        return x if self.rotary_base is None else rotary(x, places, self.rotary_base)

    def slope(self, x: Tensor, places: Tensor) -> Tensor | None:
        """r [B, L, heads, head_dim], for a layer that projects it."""
        return None

    @abstractmethod
    def score(self, r: Tensor | None) -> Score:
        """The score of a call."""


class LocalLinearAttention(_LineLayer):
    """y = W_o o, o by `LocalLinear`: per query a ridge regression of values on keys, weighted by the softmax.

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`; the state holds keys and
    values [N, T, kv_heads, head_dim].
    Options: kv_heads, head_dim, window and rotary_base as for `CausalAttention`; qk_norm makes q and k of
    length sqrt(head_dim), so that `ridge` means the same in every head (it counts in squares of keys); ridge
    is where each head begins, its logarithm is learned; tolerance and max_iterations as for `LocalLinear`;
    implementation as for `attend`.
    Equals: CausalAttention for ridge -> inf.
    Paper: Local Linear Attention (2510.01450).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        qk_norm: bool = True,
        rotary_base: float | None = None,
        ridge: float = 1.0,
        tolerance: float | None = None,
        max_iterations: int = 256,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            dim, heads, kv_heads, head_dim, window, qk_norm, rotary_base, implementation
        )
        if not 0 < ridge < math.inf:
            raise ScoreError("ridge", ridge, "a finite number above 0 is needed")
        self.log_ridge = nn.Parameter(torch.full((heads,), math.log(ridge)))
        self.tolerance, self.max_iterations = tolerance, max_iterations

    def score(self, r: Tensor | None) -> Score:
        return LocalLinear(self.log_ridge.exp(), self.max_iterations, self.tolerance)


class ParallaxAttention(_LineLayer):
    """y = W_o o, o by `Parallax` with r = W_r x: the slope is learned, nothing is solved.

    Shapes and options as of `LocalLinearAttention`; r is turned by positions as k is, so that
    r.k depends on distances, and begins at 0.
    Equals: CausalAttention where W_r = 0.
    Paper: Parallax (2605.29157).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        qk_norm: bool = True,
        rotary_base: float | None = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            dim, heads, kv_heads, head_dim, window, qk_norm, rotary_base, implementation
        )
        self.r = nn.Linear(dim, self.q.out_features, bias=False)
        nn.init.zeros_(self.r.weight)

    def slope(self, x: Tensor, places: Tensor) -> Tensor:
        r = self.split(self.r(x))
        return r if self.rotary_base is None else rotary(r, places, self.rotary_base)

    def score(self, r: Tensor | None) -> Score:
        assert r is not None
        return Parallax(r)
