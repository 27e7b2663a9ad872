"""Layers by the delta rule: Gated DeltaNet and Kimi Delta Attention."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import OptionError, ShapeError
from foveal._scan import scan
from foveal.layers.state import LayerState, ShortConvolution, StateLayer
from foveal.rules import Delta


class DeltaLayer(StateLayer):
    """Short convolutions, unit keys and queries, and a gate on the normalised output."""

    def __init__(
        self,
        dim: int,
        heads: int,
        value_heads: int | None,
        head_dim: int,
        value_dim: int,
        conv: int,
        largest_write: float,
    ) -> None:
        super().__init__(dim, heads)
        self.value_heads = heads if value_heads is None else value_heads
        if self.value_heads % heads:
            raise ShapeError("value_heads", value_heads, f"a multiple of heads, {heads}, is needed")
        if largest_write < 0:
            raise OptionError("largest_write", largest_write, "at least 0 is needed")
        self.largest_write = largest_write
        values = self.value_heads * value_dim
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, values, bias=False)
        self.q_conv = ShortConvolution(heads * head_dim, conv)
        self.k_conv = ShortConvolution(heads * head_dim, conv)
        self.v_conv = ShortConvolution(values, conv)
        self.write = nn.Linear(dim, self.value_heads, bias=False)
        self.norm = nn.RMSNorm(value_dim, eps=1e-5)
        self.out = nn.Linear(values, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        tails = (None,) * 3 if state is None else state.tails
        q, q_tail = self.q_conv(self.q(x), tails[0], cu_seqlens)
        k, k_tail = self.k_conv(self.k(x), tails[1], cu_seqlens)
        v, v_tail = self.v_conv(self.v(x), tails[2], cu_seqlens)
        q, k = (F.normalize(self.split(y), dim=-1) for y in (q, k))
        o, memory = scan(
            q,
            k,
            self.split_values(v),
            Delta(),
            log_decay=self.log_decay(x),
            write_gate=self.largest_write * torch.sigmoid(self.write(x)),
            initial_state=None if state is None else state.memory,
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        y = self.out((self.read_gate(x) * self.norm(o)).flatten(-2))
        return y, LayerState((q_tail, k_tail, v_tail), memory)

    def split_values(self, x: Tensor) -> Tensor:
        """[B, L, value_heads, D] of [B, L, value_heads * D]"""
        heads: Tensor = x.unflatten(-1, (self.value_heads, -1))
        return heads

    @abstractmethod
    def log_decay(self, x: Tensor) -> Tensor:
        """[B, L, value_heads] or [B, L, value_heads, head_dim]"""

    @abstractmethod
    def read_gate(self, x: Tensor) -> Tensor:
        """The factor on the normalised output [B, L, value_heads, value_dim]."""


def decay_rates(heads: int) -> Tensor:
    """log of rates drawn from U(1, 16)"""
    return torch.empty(heads).uniform_(1, 16).log()


def time_steps(count: int) -> Tensor:
    """softplus^-1 of steps drawn log-uniformly from [1e-3, 1e-1]"""
    steps = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return steps + torch.log(-torch.expm1(-steps))


class KimiDeltaAttention(DeltaLayer):
    """y = W_o [sigmoid(W_up W_down x) * RMSNorm(o)], o by the delta rule with a decay per channel.

    log_decay = -exp(rate_h) softplus(W_up' W_down' x + step), or with `least_log_decay` g < 0
    g sigmoid(exp(rate_h) (W_up' W_down' x + step)), which stays above g; write gate sigmoid(W x); q and
    k unit vectors after silu of a short convolution, v likewise without the norm.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: head_dim and value_dim None are dim / heads; value_heads, a multiple of heads, share q and
    k in groups; conv is the length of the convolutions; largest_write 2 allows write gates up to 2;
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
        value_heads: int | None = None,
        conv: int = 4,
        largest_write: float = 1.0,
        least_log_decay: float | None = None,
    ) -> None:
        if least_log_decay is not None and least_log_decay >= 0:
            raise OptionError("least_log_decay", least_log_decay, "a number below 0 is needed")
        head_dim = dim // heads if head_dim is None else head_dim
        value_dim = dim // heads if value_dim is None else value_dim
        super().__init__(dim, heads, value_heads, head_dim, value_dim, conv, largest_write)
        self.least_log_decay = least_log_decay
        count = self.value_heads
        self.decay = nn.Sequential(
            nn.Linear(dim, head_dim, bias=False), nn.Linear(head_dim, count * head_dim, bias=False)
        )
        rates = decay_rates(count) if least_log_decay is None else torch.zeros(count)
        self.rate = nn.Parameter(rates)
        self.step = nn.Parameter(time_steps(count * head_dim))
        self.read = nn.Sequential(
            nn.Linear(dim, value_dim, bias=False), nn.Linear(value_dim, count * value_dim)
        )

    def log_decay(self, x: Tensor) -> Tensor:
        steps = self.split_values(self.decay(x) + self.step)
        rates = self.rate.exp()[:, None]
        if self.least_log_decay is None:
            return -rates * F.softplus(steps)
        return self.least_log_decay * torch.sigmoid(rates * steps)

    def read_gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.split_values(self.read(x)))


class GatedDeltaNet(DeltaLayer):
    """y = W_o [silu(W_g x) * RMSNorm(o)], o by the delta rule with a decay per head and token.

    log_decay = -exp(rate_h) softplus(W x + step_h); the rest as in `KimiDeltaAttention`.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: head_dim None is 3/4 of dim / heads, value_dim None twice that, as in the paper; the others
    as for `KimiDeltaAttention`.
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
        value_heads: int | None = None,
        conv: int = 4,
        largest_write: float = 1.0,
    ) -> None:
        head_dim = max(3 * dim // (4 * heads), 1) if head_dim is None else head_dim
        value_dim = 2 * head_dim if value_dim is None else value_dim
        super().__init__(dim, heads, value_heads, head_dim, value_dim, conv, largest_write)
        self.decay = nn.Linear(dim, self.value_heads, bias=False)
        self.rate = nn.Parameter(decay_rates(self.value_heads))
        self.step = nn.Parameter(time_steps(self.value_heads))
        self.read = nn.Linear(dim, self.value_heads * value_dim, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        return -self.rate.exp() * F.softplus(self.decay(x) + self.step)

    def read_gate(self, x: Tensor) -> Tensor:
        return F.silu(self.split_values(self.read(x)))
