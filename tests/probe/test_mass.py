"""Kept mass and block mass against the softmax written out."""

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.probe.mass import block_mass, heaviest_blocks, kept_mass, keys_per_row, whole

L, HEADS, KV_HEADS, D = 83, 4, 2, 12


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    shapes = ((2, L, HEADS, D), (2, L, KV_HEADS, D), (2, L, KV_HEADS, 7))
    q, k, v = (torch.randn(s, generator=source, dtype=torch.float64) for s in shapes)
    return q, k, v


def weights(q: Tensor, k: Tensor, mask: Tensor, scale: float = D**-0.5) -> Tensor:
    """The softmax as a matrix [B, Hq, L, L]."""
    k = k.repeat_interleave(HEADS // KV_HEADS, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def test_mass_equals_the_weights_that_are_kept(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    pattern = fv.Sliding(left=9, sink_tokens=2)
    full = weights(q, k, fv.Causal().dense_mask(L, L))
    expected = (full * pattern.dense_mask(L, L)).sum(-1).mean(-1)
    torch.testing.assert_close(kept_mass(q, k, v, pattern).mass, expected)


def test_error_equals_the_distance_of_the_outputs(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    pattern = fv.Strided(5)
    exact, kept = fv.attend(q, k, v, fv.Causal()), fv.attend(q, k, v, pattern)
    expected = (exact - kept).norm(dim=(1, 3)) / exact.norm(dim=(1, 3))
    torch.testing.assert_close(kept_mass(q, k, v, pattern).error, expected)


def test_the_whole_pattern_keeps_everything(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    within = fv.Sliding(left=20)
    kept = kept_mass(q, k, v, fv.Sliding(left=50), within=within)
    torch.testing.assert_close(kept.mass, torch.ones(2, HEADS, dtype=torch.float64))
    assert kept.error.max() < 1e-12


def test_keys_are_counted_within(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    pattern, within = fv.Strided(3), fv.Sliding(left=20)
    pairs = int((pattern & within).dense_mask(L, L).sum())
    assert (kept_mass(q, k, v, pattern, within=within).keys == pairs / L).all()


def test_several_patterns_share_one_whole(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    score = fv.Softmax(scale=0.7, soft_cap=2.0)
    shared = whole(q, k, v, score, fv.Sliding(left=30))
    one = kept_mass(q, k, v, fv.Sliding(left=5), score, shared)
    alone = kept_mass(q, k, v, fv.Sliding(left=5), score, fv.Sliding(left=30))
    torch.testing.assert_close(one.mass, alone.mass)
    torch.testing.assert_close(one.error, alone.error)


def test_rows_without_any_key_do_not_count() -> None:
    source = torch.Generator().manual_seed(5)
    q = torch.randn(1, 6, 1, 4, generator=source)
    k = torch.randn(1, 4, 1, 4, generator=source)
    mass = kept_mass(q, k, k, fv.Sliding(left=0)).mass
    full = kept_mass(q[:, 2:], k, k, fv.Sliding(left=0)).mass
    torch.testing.assert_close(mass, full)


def test_block_mass_equals_the_summed_weights(qkv: tuple[Tensor, ...]) -> None:
    q, k, _ = qkv
    block = 16
    full = weights(q, k, fv.Causal().dense_mask(L, L))
    found = block_mass(q, k, block=block)
    assert found.shape == (2, HEADS, 6, 6)
    for i in range(6):
        rows = full[:, :, i * block : (i + 1) * block]
        for j in range(6):
            expected = rows[..., j * block : (j + 1) * block].sum(-1).mean(-1)
            torch.testing.assert_close(found[:, :, i, j], expected)


def test_no_other_blocks_keep_more(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    mass = block_mass(q, k, block=16)
    best = kept_mass(q, k, v, fv.Blocks(heaviest_blocks(mass, 2, 16))).mass
    source = torch.Generator().manual_seed(11)
    for _ in range(5):
        noise = torch.rand(mass.shape, generator=source)
        other = heaviest_blocks(torch.where(mass > 0, noise, 0.0), 2, 16)
        assert (kept_mass(q, k, v, fv.Blocks(other)).mass <= best + 1e-12).all()


def test_selected_blocks_are_visible_ones(qkv: tuple[Tensor, ...]) -> None:
    q, k, _ = qkv
    selection = heaviest_blocks(block_mass(q, k, block=16), 4, 16)
    mask = selection.block_mask(6)
    assert not mask[..., torch.ones(6, 6, dtype=torch.bool).triu(1)].any()
    assert selection.counts.max() == 4


def test_a_selection_needs_a_block() -> None:
    with pytest.raises(fv.errors.SelectionError, match="at least 1 block"):
        heaviest_blocks(torch.ones(1, 1, 2, 2), 0, 16)


def test_keys_per_row_of_a_data_dependent_pattern(qkv: tuple[Tensor, ...]) -> None:
    q, k, _ = qkv
    blocks = fv.Blocks(heaviest_blocks(block_mass(q, k, block=16), 2, 16))
    expected = (blocks & fv.Causal()).dense_mask(L, L).sum((-2, -1)) / L
    found = keys_per_row(blocks & fv.Causal(), fv.Extent((L,), (L,)))
    torch.testing.assert_close(found, expected.double())


def test_lists_per_key_head_count_for_their_query_heads(source: torch.Generator) -> None:
    q = torch.randn(1, 32, 4, 8, generator=source)
    k, v = (torch.randn(1, 32, 2, 8, generator=source) for _ in range(2))
    mask = torch.rand(1, 2, 4, 4, generator=source) < 0.6
    kept = kept_mass(q, k, v, fv.Blocks(fv.BlockSelection.from_block_mask(mask, 8, 8)))
    assert kept.keys.shape == kept.mass.shape == (1, 4)
    assert torch.equal(kept.keys[:, 0], kept.keys[:, 1])
