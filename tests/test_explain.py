"""What explain() says is what attend() does."""

import json

import pytest
import torch

import foveal as fv
from foveal.testing import Sizes, qkv
from tests.problems import PATTERNS, Grids
from tests.watch import COMPUTING, Watch


@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=str)
def test_counts_equal_those_of_the_mask(pattern: fv.Pattern, grids: Grids) -> None:
    sizes = Sizes(*grids, batch=2, q_heads=4, kv_heads=2, head_dim=8, value_dim=5)
    q, k, v = (x.to("meta") for x in qkv(sizes, torch.Generator()))
    plan = fv.explain(q, k, v, pattern)
    pairs = int(pattern.dense_mask(*grids).sum())
    assert plan.tiles.pairs == pairs
    assert plan.flops == 2 * (8 + 5) * 2 * 4 * pairs
    o_elements = q.numel() // 8 * 5
    assert plan.bytes == 4 * (q.numel() + k.numel() + v.numel() + o_elements)
    assert 0 <= plan.tiles.visited <= plan.tiles.total
    assert plan.tiles.visited == plan.tiles.full + plan.tiles.partial


def test_counts_of_documents_and_lists() -> None:
    q = torch.empty(1, 40, 2, 8, device="meta")
    plan = fv.explain(q, q, q, fv.Causal(), cu_seqlens=torch.tensor([0, 10, 10, 40]))
    assert plan.tiles.pairs == 55 + 465
    mask = torch.tensor([[[[1, 0], [1, 1]], [[1, 1], [0, 1]]]]).bool()
    lists = fv.Blocks(fv.BlockSelection.from_block_mask(mask, 20, 20))
    assert fv.explain(q, q, q, lists).tiles.pairs == 3 * 400


def test_nothing_is_computed() -> None:
    q = torch.zeros(1, 64, 2, 8)
    with Watch() as watch:
        fv.explain(q, q, q, fv.Neighborhood(5))
    assert not watch.operators & (COMPUTING - {"sum"})


def test_says_it_in_words_and_in_json() -> None:
    q = torch.empty(1, 48, 48, 4, 64, device="meta")
    plan = fv.explain(q, q, q, fv.Neighborhood((13, 13)), fv.Softmax(soft_cap=5.0))
    text = str(plan)
    for part in ("cpu", "Neighborhood", "soft_cap=5.0", "sdpa", "tiles"):
        assert part in text
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["implementation"] == "cpu"
    assert data["tiles"]["visited"] == plan.tiles.visited
    assert plan.tiles.speedup_bound > 2
    assert plan.bound_seconds is None


def test_the_same_call_is_refused_as_by_attend() -> None:
    q = torch.empty(1, 8, 2, 4, device="meta")
    with pytest.raises(fv.errors.PatternError, match="window"):
        fv.explain(q, q, q, fv.Neighborhood(9))
