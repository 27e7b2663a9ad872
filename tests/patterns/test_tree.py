import pytest
import torch

import foveal as fv
from foveal.patterns import Tree
from foveal.testing import check_attend, check_pattern


def levels(length: int, source: torch.Generator) -> torch.Tensor:
    """Random groups: contiguous ones on the first level, scattered ones above, some padding."""
    first = (torch.rand(length, generator=source) < 0.2).cumsum(0)
    second = torch.where(torch.rand(length, generator=source) < 0.3, first // 3, -1)
    third = torch.where(second.diff(prepend=second[:1]) != 0, 0, -1)
    groups = torch.stack([first, second, third])
    groups[:, length - 3 :] = -1
    return groups


@pytest.mark.parametrize("length", [5, 70, 150])
def test_a_common_group_on_any_level_is_seen(length: int, source: torch.Generator) -> None:
    groups = levels(length, source)
    pattern = Tree(groups)
    expected = torch.zeros(length, length, dtype=torch.bool)
    for level in groups.tolist():
        for i, own in enumerate(level):
            for j, other in enumerate(level):
                expected[i, j] |= own == other >= 0
    assert torch.equal(pattern.dense_mask(length, length), expected)
    assert not expected[-1].any()
    check_pattern(pattern, [length], random_extents=0)


def test_one_group_is_dense_and_one_level_are_documents(source: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 9, 2, 4, generator=source) for _ in range(3))
    one = fv.attend(q, k, v, Tree(torch.zeros(1, 9, dtype=torch.int64)))
    torch.testing.assert_close(one, fv.attend(q, k, v))
    documents = Tree(torch.tensor([[0] * 4 + [1] * 5]))
    packed = fv.attend(q, k, v, fv.Documents(), cu_seqlens=torch.tensor([0, 4, 9]))
    torch.testing.assert_close(fv.attend(q, k, v, documents), packed)


def test_tiles_are_skipped_and_full() -> None:
    sentence = torch.arange(512) // 64
    states = Tree(sentence[None]).tile_map(fv.Extent((512,), (512,)), 32, 32)
    assert torch.equal(
        states, 2 * Tree(torch.arange(16)[None] // 2).dense_mask(16, 16).to(torch.uint8)
    )


def test_equal_by_content() -> None:
    groups = torch.tensor([[0, 0, 1]])
    pattern = Tree(groups)
    groups[0, 2] = 5
    assert pattern == Tree(torch.tensor([[0, 0, 1]]))
    assert hash(pattern) == hash(Tree(torch.tensor([[0, 0, 1]], dtype=torch.int32)))
    assert pattern != Tree(groups)
    assert pattern.key != Tree(groups).key


def test_bad_groups_are_named() -> None:
    with pytest.raises(fv.errors.PatternError, match="levels"):
        Tree(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(fv.errors.PatternError, match="tokens"):
        Tree(torch.zeros(1, 3, dtype=torch.int64)).dense_mask(4, 4)


def documents(length: int) -> Tree:
    """Sections of 96 tokens that head sentences of 8, and a document over the sections."""
    i = torch.arange(length)
    return Tree(
        torch.stack(
            [
                i // 8,
                torch.where(i % 8 == 0, i // 96, -1),
                torch.where(i % 96 == 0, 0, -1),
            ]
        )
    )


def test_tokens_that_see_each_other_are_brought_together() -> None:
    pattern, extent = documents(2048), fv.Extent((2048,), (2048,))
    parts = pattern.parts(extent)
    assert parts is not None
    (part,) = parts
    order = part.q_tokens[0]
    assert torch.equal(order.sort().values, torch.arange(2048))
    assert torch.equal(part.k_tokens, part.q_tokens)
    moved = pattern.dense_mask(2048, 2048)[order][:, order]
    assert torch.equal(part.pattern.dense_mask(2048, 2048), moved)
    there, here = part.pattern.tile_map(extent, 64, 64), pattern.tile_map(extent, 64, 64)
    assert int((there > 0).sum()) < int((here > 0).sum()) / 2
    tiles = moved.view(32, 64, 32, 64)
    assert torch.equal(there == 2, tiles.all(3).all(1))
    assert not bool((tiles.any(3).any(1) & (there == 0)).any())
    assert Tree(torch.arange(2048)[None] // 64).parts(extent) is None


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_terms_follow_the_tokens(implementation: str, source: torch.Generator) -> None:
    pattern = Tree(torch.arange(320)[None] % 5)
    assert pattern.parts(fv.Extent((320,), (320,))) is not None
    q, k, v = (torch.randn(1, 320, 1, 4, generator=source) for _ in range(3))
    table = torch.randn(1, 639, generator=source)
    keys = torch.randn(1, 1, 320, generator=source)
    score = fv.Softmax() + fv.RelativeBias(table) + fv.KeyBias(keys)
    try:
        check_attend(q, k, v, pattern, score, implementation=implementation)
    except fv.errors.RefusedError as refusal:
        pytest.skip(f"refused: {refusal.reason}")
