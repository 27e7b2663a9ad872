"""Attention inside a small latent whose queries, keys and values convolutions have mixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import ShapeError
from foveal.layers.causal import attend_on, rotary
from foveal.layers.state import LayerState, StateLayer, one_by_one


def mixed(
    z: Tensor, filter: Tensor, filter_bias: Tensor, maps: Tensor, maps_bias: Tensor, before: Tensor
) -> Tensor:
    """Two causal convolutions of two tokens: one per channel, one per head.

    y1_t = f_0 z_{t-1} + f_1 z_t + b1,  y2_t = M_0 y1_{t-1} + M_1 y1_t + b2, with the two tokens in front.
    Shapes: z [B, L, H, D], filter [2, H, D], filter_bias and maps_bias [H, D], maps [2, H, D, D],
    before [B, 2, H, D].
    """
    z = torch.cat([before, z], dim=1)
    first = filter[0] * z[:, :-1] + filter[1] * z[:, 1:] + filter_bias
    older = torch.einsum("blhd,hed->blhe", first[:, :-1], maps[0])
    newer = torch.einsum("blhd,hed->blhe", first[:, 1:], maps[1])
    return older + newer + maps_bias


class CompressedConvolutionalAttention(StateLayer):
    """Causal attention whose queries, keys and values live in a latent (CCA; CCGQA with kv_heads < heads).

    qt = W_q x, kt = W_k x; (q, k) = two convolutions of two tokens over concat(qt, kt), plus the mean of
    each query with its key; both are then divided by their norms and multiplied by sqrt(D), k also by a
    learned temperature per head, and turned by their positions.  Half of the value heads read the token
    before: v_t = [W_v x_t, W_u x_{t-1}].  y = W_o softmax(q k^T / sqrt(D)) v.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`; the state holds keys and values
    [N, T, kv_heads, head_dim], two tokens of qt and kt, one of W_u x.
    Options: head_dim D, the latent is heads x D wide; kv_heads even, a divisor of heads; rotary_share of D
    is turned, 0 none.
    Limits: the first tokens of a sequence see zeros before them.
    Paper: Compressed Convolutional Attention (2510.04476).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int,
        kv_heads: int | None = None,
        rotary_base: float = 10000.0,
        rotary_share: float = 0.5,
    ) -> None:
        super().__init__(dim, 1)
        self.heads, self.head_dim = heads, head_dim
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads or self.kv_heads % 2:
            needed = f"an even divisor of heads, {heads}, is needed"
            raise ShapeError("kv_heads", self.kv_heads, needed)
        self.rotary_base, self.turned = rotary_base, 2 * int(rotary_share * head_dim / 2)
        width = self.kv_heads * head_dim
        both = heads + self.kv_heads
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, width, bias=False)
        self.v_now = nn.Linear(dim, width // 2, bias=False)
        self.v_before = nn.Linear(dim, width // 2, bias=False)
        self.filter = nn.Parameter(torch.randn(2, both, head_dim) * 2**-0.5)
        self.filter_bias = nn.Parameter(torch.zeros(both, head_dim))
        self.maps = nn.Parameter(torch.randn(2, both, head_dim, head_dim) * (2 * head_dim) ** -0.5)
        self.maps_bias = nn.Parameter(torch.zeros(both, head_dim))
        self.temperature = nn.Parameter(torch.ones(self.kv_heads))
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if cu_seqlens is not None:
            return one_by_one(x, state, cu_seqlens, lambda row, before: self.mix(row, before, None))
        B, L, _ = x.shape
        D, groups = self.head_dim, self.heads // self.kv_heads
        z = torch.cat([self.q(x), self.k(x)], -1).unflatten(-1, (-1, D))
        shifted = self.v_before(x)
        if state is None:
            tail, late, past = (
                z.new_zeros(B, 2, *z.shape[2:]),
                shifted.new_zeros(B, 1, shifted.shape[-1]),
                None,
            )
            seen = 0
        else:
            tail, late = state.tails[3], state.tails[4]
            past = (state.tails[0], state.tails[1], state.tails[2])
            seen = int(state.tails[2][0]) if len(state.tails[2]) else 0
        y = mixed(z, self.filter, self.filter_bias, self.maps, self.maps_bias, tail)
        qt, kt = z.split([self.heads, self.kv_heads], dim=2)
        mean = (qt + kt.repeat_interleave(groups, dim=2)) / 2
        q = y[:, :, : self.heads] + mean
        k = y[:, :, self.heads :] + mean.unflatten(2, (self.kv_heads, groups)).mean(3)
        q = F.normalize(q, dim=-1) * D**0.5
        k = F.normalize(k, dim=-1) * D**0.5 * self.temperature[:, None]
        places = (seen + torch.arange(L, device=x.device)).expand(B, L)
        q, k = (self._turned(each, places) for each in (q, k))
        shift = torch.cat([late, shifted], dim=1)
        v = torch.cat([self.v_now(x), shift[:, :-1]], dim=-1).unflatten(-1, (self.kv_heads, D))
        o, kept = attend_on(q, k, v, past, None)
        newest = torch.cat([tail, z], dim=1)[:, -2:]
        return self.out(o.flatten(-2)), LayerState((*kept, newest, shift[:, -1:]))

    def _turned(self, x: Tensor, places: Tensor) -> Tensor:
        if not self.turned:
            return x
        front = rotary(x[..., : self.turned], places, self.rotary_base)
        return torch.cat([front, x[..., self.turned :]], dim=-1)
