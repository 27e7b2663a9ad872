"""What every selector promises: the engine takes its lists, and with everything kept nothing changes."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.patterns.blocks import Blocks
from foveal.patterns.dense import Causal
from foveal.selectors.base import Selector, Tiling, select
from foveal.selectors.budgets import TopK

_LENGTHS = ((45, 45), (37, 45), (8, 8), (1, 45))


def check_selector(
    selector: Selector,
    *,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    block: int = 8,
    per_query: bool = True,
    generator: torch.Generator | None = None,
) -> None:
    """Raises AssertionError where a selector breaks a promise, on random float64 inputs of odd lengths.

    Its scores have the shape that is asked for and hold no NaN; lists hold nothing that a causal tile
    cannot see; with every block kept, outputs and gradients are those of causal attention; per_query: the
    last queries alone find the lists that they find among all, so that prefill may come in chunks and
    decode agrees with it (not so for a selector that looks at other queries).
    """
    for Lq, Lk in _LENGTHS:
        q, k, v = (
            torch.randn(
                2, n, h, head_dim, generator=generator, dtype=torch.float64
            ).requires_grad_()
            for n, h in ((Lq, q_heads), (Lk, kv_heads), (Lk, kv_heads))
        )
        tiling = Tiling(Lq, Lk, block, block, True)
        with torch.no_grad():
            scores = selector.scores(q.detach(), k.detach(), tiling)
        assert scores.shape[-2:] == (tiling.q_blocks, tiling.kv_blocks), list(scores.shape)
        assert scores.shape[1] in (1, kv_heads, q_heads), list(scores.shape)
        visible = tiling.visible(q.device)
        assert not scores.masked_fill(~visible, 0.0).isnan().any(), "scores hold NaN"
        every = select(q, k, selector, TopK(tiling.kv_blocks), q_block=block, kv_block=block)
        assert not (every.block_mask(tiling.kv_blocks) & ~visible).any()
        _check_same(q, k, v, Blocks(every))
        if per_query and Lq > 1:
            _check_chunk(q, k, selector, block)


def _check_same(q: Tensor, k: Tensor, v: Tensor, pattern: Blocks) -> None:
    sides = [attend(q, k, v, each) for each in (pattern & Causal(), Causal())]
    torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-9)
    gradients = (torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in sides)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def _check_chunk(q: Tensor, k: Tensor, selector: Selector, block: int) -> None:
    blocks = -(-k.shape[1] // block)
    whole, last = (
        select(x, k, selector, TopK(2), q_block=1, kv_block=block).block_mask(blocks)
        for x in (q, q[:, -3:])
    )
    assert torch.equal(whole[:, :, -last.shape[2] :], last), "a chunk of queries finds other lists"
