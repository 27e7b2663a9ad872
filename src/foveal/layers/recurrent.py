"""Layers whose tokens mix through a recurrent state."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import ShapeError
from foveal._scan import State, scan
from foveal.features import alibi_slopes, taylor
from foveal.rules import MLSTM, Additive, Delta


class LayerState(NamedTuple):
    """What a layer keeps of the tokens so far: `tails` of its short convolutions and the memory."""

    tails: tuple[Tensor, ...]
    memory: State


class ShortConvolution(nn.Module):
    """y_t = silu(sum_i w_i x_{t-i}), i = 0, ..., size - 1, for each channel.

    Shapes: x and y [B, L, dim]; tail [B, size - 1, dim], the last tokens before x, zeros by default.
    """

    def __init__(self, dim: int, size: int = 4) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.empty(dim, 1, size).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y, and the tail after x."""
        size = self.filter.shape[-1]
        if tail is None:
            tail = x.new_zeros(len(x), size - 1, x.shape[-1])
        x = torch.cat([tail, x], dim=1)
        y = F.conv1d(x.mT, self.filter, groups=x.shape[-1]).mT
        return F.silu(y), x[:, x.shape[1] - size + 1 :]


class _Recurrent(nn.Module):
    """Checks and names that the layers share."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads

    def split(self, x: Tensor) -> Tensor:
        """[B, L, heads, D] of [B, L, heads * D]"""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads


class _DeltaLayer(_Recurrent):
    """Short convolutions, unit keys and queries, and a gate on the normalised output."""

    def __init__(self, dim: int, heads: int, head_dim: int, value_dim: int, size: int) -> None:
        super().__init__(dim, heads)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.q_conv = ShortConvolution(heads * head_dim, size)
        self.k_conv = ShortConvolution(heads * head_dim, size)
        self.v_conv = ShortConvolution(heads * value_dim, size)
        self.write = nn.Linear(dim, heads, bias=False)
        self.norm = nn.RMSNorm(value_dim, eps=1e-5)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)

    def mix(
        self, x: Tensor, log_decay: Tensor, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """o [B, L, heads, value_dim] after its norm, and the state after x."""
        tails = (None,) * 3 if state is None else state.tails
        q, q_tail = self.q_conv(self.q(x), tails[0])
        k, k_tail = self.k_conv(self.k(x), tails[1])
        v, v_tail = self.v_conv(self.v(x), tails[2])
        q, k = (F.normalize(self.split(y), dim=-1) for y in (q, k))
        o, memory = scan(
            q,
            k,
            self.split(v),
            Delta(),
            log_decay=log_decay,
            write_gate=torch.sigmoid(self.write(x)),
            initial_state=None if state is None else state.memory,
            return_state=True,
        )
        return self.norm(o), LayerState((q_tail, k_tail, v_tail), memory)


def _decay_rates(heads: int) -> Tensor:
    """log of rates drawn from U(1, 16)"""
    return torch.empty(heads).uniform_(1, 16).log()


def _time_steps(count: int) -> Tensor:
    """softplus^-1 of steps drawn log-uniformly from [1e-3, 1e-1]"""
    steps = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return steps + torch.log(-torch.expm1(-steps))


class KimiDeltaAttention(_DeltaLayer):
    """y = W_o [sigmoid(W_up W_down x) * RMSNorm(o)], o by the delta rule with a decay per channel.

    log_decay = -exp(rate_h) softplus(W_up' W_down' x + step), write gate sigmoid(W x), q and k unit
    vectors after silu of a short convolution, v likewise without the norm.
    Shapes: x and y [B, L, dim].
    Options: head_dim and value_dim None are dim / heads; conv is the length of the convolutions;
    `rate` and `step` are meant to be free of weight decay.
    Equals: any cut of x in two calls that pass the state.
    Paper: Kimi Linear (2510.26692).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 4,
    ) -> None:
        head_dim = dim // heads if head_dim is None else head_dim
        value_dim = dim // heads if value_dim is None else value_dim
        super().__init__(dim, heads, head_dim, value_dim, conv)
        self.decay = nn.Sequential(
            nn.Linear(dim, head_dim, bias=False), nn.Linear(head_dim, heads * head_dim, bias=False)
        )
        self.rate = nn.Parameter(_decay_rates(heads))
        self.step = nn.Parameter(_time_steps(heads * head_dim))
        self.read = nn.Sequential(
            nn.Linear(dim, value_dim, bias=False), nn.Linear(value_dim, heads * value_dim)
        )

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LayerState]:
        steps = F.softplus(self.decay(x) + self.step)
        log_decay = -self.rate.exp()[:, None] * self.split(steps)
        o, state = self.mix(x, log_decay, state)
        y = self.out((o * torch.sigmoid(self.split(self.read(x)))).flatten(-2))
        return (y, state) if return_state else y


class GatedDeltaNet(_DeltaLayer):
    """y = W_o [silu(W_g x) * RMSNorm(o)], o by the delta rule with a decay per head and token.

    log_decay = -exp(rate_h) softplus(W x + step_h); the rest as in `KimiDeltaAttention`.
    Shapes: x and y [B, L, dim].
    Options: head_dim None is 3/4 of dim / heads, value_dim None twice that, as in the paper.
    Equals: any cut of x in two calls that pass the state.
    Paper: Gated Delta Networks (2412.06464).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 4,
    ) -> None:
        head_dim = max(3 * dim // (4 * heads), 1) if head_dim is None else head_dim
        value_dim = 2 * head_dim if value_dim is None else value_dim
        super().__init__(dim, heads, head_dim, value_dim, conv)
        self.decay = nn.Linear(dim, heads, bias=False)
        self.rate = nn.Parameter(_decay_rates(heads))
        self.step = nn.Parameter(_time_steps(heads))
        self.read = nn.Linear(dim, heads * value_dim, bias=False)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LayerState]:
        log_decay = -self.rate.exp() * F.softplus(self.decay(x) + self.step)
        o, state = self.mix(x, log_decay, state)
        y = self.out((o * F.silu(self.split(self.read(x)))).flatten(-2))
        return (y, state) if return_state else y


class LightningAttention(_Recurrent):
    """y = W_o [W_u x * RMSNorm(o)], o_t = sum_j exp(log_decay (t - j)) (q_t . k_j) v_j.

    log_decay is fixed for each head; q and k are silu of their projections; the norm, without
    weight, is over all heads together.
    Shapes: x and y [B, L, dim].
    Options: log_decay [heads], by default `alibi_slopes`; the paper's layer l of n takes them times
    1 - l / (n - 1) + 1e-5.
    Equals: any cut of x in two calls that pass the state.
    Paper: TransNormerLLM (2307.14995), Lightning Attention-2 (2401.04658).
    """

    log_decay: Tensor

    def __init__(self, dim: int, heads: int, *, log_decay: Tensor | None = None) -> None:
        super().__init__(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.read = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(dim, dim, bias=False)
        decay = alibi_slopes(heads) if log_decay is None else log_decay
        self.register_buffer("log_decay", decay)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LayerState]:
        q, k, v = (self.split(y) for y in self.qkv(x).chunk(3, dim=-1))
        o, memory = scan(
            F.silu(q),
            F.silu(k),
            v,
            Additive(),
            log_decay=self.log_decay,
            scale=1.0,
            initial_state=None if state is None else state.memory,
            return_state=True,
        )
        y = self.out(self.read(x) * self.norm(o.flatten(-2)))
        return (y, LayerState((), memory)) if return_state else y


class MLSTMLayer(_Recurrent):
    """y = W_o [sigmoid(W_r x) * RMSNorm_head(o)], o by `MLSTM` with gates linear in x.

    Shapes: x and y [B, L, dim].
    Options: head_dim of q and k, None is half of dim / heads; rule, `MLSTM()` by default.
    Equals: any cut of x in two calls that pass the state.
    Paper: xLSTM (2405.04517); Tiled Flash Linear Attention (2503.14376).
    """

    def __init__(
        self, dim: int, heads: int, *, head_dim: int | None = None, rule: MLSTM | None = None
    ) -> None:
        super().__init__(dim, heads)
        head_dim = max(dim // (2 * heads), 1) if head_dim is None else head_dim
        self.rule = MLSTM() if rule is None else rule
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.forget = nn.Linear(dim, heads)
        self.write = nn.Linear(dim, heads)
        self.read = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LayerState]:
        o, memory = scan(
            self.split(self.q(x)),
            self.split(self.k(x)),
            self.split(self.v(x)),
            self.rule,
            log_decay=F.logsigmoid(self.forget(x)),
            write_gate=self.write(x),
            initial_state=None if state is None else state.memory,
            return_state=True,
        )
        y = self.out(torch.sigmoid(self.read(x)) * self.norm(o).flatten(-2))
        return (y, LayerState((), memory)) if return_state else y


class BasedAttention(_Recurrent):
    """y = W_o o with weights proportional to 1 + z + z^2 / 2, z = q . k / sqrt(feature_dim), causal.

    Shapes: x and y [B, L, dim].
    Options: feature_dim of q and k, 16 in the paper.
    Cost: a state of 1 + D + D (D + 1) / 2 rows per head, D the feature_dim.
    Equals: any cut of x in two calls that pass the state.
    Paper: Based (2402.18668), which alternates it with sliding windows.
    """

    def __init__(self, dim: int, heads: int, *, feature_dim: int = 16) -> None:
        super().__init__(dim, heads)
        self.q = nn.Linear(dim, heads * feature_dim, bias=False)
        self.k = nn.Linear(dim, heads * feature_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LayerState]:
        o, memory = scan(
            taylor(self.split(self.q(x))),
            taylor(self.split(self.k(x))),
            self.split(self.v(x)),
            Additive(normalised=True),
            scale=1.0,
            initial_state=None if state is None else state.memory,
            return_state=True,
        )
        y = self.out(o.flatten(-2))
        return (y, LayerState((), memory)) if return_state else y
