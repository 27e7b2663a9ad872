import pytest
import torch

import foveal as fv
from foveal import Blocks, BlockSelection, Extent
from foveal.testing import Sizes, check_attend, check_pattern, qkv


def lists_mask(selection: BlockSelection, Lq: int, Lk: int) -> torch.Tensor:
    batch, heads = selection.indices.shape[:2]
    mask = torch.zeros(batch, heads, Lq, Lk, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(Lq):
                for block in selection.indices[b, h, i // selection.q_block].tolist():
                    if block >= 0:
                        start = block * selection.kv_block
                        mask[b, h, i, start : min(start + selection.kv_block, Lk)] = True
    return mask


def draw(
    source: torch.Generator, batch: int, heads: int, extent: Extent, q_block: int, kv_block: int
) -> Blocks:
    shape = (batch, heads, -(-extent.Lq // q_block), -(-extent.Lk // kv_block))
    mask = torch.rand(shape, generator=source) < torch.rand((), generator=source)
    return Blocks(BlockSelection.from_block_mask(mask, q_block, kv_block))


EXTENTS = [Extent((24,), (24,)), Extent((13,), (21,)), Extent((21,), (13,)), Extent((1,), (1,))]


@pytest.mark.parametrize("extent", EXTENTS, ids=str)
@pytest.mark.parametrize(("q_block", "kv_block"), [(4, 4), (8, 3), (1, 5), (64, 64)])
def test_equals_the_lists_and_keeps_every_promise(
    extent: Extent, q_block: int, kv_block: int, source: torch.Generator
) -> None:
    for batch, heads in ((1, 1), (1, 2), (3, 2)):
        pattern = draw(source, batch, heads, extent, q_block, kv_block)
        got = pattern.dense_mask(extent.q_grid, extent.kv_grid)
        assert torch.equal(got, lists_mask(pattern.selection, extent.Lq, extent.Lk))
        check_pattern(pattern, [extent], random_extents=0, seed=source.initial_seed())


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("combine", ["alone", "causal", "window", "union"])
def test_lists_per_key_head_and_per_query_head(
    heads: int, batch: int, combine: str, source: torch.Generator
) -> None:
    lists = draw(source, batch, heads, Extent((22,), (22,)), 4, 3)
    pattern = {
        "alone": lists,
        "causal": lists & fv.Causal(),
        "window": fv.Sliding(7, 2) & lists,
        "union": lists | fv.Sliding(2),
    }[combine]
    q, k, v = qkv(Sizes((22,), batch=3, q_heads=6, kv_heads=2, value_dim=3), source)
    check_attend(q, k, v, pattern, implementation="cpu")


def test_all_blocks_equal_dense(source: torch.Generator) -> None:
    every = BlockSelection.from_block_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 8, 8)
    q, k, v = qkv(Sizes((22,), q_heads=2), source, torch.float64)
    got = fv.attend(q, k, v, Blocks(every), implementation="cpu")
    torch.testing.assert_close(got, fv.attend(q, k, v, fv.Dense(), implementation="reference"))


def test_empty_lists_give_zero_rows(source: torch.Generator) -> None:
    nothing = BlockSelection.from_block_mask(torch.zeros(1, 1, 3, 3, dtype=torch.bool), 8, 8)
    q, k, v = qkv(Sizes((22,), q_heads=2), source)
    for implementation in ("cpu", "reference"):
        o, lse = fv.attend(q, k, v, Blocks(nothing), return_lse=True, implementation=implementation)
        assert bool((o == 0).all())
        assert bool((lse == -torch.inf).all())
    check_attend(q, k, v, Blocks(nothing), implementation="cpu")


def test_mask_round_trip(source: torch.Generator) -> None:
    mask = torch.rand(2, 3, 5, 7, generator=source) < 0.4
    selection = BlockSelection.from_block_mask(mask, 4, 4)
    assert torch.equal(selection.block_mask(7), mask)
    assert torch.equal(selection.counts, mask.sum(-1))
    assert selection.density(28) == pytest.approx(float(mask.double().mean()))


def test_keys_of_different_lists_differ() -> None:
    """`key` promises that equal keys mean equal sets."""
    first = BlockSelection(torch.tensor([[[[0]]]], dtype=torch.int32), 4, 4)
    second = BlockSelection(torch.tensor([[[[1]]]], dtype=torch.int32), 4, 4)
    assert Blocks(first).key != Blocks(second).key
