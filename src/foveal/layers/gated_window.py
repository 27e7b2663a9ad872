"""A window of causal attention with a gate, as trained models are converted to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._errors import ShapeError
from foveal.layers.causal import attend_on, rotary
from foveal.layers.state import LayerState, StateLayer, positions


class GatedWindowAttention(StateLayer):
    """y = W_o (2 sigmoid(W_g x) * o), o softmax attention over the last `window` keys.

    The gate starts at 1: a layer with the weights of a full one and a window that covers the sequence
    is that layer.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: kv_heads divides heads; norm divides q and k by their root mean square, times learned
    factors; scale of the score, default head_dim ** -0.5; rotary_base None leaves q and k unturned.
    Paper: Attention Editing (2604.05688); its gate is not established, this one is ours.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary_base: float | None = 10000.0,
        norm: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__(dim, 1)
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ShapeError("kv_heads", kv_heads, f"a divisor of heads, {heads}, is needed")
        if window < 1:
            raise ShapeError("window", window, "at least 1 is needed")
        D = dim // heads if head_dim is None else head_dim
        self.window, self.rotary_base = window, rotary_base
        self.factor = 1.0 if scale is None else scale * D**0.5
        self.q = nn.Linear(dim, heads * D, bias=False)
        self.k = nn.Linear(dim, self.kv_heads * D, bias=False)
        self.v = nn.Linear(dim, self.kv_heads * D, bias=False)
        self.gate = nn.Linear(dim, heads * D, bias=False)
        nn.init.zeros_(self.gate.weight)
        self.q_norm = nn.RMSNorm(D, eps=1e-6) if norm else None
        self.k_norm = nn.RMSNorm(D, eps=1e-6) if norm else None
        self.out = nn.Linear(heads * D, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        q = self.split(self.q(x))
        k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (self.k(x), self.v(x)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        past = None if state is None else (state.tails[0], state.tails[1], state.tails[2])
        if self.rotary_base is not None:
            places, _ = positions(x, None if past is None else past[2], cu_seqlens)
            q, k = (rotary(y, places, self.rotary_base) for y in (q, k))
        o, kept = attend_on(q * self.factor, k, v, past, cu_seqlens, self.window)
        gate = 2 * torch.sigmoid(self.gate(x))
        return self.out(gate * o.flatten(-2)), LayerState(kept)
