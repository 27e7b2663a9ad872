"""Native sparse attention and chosen heads: a decode against the last row of a prefill."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.caches import KVShape, Paged
from foveal.compose import (
    NativeSparseCache,
    SparseBranches,
    attend_heads,
    decode_heads,
    native_sparse,
)

SIZES = (
    SparseBranches(4, 2, 8, 4, window=7),
    SparseBranches(4, 4, 4, 3, window=5),
    SparseBranches(6, 2, 4, 3, 1, 1, window=30),
)


@pytest.mark.parametrize("branches", SIZES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_a_step_is_the_last_row(
    branches: SparseBranches, groups: int, source: torch.Generator
) -> None:
    lengths, heads = [45, 3, 18], 2
    shape = KVShape(3, heads, 8, 6, dtype=torch.float64)
    cache = NativeSparseCache(shape, branches, pages=60, max_tokens=60)
    total = 50
    k = torch.randn(3, total, heads, 8, generator=source, dtype=torch.float64)
    v = torch.randn(3, total, heads, 6, generator=source, dtype=torch.float64)
    q = torch.randn(3, total, heads * groups, 8, generator=source, dtype=torch.float64)
    gates = torch.rand(3, 1, heads * groups, 3, generator=source, dtype=torch.float64)
    cache.append(k[:, :45], v[:, :45], counts=lengths)
    for step in range(4):
        for b, length in enumerate(lengths):
            assert int(cache.lengths[b]) == length + step
        rows = [slice(b, b + 1) for b in range(3)]
        newest = torch.cat(
            [q[r, n + step - 1 : n + step] for r, n in zip(rows, lengths, strict=True)]
        )
        o = cache.decode(newest, gates)
        for b, (r, n) in enumerate(zip(rows, lengths, strict=True)):
            stop = n + step
            exact = native_sparse(newest[r], k[r, :stop], v[r, :stop], gates[r], branches=branches)
            torch.testing.assert_close(o[b : b + 1], exact, rtol=1e-9, atol=1e-9)
        after = [x[torch.arange(3), torch.tensor(lengths) + step][:, None] for x in (k, v)]
        cache.append(*after)


@pytest.mark.parametrize("grid", [(9,), (3, 4)])
def test_chosen_heads(grid: tuple[int, ...], source: torch.Generator) -> None:
    q, k, v = (
        torch.randn(2, *grid, h, 4, generator=source, dtype=torch.float64).requires_grad_()
        for h in (6, 3, 3)
    )
    selection = fv.HeadSelection(torch.tensor([[0, 2], [1, -1]]))
    o = attend_heads(q, k, v, selection)
    mask = selection.mask(3).repeat_interleave(2, 1).view(2, *(1,) * len(grid), 6, 1)
    exact = torch.where(mask, fv.attend(q, k, v), 0.0)
    torch.testing.assert_close(o, exact)
    weight = torch.randn(o.shape, generator=source, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), weight) for x in (o, exact))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("per_head", [False, True])
def test_a_decode_of_chosen_heads(per_head: bool, source: torch.Generator) -> None:
    cache = Paged(KVShape(2, 3, 4, dtype=torch.float64), pages=40, page_size=3, per_head=per_head)
    k, v = (torch.randn(2, 11, 3, 4, generator=source, dtype=torch.float64) for _ in range(2))
    cache.append(k, v, counts=[11, 7])
    q = torch.randn(2, 2, 6, 4, generator=source, dtype=torch.float64)
    selection = fv.HeadSelection(torch.tensor([[0, 2], [1, -1]]))
    mask = selection.mask(3).repeat_interleave(2, 1)[:, None, :, None]
    exact = torch.where(mask, fv.decode(q, cache), 0.0)
    torch.testing.assert_close(decode_heads(q, cache, selection), exact)
