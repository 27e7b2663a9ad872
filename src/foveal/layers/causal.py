"""Causal attention with a state: every key so far, those of a window, or a latent of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import OptionError, ShapeError
from foveal.compose import merge
from foveal.layers.state import (
    LayerState,
    StateLayer,
    beside,
    positions,
    sequence_lengths,
    sequences,
)
from foveal.patterns import Causal, Pattern, Sliding
from foveal.scores import KeyBias, Score, Softmax


def rotary(x: Tensor, places: Tensor, base: float) -> Tensor:
    """x [B, L, H, D] turned by its places [B, L] in the planes (i, i + D / 2), angle t base^(-2 i / D)."""
    if not base > 0:
        raise OptionError("rotary_base", base, "a number above 0 is needed")
    half = x.shape[-1] // 2
    speeds = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (places.double()[..., None, None] * speeds).to(
        torch.promote_types(x.dtype, torch.float32)
    )
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)


def attend_on(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
    window: int | None = None,
    context: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Causal attention of new tokens to earlier and new keys, and the keys to keep.

    Shapes: q [B, L, Hq, D], k and v [B, L, H, .]; past (k, v [N, T, H, .], seen int64 [N] on the CPU):
    the last T keys of each sequence, of which the last min(T, seen) are real.
    Options: window counts the keys a query sees, its own included; None is all.  context (k, v
    [Lx, H, .]) are keys that every query sees.
    """
    pattern: Pattern = Causal() if window is None else Sliding(window - 1)

    def solve(q: Tensor, k: Tensor, v: Tensor, score: Score, cu_seqlens: Tensor | None) -> Tensor:
        if context is None:
            return attend(q, k, v, pattern, score, cu_seqlens=cu_seqlens)
        near = attend(q, k, v, pattern, score, cu_seqlens=cu_seqlens, return_lse=True)
        shared_k, shared_v = (x.to(q.dtype).expand(len(q), *x.shape) for x in context)
        far = attend(q, shared_k, shared_v, return_lse=True)
        return merge((near[0], far[0]), (near[1], far[1]))[0]

    lengths = torch.tensor(sequence_lengths(q, cu_seqlens), dtype=torch.int64)
    seen = lengths if past is None else past[2].cpu() + lengths
    if past is None and cu_seqlens is not None:
        o = solve(q, k, v, Softmax(), cu_seqlens)
        k, v = (beside(list(sequences(x, cu_seqlens))) for x in (k, v))
    elif cu_seqlens is None:
        if past is not None:
            k, v = (torch.cat(pair, dim=1) for pair in zip(past[:2], (k, v), strict=True))
        o = solve(q, k, v, _hidden(k, seen), None)
    else:
        assert past is not None
        rows = list(sequences(q, cu_seqlens))
        k, v = (
            _appended(before, past[2], x, cu_seqlens)
            for before, x in zip(past[:2], (k, v), strict=True)
        )
        o = solve(beside(rows), k, v, _hidden(k, seen), None)
        own = [o[n, o.shape[1] - len(row) :] for n, row in enumerate(rows)]
        o = torch.cat(own)[None] if own else q[..., : v.shape[-1]]
    if window is not None:
        k, v = (x[:, max(x.shape[1] - window + 1, 0) :] for x in (k, v))
    return o, (k, v, seen)


def _hidden(k: Tensor, seen: Tensor) -> Score:
    """Hides the zeros in front of sequences with fewer than T keys."""
    missing = k.shape[1] - seen.clamp(max=k.shape[1])
    if not bool(missing.any()):
        return Softmax()
    hidden = torch.arange(k.shape[1]) < missing[:, None]
    bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    return Softmax() + KeyBias(
        bias[:, None].to(k.device, torch.promote_types(k.dtype, torch.float32))
    )


class CausalAttention(StateLayer):
    """y = W_o softmax(q k^T / sqrt(D)) v over all earlier tokens, or the last `window` of them.

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`; the state holds keys and
    values [N, T, kv_heads, head_dim].
    Options: kv_heads, a divisor of heads, None is heads; head_dim None is dim / heads; window None sees
    all; rotary_base turns q and k by their positions, None leaves them without.
    Cost: the state grows with the sequence, or up to window - 1 tokens.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rotary_base: float | None = None,
    ) -> None:
        super().__init__(dim, heads)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ShapeError("kv_heads", kv_heads, f"a divisor of heads, {heads}, is needed")
        if window is not None and window < 1:
            raise ShapeError("window", window, "at least 1 is needed")
        head_dim = dim // heads if head_dim is None else head_dim
        self.window = window
        self.rotary_base = rotary_base
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        q = self.split(self.q(x))
        k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (self.k(x), self.v(x)))
        past = None if state is None else (state.tails[0], state.tails[1], state.tails[2])
        if self.rotary_base is not None:
            places, _ = positions(x, None if past is None else past[2], cu_seqlens)
            q, k = (rotary(y, places, self.rotary_base) for y in (q, k))
        o, kept = attend_on(q, k, v, past, cu_seqlens, self.window)
        return self.out(o.flatten(-2)), LayerState(kept)


class LatentAttention(StateLayer):
    """Causal attention whose keys and values are linear in a short latent, without positions.

    c = RMSNorm(W_c x), k_h = [W_h c, W_s x], v_h = V_h c: the state holds c and the shared part W_s x.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`; the state holds
    latent_dim + shared_dim numbers per token, whatever the heads.
    Options: head_dim is the part of a key of its own, shared_dim that of all heads, value_dim None is
    head_dim.
    Paper: multi-head latent attention, DeepSeek-V2 (2405.04434); as used by Kimi Linear (2510.26692).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        latent_dim: int,
        head_dim: int,
        shared_dim: int = 0,
        value_dim: int | None = None,
    ) -> None:
        super().__init__(dim, heads)
        value_dim = head_dim if value_dim is None else value_dim
        self.sizes = (head_dim, value_dim)
        self.latent_dim = latent_dim
        self.q = nn.Linear(dim, heads * (head_dim + shared_dim), bias=False)
        self.down = nn.Linear(dim, latent_dim + shared_dim, bias=False)
        self.norm = nn.RMSNorm(latent_dim, eps=1e-6)
        self.up = nn.Linear(latent_dim, heads * (head_dim + value_dim), bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        down = self.down(x)
        latent = torch.cat(
            [self.norm(down[..., : self.latent_dim]), down[..., self.latent_dim :]], -1
        )
        past = None
        if state is not None:
            past = (*self._keys(state.tails[0]), state.tails[1])
        o, (_, _, seen) = attend_on(self.split(self.q(x)), *self._keys(latent), past, cu_seqlens)
        kept = latent if cu_seqlens is None else beside(list(sequences(latent, cu_seqlens)))
        if state is not None:
            kept = _appended(state.tails[0], state.tails[1], latent, cu_seqlens)
        return self.out(o.flatten(-2)), LayerState((kept, seen))

    def _keys(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [N, T, heads, .] of what is kept [N, T, latent_dim + shared_dim]."""
        k, v = self.split(self.up(latent[..., : self.latent_dim])).split(list(self.sizes), -1)
        shared = latent[..., None, self.latent_dim :].expand(*k.shape[:-1], -1)
        return torch.cat([k, shared], dim=-1), v


def _appended(old: Tensor, seen: Tensor, new: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The rows of `new` behind the real ones of each sequence of `old` [N, T, D]."""
    if cu_seqlens is None:
        return torch.cat([old, new], dim=1)
    rows = zip(old, seen.tolist(), sequences(new, cu_seqlens), strict=True)
    return beside([torch.cat([x[len(x) - min(len(x), n) :], own]) for x, n, own in rows])
