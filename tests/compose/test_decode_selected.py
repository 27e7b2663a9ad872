"""A decode over listed blocks against `attend` with the same list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.caches import Contiguous, Joined, KVShape, Paged
from foveal.caches.base import Cache
from foveal.compose import decode_selected
from foveal.compose.decode_selected import listed_pages, listed_view, view_of
from foveal.errors import CacheError, SelectionError, ShapeError

LENGTHS = [37, 5, 0]


def made(kind: str, source: torch.Generator) -> Cache:
    shape = KVShape(3, 2, 8, dtype=torch.float64)
    cache: Cache
    if kind == "contiguous":
        cache = Contiguous(shape, max_tokens=48)
    else:
        per_head = kind == "per head"
        cache = Paged(shape, pages=60, page_size=6, per_head=per_head)
    for first, stop in ((0, 20), (20, 37)):
        k, v = (
            torch.randn(3, stop - first, 2, 8, generator=source, dtype=torch.float64)
            for _ in range(2)
        )
        cache.append(k, v, counts=[min(max(n - first, 0), stop - first) for n in LENGTHS])
    return cache


def listed(heads: int, block: int, source: torch.Generator) -> fv.BlockSelection:
    mask = torch.rand(3, heads, 1, -(-37 // block), generator=source) < 0.5
    return fv.BlockSelection.from_block_mask(mask, 1, block)


@pytest.mark.parametrize("kind", ["contiguous", "pages", "per head"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("block", [4, 6, 12])
def test_a_decode_is_the_last_row_of_a_prefill(
    kind: str, heads: int, block: int, source: torch.Generator
) -> None:
    cache = made(kind, source)
    selection = listed(heads, block, source)
    q = torch.randn(3, 1, 4, 8, generator=source, dtype=torch.float64)
    o, lse = decode_selected(q, cache, selection, return_lse=True)
    k, v = cache.dense()
    for b, length in enumerate(LENGTHS):
        blocks = -(-length // block)
        mask = selection.block_mask(-(-37 // block))[b : b + 1, ..., :blocks]
        own = fv.Blocks(fv.BlockSelection.from_block_mask(mask, 1, block))
        rows = q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]
        exact = _attend(rows, own)
        torch.testing.assert_close(o[b : b + 1], exact[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse[b : b + 1], exact[1], rtol=1e-9, atol=1e-9)


def _attend(rows: tuple[Tensor, ...], pattern: fv.Pattern) -> tuple[Tensor, Tensor]:
    if not rows[1].shape[1]:
        return torch.zeros_like(rows[0]), torch.full_like(rows[0][..., 0], -torch.inf)
    return fv.attend(*rows, pattern, return_lse=True, implementation="reference")


def test_all_blocks_are_a_decode(source: torch.Generator) -> None:
    cache = made("pages", source)
    q = torch.randn(3, 1, 4, 8, generator=source, dtype=torch.float64)
    whole = fv.BlockSelection(torch.arange(5, dtype=torch.int32).view(1, 1, 1, 5), 1, 8)
    torch.testing.assert_close(decode_selected(q, cache, whole), fv.decode(q, cache))


def test_what_does_not_fit_is_refused(source: torch.Generator) -> None:
    cache, selection = made("pages", source), listed(2, 4, source)
    q = torch.randn(3, 2, 4, 8, generator=source, dtype=torch.float64)
    with pytest.raises(ShapeError, match="one query per sequence"):
        decode_selected(q, cache, selection)
    with pytest.raises(SelectionError, match="is needed"):
        decode_selected(q[:, :1], cache, listed(3, 4, source))
    with pytest.raises(CacheError, match="one part"):
        decode_selected(q[:, :1], Joined([cache, cache]), selection)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("per_head", [False, True])
def test_a_list_becomes_pages_in_one_launch(per_head: bool, source: torch.Generator) -> None:
    shape = KVShape(3, 2, 64, device=torch.device("cuda"))
    cache = Paged(shape, pages=400, page_size=16, per_head=per_head)
    rows = torch.randn(3, 900, 2, 64, generator=source).bfloat16().cuda()
    cache.append(rows, rows, counts=[900, 5, 0])
    mask = torch.rand(3, 2, 1, 29, generator=source) < 0.5
    selection = fv.BlockSelection.from_block_mask(mask, 1, 32)
    view = view_of(cache)
    own = listed_view(view, selection)
    table, lengths = listed_pages(view, selection.indices[:, :, 0].cuda(), 32, 16)
    assert torch.equal(own.page_table, table)
    assert torch.equal(own.lengths, lengths)
    q = torch.randn(3, 1, 4, 64, generator=source).bfloat16().cuda()
    expected = decode_selected(q, cache, selection)
    listed = fv.BlockSelection(selection.indices.cuda(), 1, 32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode_selected(q, cache, listed)
    graph.replay()
    assert torch.equal(o, expected)
