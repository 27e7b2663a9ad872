"""Linear attention with fixed decays: Lightning Attention, TransNormer and TransNormerLLM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._arguments import tensors_or_none
from foveal._attend import attend
from foveal._errors import OptionError, ShapeError
from foveal._judged import judged_alone
from foveal._scan import scan
from foveal.features import alibi_slopes, linear_relative
from foveal.layers.feature_attention import over_all
from foveal.layers.heads import need_tokens
from foveal.layers.state import (
    LayerState,
    StateLayer,
    one_by_one,
    place_of,
    positions,
    ragged,
)
from foveal.layers.units import GatedUnits
from foveal.patterns import Causal, Partition
from foveal.rules import Additive


@judged_alone
def norm_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, implementation: str | None = None
) -> Tensor:
    """o_i = RMSNorm(sum_j (phi(q_i) . phi(k_j)) v_j), phi(x) = 1 + elu(x), j <= i where causal.

    The norm, without weight, is over all heads together and takes the place of a denominator.
    Shapes: q and k [B, L, H, D], v [B, L, H, Dv].
    """
    o = _weighted(1 + F.elu(q), 1 + F.elu(k), v, causal, implementation)
    return F.rms_norm(o, o.shape[-2:], eps=1e-6)


def _weighted(q: Tensor, k: Tensor, v: Tensor, causal: bool, implementation: str | None) -> Tensor:
    if not causal:
        return over_all(q, k, v, normalised=False, implementation=implementation)
    return scan(q, k, v, Additive(), scale=1.0, implementation=implementation)


class LightningAttention(StateLayer):
    """y = W_o [W_u x * RMSNorm(o)], o_t = sum_j exp(log_decay (t - j)) (q_t . k_j) v_j.

    log_decay is fixed for each head; q and k are silu of their projections; the norm, without
    weight, is over all heads together.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: log_decay [heads], by default `alibi_slopes`; the paper's layer l of n takes them times
    1 - l / (n - 1) + 1e-5.  relative turns q and k by their positions with learned angles per head
    and channel, `linear_relative`, as TransNormerLLM's first layer does.
    Equals: any cut of x in two calls that pass the state.
    Paper: TransNormerLLM (2307.14995), Lightning Attention-2 (2401.04658).
    """

    log_decay: Tensor

    def __init__(
        self, dim: int, heads: int, *, log_decay: Tensor | None = None, relative: bool = False
    ) -> None:
        super().__init__(dim, heads)
        tensors_or_none(log_decay=log_decay)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.read = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.register_buffer("log_decay", alibi_slopes(heads) if log_decay is None else log_decay)
        self.angles: nn.Parameter | None = None
        if relative:
            speeds = 10000.0 ** (-2 * torch.arange(dim // heads) / (dim // heads))
            self.angles = nn.Parameter(speeds.expand(heads, -1).clone())

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        q, k, v = (self.split(y) for y in self.qkv(x).chunk(3, dim=-1))
        q, k = F.silu(q), F.silu(k)
        tails: tuple[Tensor, ...] = ()
        if self.angles is not None:
            places, seen = positions(x, None if state is None else state.tails[0], cu_seqlens)
            q, k = (linear_relative(y, places, self.angles) for y in (q, k))
            tails = (seen,)
        o, memory = scan(
            q,
            k,
            v,
            Additive(),
            log_decay=self.log_decay,
            scale=1.0,
            initial_state=None if state is None else state.memory,
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        y = self.out(self.read(x) * self.norm(o.flatten(-2)))
        return y, LayerState(tails, memory)


class NormAttention(StateLayer):
    """y = W_o [silu(W_u x) * RMSNorm(o)], o by `norm_attention` with v = silu(W_v x).

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Equals: any cut of x in two calls that pass the state.
    Paper: The Devil in Linear Transformer (2210.10340), its later layers.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.read = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.out = nn.Linear(dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        q, k, v = (self.split(y) for y in self.qkv(x).chunk(3, dim=-1))
        o, memory = scan(
            1 + F.elu(q),
            1 + F.elu(k),
            F.silu(v),
            Additive(),
            scale=1.0,
            initial_state=None if state is None else state.memory,
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.out(F.silu(self.read(x)) * self.norm(o.flatten(-2))), LayerState((), memory)


class DiagAttention(StateLayer):
    """y = W_o softmax(q k^T / sqrt(D)) v inside blocks of `block` tokens that do not overlap, causal.

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`; the state holds the keys and
    values of the block that is not full.
    Paper: The Devil in Linear Transformer (2210.10340), its early layers.
    """

    def __init__(self, dim: int, heads: int, *, block: int = 64) -> None:
        super().__init__(dim, heads)
        if block < 1:
            raise ShapeError("block", block, "at least 1 is needed")
        self.block = block
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if cu_seqlens is not None or (state is not None and ragged(state.tails[2], self.block)):
            return one_by_one(x, state, cu_seqlens, self._blocks)
        return self._blocks(x, state)

    def _blocks(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Sequences that stand at the same place of their blocks.

        The state is (k, v, seen), k and v with block - 1 rows, of which the last seen % block are real.
        """
        q, k, v = (self.split(y) for y in self.qkv(x).chunk(3, dim=-1))
        seen = torch.full((len(x),), x.shape[1])
        if state is not None:
            held = place_of(state.tails[2]) % self.block
            seen = seen + state.tails[2].cpu()
            k, v = (
                torch.cat([old[:, old.shape[1] - held :], new], dim=1)
                for old, new in zip(state.tails[:2], (k, v), strict=True)
            )
        o = attend(q, k, v, Partition(self.block) & Causal())
        held = k.shape[1] % self.block
        k, v = (
            F.pad(y[:, y.shape[1] - held :], (0, 0, 0, 0, self.block - 1 - held, 0)) for y in (k, v)
        )
        return self.out(o.flatten(-2)), LayerState((k, v, seen))


class TransNormerBlock(nn.Module):
    """x + mixer(norm(x)), then + W_3 (elu(W_1 z) * W_2 z), z = norm(x): the block of TransNormer.

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: mixer "diag" is `DiagAttention` (the paper's early layers), "norm" `NormAttention`; hidden
    None is 4 / 3 of dim per branch.
    Paper: The Devil in Linear Transformer (2210.10340).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mixer: str = "norm",
        *,
        block: int = 64,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if mixer not in ("diag", "norm"):
            raise ShapeError("mixer", mixer, '"diag" or "norm" is needed')
        self.mixer = (
            DiagAttention(dim, heads, block=block) if mixer == "diag" else NormAttention(dim, heads)
        )
        self.norms = nn.ModuleList((nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)))
        self.units = GatedUnits(dim, max(4 * dim // 3, 1) if hidden is None else hidden, F.elu)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        need_tokens(self.mixer, x, self.mixer.dim, "[B, L, {dim}]")
        mixed, state = self.mixer(self.norms[0](x), state, cu_seqlens=cu_seqlens, return_state=True)
        x = x + mixed
        x = x + self.units(self.norms[1](x))
        return (x, state) if return_state else x


class TransNormerLLMBlock(nn.Module):
    """x + LightningAttention(norm(x)), then + W_3 (W_1 z * W_2 z), z = norm(x), norms without weight.

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: layer of layers sets the decays, `alibi_slopes` times 1 - layer / (layers - 1) + 1e-5;
    relative None turns q and k in layer 0 only; hidden None is 8 / 3 of dim.
    Equals: any cut of x in two calls that pass the state.
    Paper: Scaling TransNormer to 175 Billion Parameters (2307.14995).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 2,
        relative: bool | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= layer < layers:
            # A later layer would have a decay above 1, under which a memory grows without bound.
            raise OptionError("layer", layer, f"one of {layers} layers, counted from 0, is needed")
        slopes = alibi_slopes(heads) * (1 - layer / max(layers - 1, 1) + 1e-5)
        relative = layer == 0 if relative is None else relative
        self.mixer = LightningAttention(dim, heads, log_decay=slopes, relative=relative)
        self.norm = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.units = GatedUnits(dim, max(8 * dim // 3, 1) if hidden is None else hidden)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        need_tokens(self.mixer, x, self.mixer.dim, "[B, L, {dim}]")
        mixed, state = self.mixer(self.norm(x), state, cu_seqlens=cu_seqlens, return_state=True)
        x = x + mixed
        x = x + self.units(self.norm(x))
        return (x, state) if return_state else x
