"""Every selector with every budget: identities that hold for all of them, then what each one says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal import selectors as fs
from foveal.compose import attend_selected
from foveal.engines.tile.low_bit import rounded
from foveal.selectors.base import against_keys, tile_means
from foveal.testing import check_selector

double = torch.float64


def tensors(source: torch.Generator, Lq: int = 37, Lk: int = 45) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two key heads; lengths that no block divides."""
    return (
        torch.randn(2, Lq, 4, 8, generator=source, dtype=double),
        torch.randn(2, Lk, 2, 8, generator=source, dtype=double),
        torch.randn(2, Lk, 2, 3, generator=source, dtype=double),
    )


Make = Callable[[torch.Generator, Tensor, Tensor], Any]

# One small example of every selector: a new one is tested by a line here.
SELECTORS: dict[str, Make] = {
    "pooled": lambda source, q, k: fs.Pooled(),
    "pooled, centred": lambda source, q, k: fs.Pooled(softmax=False, centred=True),
    "pooled, guarded": lambda source, q, k: fs.Pooled(similar=0.2),
    "antidiagonal": lambda source, q, k: fs.Antidiagonal(2),
    "last queries": lambda source, q, k: fs.LastQueries(5),
    "low bit": lambda source, q, k: fs.LowBit(sink=3, local=5),
    "centroids": lambda source, q, k: fs.Centroids(count=7),
    "low rank": lambda source, q, k: fs.LowRank(fs.key_basis(k), 3),
    "compressed": lambda source, q, k: fs.Compressed(4, 2),
    "compressed, max": lambda source, q, k: fs.Compressed(4, 2, "max"),
    "gate": lambda source, q, k: fs.LearnedGate(
        torch.randn(2, 16, 4, generator=source), torch.randn(2, 24, 4, generator=source)
    ),
    "sampled": lambda source, q, k: fs.SampledMax(0.5, source),
    "key scores": lambda source, q, k: fs.KeyScores(
        torch.randn(2, 2, k.shape[1], generator=source)
    ),
    "reuse": lambda source, q, k: fs.Reuse(
        fs.select(q, k, fs.Pooled(), fs.TopK(2), q_block=8, kv_block=8)
    ),
    "stripes": lambda source, q, k: fs.Stripes(first=1),
}
BUDGETS: dict[str, fs.Budget] = {
    "top": fs.TopK(3),
    "ratio": fs.TopRatio(0.4),
    "mass": fs.Mass(0.7),
    "threshold": fs.Threshold(0.1),
    "forced": fs.Forced(fs.TopK(4), 1, 2),
    "forced on top": fs.Forced(fs.TopK(1), 1, 1, (2,), counted=False),
    "per head": fs.PerHead((fs.TopK(1), fs.TopRatio(0.5)) * 2),
    "projection": fs.Projection(2.5),
    "levels": fs.Levels(),
}
# Scores per tile and query alone, so that a chunk of queries finds what the whole finds (T10).
PER_QUERY = ("pooled", "low rank", "compressed", "gate", "key scores", "stripes")


@pytest.mark.parametrize("name", SELECTORS)
def test_everything_kept_is_causal_attention(name: str, source: torch.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(source))
    selector = SELECTORS[name](source, q, k)
    o = attend_selected(q, k, v, selector, fs.TopK(100), q_block=16, kv_block=8)
    exact = fv.attend(q, k, v, fv.Causal())
    torch.testing.assert_close(o, exact, rtol=1e-9, atol=1e-9)
    weight = torch.randn(o.shape, generator=source, dtype=double)
    gradients = (torch.autograd.grad(side, (q, k, v), weight) for side in (o, exact))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SELECTORS)
def test_lists_are_what_the_engine_takes(name: str, budget: str, source: torch.Generator) -> None:
    q, k, v = tensors(source)
    if budget == "per head" and name in ("compressed", "compressed, max", "gate", "key scores"):
        pytest.skip("a budget per query head; these score per key head")
    selector = SELECTORS[name](source, q, k)
    selection = fs.select(q, k, selector, BUDGETS[budget], q_block=8, kv_block=8)
    tiling = fs.Tiling(37, 45, 8, 8, True)
    assert not (selection.block_mask(6) & ~tiling.visible(q.device)).any()
    pattern = fv.Blocks(selection) & fv.Causal()
    o = fv.attend(q, k, v, pattern)
    torch.testing.assert_close(o, fv.attend(q, k, v, pattern, implementation="reference"))


@pytest.mark.parametrize("name", PER_QUERY)
def test_a_chunk_finds_what_the_whole_finds(name: str, source: torch.Generator) -> None:
    q, k, _ = tensors(source)
    selector = SELECTORS[name](source, q, k)
    whole = fs.select(q, k, selector, fs.TopK(2), q_block=1, kv_block=8).block_mask(6)
    last = fs.select(q[:, -5:], k, selector, fs.TopK(2), q_block=1, kv_block=8).block_mask(6)
    assert torch.equal(whole[:, :, -5:], last)


def test_selections_transpose_back(source: torch.Generator) -> None:
    mask = torch.rand(2, 3, 5, 7, generator=source) < 0.4
    selection = fv.BlockSelection.from_block_mask(mask, 8, 16)
    turned = selection.transposed(7)
    assert (turned.q_block, turned.kv_block) == (16, 8)
    assert torch.equal(turned.block_mask(5), mask.mT)
    assert torch.equal(turned.transposed(5).block_mask(7), mask)


def test_mass_keeps_a_block_and_the_whole(source: torch.Generator) -> None:
    tiling = fs.Tiling(6, 6, 1, 1, False)
    shares = torch.softmax(torch.randn(50, 3, 6, 6, generator=source), -1)
    assert (fs.Mass(0.0).keep(shares, tiling).sum(-1) == 1).all()
    assert fs.Mass(1.0).keep(shares.double(), tiling).sum(-1).min() >= 5
    one_hot = torch.eye(6)[None, None]
    assert torch.equal(fs.Mass(1.0).keep(one_hot, tiling), one_hot.bool())


def test_ties_go_to_the_lower_block() -> None:
    tiling = fs.Tiling(1, 5, 1, 1, False)
    kept = fs.TopK(2).keep(torch.tensor([[[[1.0, 3.0, 3.0, 3.0, 0.0]]]]), tiling)
    assert kept.flatten().tolist() == [False, True, True, False, False]


def test_projection_sums_to_its_size(source: torch.Generator) -> None:
    scores = torch.randn(4, 2, 3, 9, generator=source, dtype=double)
    shares = fs.Projection(2.5).shares(scores)
    torch.testing.assert_close(shares.sum(-1), torch.full((4, 2, 3), 2.5, dtype=double))
    apart = torch.arange(9, dtype=double).expand(1, 1, 1, 9) * 1.5
    assert torch.equal(fs.Projection(3).shares(apart).round(decimals=9), (apart >= 9).double())


def test_levels_follow_the_rank() -> None:
    levels = fs.Levels().levels(torch.arange(20.0).flip(0).expand(1, 1, 1, 20))
    assert levels.flatten().tolist() == [1] * 2 + [2] + [8] * 4 + [0] * 13


def test_smoothing_moves_no_softmax(source: torch.Generator) -> None:
    q, k, _ = tensors(source)
    tiling = fs.Tiling(37, 45, 8, 8, True)
    moved = k + torch.randn(1, 1, 2, 8, generator=source, dtype=double)
    for selector in (fs.Pooled(), fs.Pooled(centred=True), fs.LowBit(8, sink=3, local=5)):
        left, right = (selector.scores(q, x, tiling) for x in (k, moved))
        if isinstance(selector, fs.Pooled) and not selector.centred:
            whole = slice(0, 5)  # the last block holds fewer keys, each with the whole shift
            left, right = left[..., whole], right[..., whole]
        torch.testing.assert_close(left, right)


def test_low_bit_keeps_less_as_the_threshold_rises(source: torch.Generator) -> None:
    q, k, _ = tensors(source, 45)
    selector, before = fs.LowBit(sink=3, local=5), None
    for threshold in (0.0, 0.01, 0.1, 1.0, 1e9):
        value = math.log(threshold) if threshold else -math.inf
        mask = fs.select(q, k, selector, fs.Threshold(value), q_block=4, kv_block=4).block_mask(12)
        assert before is None or not (mask & ~before).any()
        before = mask
    assert before is not None
    diagonal = torch.eye(12, dtype=torch.bool)
    assert (before | ~diagonal).all()
    assert before[..., 0].all()


def test_low_bit_estimates_the_scores(source: torch.Generator) -> None:
    rows, unit = rounded(torch.randn(50, 64, generator=source), 4)
    assert rows.abs().max() == 7
    assert torch.equal(rows, rows.round())
    assert (rows.abs().amax(-1) == 7).all()
    assert unit.min() > 0


def test_all_directions_are_exact(source: torch.Generator) -> None:
    q, k, _ = tensors(source)
    exact = against_keys(q, k) / 8**0.5
    torch.testing.assert_close(fs.LowRank(fs.key_basis(k), 8).estimate(q, k), exact)


def test_clusters_of_single_keys_are_the_softmax(source: torch.Generator) -> None:
    q, k, _ = tensors(source)
    own = fs.Clusters(k.transpose(1, 2), torch.arange(45).expand(2, 2, -1), torch.ones(2, 2, 45))
    exact = torch.softmax(against_keys(q, k) / 8**0.5, -1)
    torch.testing.assert_close(own.shares(q), exact)
    found = fs.cluster(k, 5, generator=source)
    assert found.sizes.sum(-1).eq(45).all()
    for b, h, c in ((0, 0, 0), (1, 1, 4)):
        members = k[b, found.labels[b, h] == c, h]
        torch.testing.assert_close(found.centroids[b, h, c], members.mean(0))


def test_orders_of_keys(source: torch.Generator) -> None:
    importance = torch.randn(2, 3, 21, generator=source)
    order = fs.by_importance(importance, 8)
    assert torch.equal(order.sort(-1).values, torch.arange(21).expand(2, 3, -1))
    assert torch.equal(order // 8, (torch.arange(21) // 8).expand(2, 3, -1))
    falling = importance.gather(-1, order)[..., :8].diff(dim=-1) <= 0
    assert falling.all()
    assert fs.by_residue(7, 3).tolist() == [0, 3, 6, 1, 4, 2, 5]
    q, k, v = tensors(source, 45)
    shuffle = torch.rand(2, 2, 45, generator=source).argsort(-1)
    o = fv.attend(q, fs.permuted(k, shuffle), fs.permuted(v, shuffle))
    torch.testing.assert_close(o, fv.attend(q, k, v))


def test_plans_travel_as_json(tmp_path: Any) -> None:
    plan = {"0": [["VerticalSlash", {"vertical": 1000, "slash": 6096}]]}
    fs.save_plan(plan, tmp_path / "plan.json")
    assert fs.load_plan(tmp_path / "plan.json") == plan


def test_means_of_short_tiles(source: torch.Generator) -> None:
    x = torch.randn(1, 10, 2, 3, generator=source, dtype=double)
    torch.testing.assert_close(tile_means(x, 4)[:, -1], x[:, 8:].mean(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda q, k: fs.select(q, k, fs.Antidiagonal(3), fs.TopK(1), q_block=8, kv_block=8),
            "stride",
        ),
        (lambda q, k: fs.select(q, k, fs.Pooled(), fs.TopK(1), q_block=0), "q_block"),
        (lambda q, k: fs.select(q, k, fs.LowBit(), fs.TopK(1), causal=False), "causal"),
        (lambda q, k: fs.select(q, k, fs.Stripes(), fs.TopK(1), causal=False), "causal"),
        (lambda q, k: fs.select(q, k, fs.KeyScores(torch.ones(1, 1, 3)), fs.TopK(1)), "values"),
        (lambda q, k: fs.select(q, k, fs.Pooled(), fs.PerHead((fs.TopK(1),))), "budgets"),
        (lambda q, k: fs.Mass(1.5), "mass"),
        (lambda q, k: fs.TopK(-1), "blocks"),
        (lambda q, k: fs.TopK(math.nan), "blocks"),
        (lambda q, k: fs.TopK(2.5), "blocks"),
        (lambda q, k: fs.TopRatio(math.nan), "ratio"),
        (lambda q, k: fs.Mass("all"), "mass"),
        (lambda q, k: fs.Threshold(math.nan), "value"),
        (lambda q, k: fs.Projection(math.nan), "blocks"),
        (lambda q, k: fs.Projection(-1), "blocks"),
        (lambda q, k: fs.Forced(fs.TopK(1), sinks=-1), "sinks"),
        (lambda q, k: fs.Forced(fs.TopK(1), locals=-1), "locals"),
        (lambda q, k: fs.Forced(fs.TopK(1), blocks=(-1,)), "blocks"),
        (lambda q, k: fs.Forced(3), "budget"),
        (lambda q, k: fs.select(q, k, fs.Pooled(), fs.TopK(1), kv_block=2.5), "kv_block"),
        (lambda q, k: fs.LowBit(9), "bits"),
        (lambda q, k: fs.LowRank(torch.eye(4)[None], 5), "latent_dim"),
        (lambda q, k: fs.cluster(k, 0), "count"),
        (lambda q, k: fs.VerticalSlash(0), "vertical"),
        (lambda q, k: fs.VerticalSlash().select(q, k), "as many queries"),
    ],
)
def test_bad_input_is_named(
    make: Callable[[Tensor, Tensor], object], message: str, source: torch.Generator
) -> None:
    q, k, _ = tensors(source)
    with pytest.raises(fv.errors.SelectionError, match=message):
        make(q, k)


def test_tensors_that_do_not_fit_are_named(source: torch.Generator) -> None:
    q, k, _ = tensors(source)
    for pair, said in (
        ((q[0], k), r"^q: got \["),
        ((q, k[..., :1]), r"^k: got \["),
        ((q, k[:, :, :1].expand(-1, -1, q.shape[2] + 1, -1)), "^k: got .* query heads"),
        ((q, k.float()), "^k: got torch.float32"),
        ((q.long(), k.long()), "^q: got torch.int64"),
        ((None, k), "^q: got None"),
    ):
        with pytest.raises(fv.errors.FovealError, match=said):
            fs.select(*pair, fs.Pooled(), fs.TopK(1))


@pytest.mark.parametrize("name", [*PER_QUERY, "last queries", "centroids"])
def test_the_shipped_check_passes(name: str, source: torch.Generator) -> None:
    if name in ("centroids", "key scores", "stripes"):
        pytest.skip("made for one length, or for lengths that its anchors reach")
    _, k, _ = tensors(source)
    check_selector(SELECTORS[name](source, k, k), per_query=name in PER_QUERY, generator=source)


def test_the_shipped_check_finds_what_is_wrong() -> None:
    class Later:
        """Looks at the last query of all."""

        def scores(self, q: Tensor, k: Tensor, tiling: fs.Tiling) -> Tensor:
            means = tile_means(k, tiling.kv_block)
            return against_keys(q[:, -1:], means).expand(-1, -1, tiling.q_blocks, -1) * (
                torch.arange(tiling.q_blocks)[:, None] - tiling.q_blocks / 2
            )

    with pytest.raises(AssertionError, match="other lists"):
        check_selector(Later())
