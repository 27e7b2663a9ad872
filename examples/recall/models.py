"""Small language models that differ in nothing but how two layers mix tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foveal.layers import (
    BasedAttention,
    CausalAttention,
    GatedDeltaNet,
    HybridStack,
    KimiDeltaAttention,
    LayerState,
    LightningAttention,
    ShortConvolution,
    StackState,
    StateLayer,
)

MIXERS: dict[str, Callable[[int, int], StateLayer]] = {
    "softmax": lambda dim, heads: CausalAttention(dim, heads),
    "Based": lambda dim, heads: BasedAttention(dim, heads, feature_dim=8),
    "Lightning": lambda dim, heads: LightningAttention(dim, heads),
    "Gated DeltaNet": lambda dim, heads: GatedDeltaNet(
        dim, heads, head_dim=dim // heads, value_dim=dim // heads
    ),
    "KDA": lambda dim, heads: KimiDeltaAttention(dim, heads),
}


class Convolved(nn.Module):
    """mixer(x + convolution of the last four tokens), so that every layer can tell neighbours apart.

    Gated DeltaNet and KDA have convolutions of their own; the others need one for recall.
    """

    def __init__(self, dim: int, mixer: StateLayer) -> None:
        super().__init__()
        self.convolution = ShortConvolution(dim)
        self.mixer = mixer

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        tail = None if state is None else state.tails[0]
        inner = None if state is None else LayerState(state.tails[1:], state.memory)
        mixed, tail = self.convolution(x, tail, cu_seqlens)
        y, inner = self.mixer(x + mixed, inner, cu_seqlens=cu_seqlens, return_state=True)
        return (y, LayerState((tail, *inner.tails), inner.memory)) if return_state else y


class LanguageModel(nn.Module):
    """Logits of the next token [B, L, vocabulary] of tokens [B, L], by a `HybridStack`."""

    def __init__(self, name: str, vocabulary: int, dim: int, heads: int, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        mixer = MIXERS[name]
        self.stack = HybridStack(dim, [lambda: Convolved(dim, mixer(dim, heads))], depth)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stack(self.embedding(tokens)))
        return logits

    @torch.no_grad()
    def state_bytes(self, length: int) -> int:
        """What the model keeps of one sequence of `length` tokens."""
        device = self.head.weight.device
        return self._run(torch.zeros(1, length, dtype=torch.int64, device=device), None)[1].bytes

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, source: torch.Generator) -> Tensor:
        """`tokens` [B, L] and `count` more, each drawn from its distribution, one step at a time."""
        fresh, state = tokens, None
        for _ in range(count):
            logits, state = self._run(fresh, state)
            fresh = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=source)
            tokens = torch.cat([tokens, fresh], dim=1)
        return tokens

    def _run(self, tokens: Tensor, state: StackState | None) -> tuple[Tensor, StackState]:
        y, state = self.stack(self.embedding(tokens), state, return_state=True)
        return self.head(y), state
