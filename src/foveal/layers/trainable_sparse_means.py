"""Attention to the blocks that means of keys choose, token by token: no gates, no parameters of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import SelectionError, ShapeError
from foveal._judged import judged
from foveal.layers.causal import rotary
from foveal.layers.state import LayerState, StateLayer, one_by_one, positions, ragged
from foveal.patterns import Blocks, BlockSelection, Causal
from foveal.selectors import Compressed, Forced, Tiling, TopK

_SCORES_AT_ONCE = 1 << 26
"""Scores of queries and means that are in memory at once."""


def mean_blocks(
    q: Tensor,
    k: Tensor,
    *,
    blocks: int,
    block: int,
    local: int,
    length: int,
    stride: int,
) -> BlockSelection:
    """The lists of `infllm_v2`, one per token and key head; no gradient."""
    if blocks < local + 1 or local < 1:
        needed = f"at least {local + 1}, for the first block and {local} >= 1 local ones"
        raise SelectionError("blocks", blocks, needed)
    Lq, Lk = q.shape[1], k.shape[1]
    selector, budget = Compressed(length, stride, "max"), Forced(TopK(blocks), 1, local)
    windows = max((Lk - length) // stride + 1, 1)
    rows = max(_SCORES_AT_ONCE // max(q.shape[0] * q.shape[2] * windows, 1), 1)
    kept, every = [], -(-Lk // block)
    with torch.no_grad():
        for first in range(0, Lq, rows):
            stop = min(first + rows, Lq)
            own, keys = q[:, first:stop], k[:, : Lk - Lq + stop]
            tiling = Tiling(stop - first, keys.shape[1], 1, block, True)
            visible = tiling.visible(q.device)
            scores = selector.scores(own, keys, tiling).masked_fill(~visible, -torch.inf)
            found = budget.keep(scores, tiling) & visible
            kept.append(torch.nn.functional.pad(found, (0, every - tiling.kv_blocks)))
    # A single query is a block of its own, however large blocks of queries are.
    return BlockSelection.from_block_mask(torch.cat(kept, dim=2), 64 if Lq == 1 else 1, block)


@judged
def infllm_v2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: int = 96,
    block: int = 64,
    local: int = 32,
    length: int = 32,
    stride: int = 16,
    dense_length: int = 8192,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention of every token to `blocks` blocks of keys: the first, local ones, and the best others.

    The score of block j is the largest, over the windows of `length` keys that overlap it and the one
    before its first, of the softmax over window means, summed over the query heads of a key head.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]; the last query stands on the last key.
    Options: local blocks behind a token, its own included; up to dense_length keys attention is causal,
    so that short texts behave as before training; stride divides length and block.
    Limits: the choice has no gradient.
    Equals: blocks >= ceil(Lk / block) is causal attention.
    Paper: InfLLM-V2 (2509.24663); the sparse layers of MiniCPM-SALA (2602.11761).
    """
    if k.shape[1] <= dense_length:
        return attend(q, k, v, Causal(), implementation=implementation)
    found = mean_blocks(q, k, blocks=blocks, block=block, local=local, length=length, stride=stride)
    return attend(q, k, v, Blocks(found) & Causal(), implementation=implementation)


class MeanBlockAttention(StateLayer):
    """y = W_o `infllm_v2` of projections of x, with rotary positions: the sparse layer of MiniCPM-SALA.

    `sparse_linear_stack(..., sparse=lambda: MeanBlockAttention(dim, heads))` is its stack.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`; the state holds keys and values
    [N, T, kv_heads, head_dim].
    Options: kv_heads, a divisor of heads, None is heads; head_dim None is dim / heads; rotary_base None
    leaves q and k without positions; the others as of `infllm_v2`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        blocks: int = 96,
        block: int = 64,
        local: int = 32,
        length: int = 32,
        stride: int = 16,
        dense_length: int = 8192,
        rotary_base: float | None = 10000.0,
    ) -> None:
        super().__init__(dim, heads)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ShapeError("kv_heads", kv_heads, f"a divisor of heads, {heads}, is needed")
        head_dim = dim // heads if head_dim is None else head_dim
        self.blocks, self.block, self.local = blocks, block, local
        self.length, self.stride, self.dense_length = length, stride, dense_length
        self.rotary_base = rotary_base
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        uneven = state is not None and ragged(state.tails[-1], 1 << 40)
        if cu_seqlens is not None or uneven:
            return one_by_one(x, state, cu_seqlens, self._piece)
        return self._piece(x, state)

    def _piece(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Sequences of one length, after as many tokens each."""
        places, after = positions(x, None if state is None else state.tails[-1], None)
        q = self.split(self.q(x))
        k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (self.k(x), self.v(x)))
        if self.rotary_base is not None:
            q, k = (rotary(y, places, self.rotary_base) for y in (q, k))
        if state is not None:
            seen = int(state.tails[-1][0])
            past = (y[:, y.shape[1] - seen :] for y in state.tails[:2])
            k, v = (torch.cat(pair, dim=1) for pair in zip(past, (k, v), strict=True))
        o = infllm_v2(
            q, k, v, blocks=self.blocks, block=self.block, local=self.local, length=self.length,
            stride=self.stride, dense_length=self.dense_length,
        )  # fmt: skip
        y: Tensor = self.out(o.flatten(-2))
        return y, LayerState((k, v, after))
