"""Stacks of layers that mix tokens in different ways, with one state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import OptionError, ShapeError
from foveal.layers.causal import CausalAttention, LatentAttention
from foveal.layers.delta import KimiDeltaAttention
from foveal.layers.heads import need_tokens
from foveal.layers.lightning import LightningAttention
from foveal.layers.state import LayerState
from foveal.layers.units import GatedUnits

Mixer = Callable[[], nn.Module]
"""Makes a layer called as layer(x, state, cu_seqlens=..., return_state=True), such as a `StateLayer`."""


class StackState(NamedTuple):
    """What a stack keeps of the tokens so far, one `LayerState` for each layer."""

    layers: tuple[LayerState, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> StackState:
        """The state with every tensor changed."""
        return StackState(tuple(layer.map(change) for layer in self.layers))

    def select(self, sequences: Tensor) -> StackState:
        """The states of some sequences by their numbers, int64 [M], as a beam search needs them."""
        return self.map(lambda x: x.index_select(0, sequences.to(x.device)))

    def detach(self) -> StackState:
        """The state without its history of operations."""
        return self.map(Tensor.detach)

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return sum(x.numel() * x.element_size() for each in self.layers for x in each.tensors())


class HybridStack(nn.Module):
    """Layers x + mixer(norm(x)), then x + W_3 (silu(W_1 z) * W_2 z), z = norm(x); a norm at the end.

    Layer i mixes tokens by `mixers[i mod len(mixers)]()`:
        HybridStack(512, [lambda: KimiDeltaAttention(512, 4)] * 3 + [lambda: CausalAttention(512, 4)], 8)
    is two times three layers of the first kind and one of the second.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: depth None is one layer for each mixer; hidden None is 8 / 3 of dim, rounded up to a
    multiple of 8.
    Equals: any cut of x in two calls that pass the state; packed, each sequence alone.
    """

    def __init__(
        self,
        dim: int,
        mixers: Sequence[Mixer],
        depth: int | None = None,
        *,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if not mixers:
            raise ShapeError("mixers", 0, "at least one is needed")
        if any(isinstance(each, nn.Module) for each in mixers):
            raise OptionError("mixers", "a layer", "functions that make layers are needed")
        depth = len(mixers) if depth is None else depth
        hidden = -(-(8 * dim) // 24) * 8 if hidden is None else hidden
        self.layers = nn.ModuleList(
            _Layer(dim, mixers[number % len(mixers)](), hidden) for number in range(depth)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        state: StackState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, StackState]:
        first = self.layers[0].get_submodule("mixer") if len(self.layers) else self
        need_tokens(first, x, self.norm.normalized_shape[-1], "[B, L, {dim}]")
        _need_layers(state, len(self.layers))
        after = []
        for number, layer in enumerate(self.layers):
            before = None if state is None else state.layers[number]
            x, kept = layer(x, before, cu_seqlens)
            after.append(kept)
        y = self.norm(x)
        return (y, StackState(tuple(after))) if return_state else y


def _need_layers(state: StackState | None, count: int) -> None:
    """Raises unless it is the state of a stack of `count` layers."""
    if state is None:
        return
    if not isinstance(state, StackState):
        raise OptionError("state", f"a {type(state).__name__}", "a StackState is needed")
    if len(state.layers) != count:
        needed = f"the state of {count} layers is needed"
        raise ShapeError("state", f"one of {len(state.layers)} layers", needed)


class _Layer(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.units = GatedUnits(dim, hidden, F.silu)
        self.norms = nn.ModuleList((nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)))

    def forward(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        mixed, state = self.mixer(self.norms[0](x), state, cu_seqlens=cu_seqlens, return_state=True)
        x = x + mixed
        return x + self.units(self.norms[1](x)), state


def kimi_linear_stack(
    dim: int, heads: int, depth: int, *, latent_dim: int | None = None, hidden: int | None = None
) -> HybridStack:
    """Three layers of `KimiDeltaAttention`, one of `LatentAttention` without positions, and again.

    Options: latent_dim None is dim / 4; hidden as for `HybridStack`.
    Paper: Kimi Linear (2510.26692), without its mixture of experts.
    """
    latent_dim = max(dim // 4, 1) if latent_dim is None else latent_dim

    def full() -> nn.Module:
        return LatentAttention(dim, heads, latent_dim=latent_dim, head_dim=dim // heads)

    mixers = [lambda: KimiDeltaAttention(dim, heads)] * 3
    return HybridStack(dim, [*mixers, full], depth, hidden=hidden)


def sparse_linear_stack(
    dim: int,
    heads: int,
    depth: int,
    *,
    sparse: Mixer | None = None,
    window: int = 512,
    hidden: int | None = None,
) -> HybridStack:
    """One sparse layer, three of `LightningAttention`, and again.

    Options: sparse makes the sparse layers; None is `CausalAttention` with a `window` and rotary
    positions; hidden as for `HybridStack`.
    Paper: the proportions of MiniCPM-SALA (2602.11761), whose sparse layers choose blocks of keys and lie
    where a search put them.
    """

    def windowed() -> nn.Module:
        return CausalAttention(dim, heads, window=window, rotary_base=10000.0)

    mixers = [lambda: LightningAttention(dim, heads)] * 3
    return HybridStack(dim, [windowed if sparse is None else sparse, *mixers], depth, hidden=hidden)
