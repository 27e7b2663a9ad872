import itertools

import pytest
import torch

import foveal as fv
from foveal.testing import check_attend, check_pattern

ONE_AXIS = [
    fv.Dense(),
    fv.Causal(),
    fv.Sliding(4, 2),
    fv.Sliding(2, sink_tokens=3),
    fv.Neighborhood(5, 2),
    fv.Neighborhood(3, dilation=2),
    fv.Neighborhood(3, border="wrap"),
    fv.Strided(3),
    fv.Fixed(4, 1),
    fv.Partition(4, 1),
]
PAIRS = list(itertools.combinations(ONE_AXIS, 2))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda p: p.key)
def test_pairs_are_and_and_or(first: fv.Pattern, second: fv.Pattern) -> None:
    a, b = first.dense_mask(18, 18), second.dense_mask(18, 18)
    assert torch.equal((first & second).dense_mask(18, 18), a & b)
    assert torch.equal((first | second).dense_mask(18, 18), a | b)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda p: p.key)
def test_keeps_every_promise(
    first: fv.Pattern, second: fv.Pattern, source: torch.Generator
) -> None:
    seed = source.initial_seed()
    check_pattern(first & second, [18], random_extents=1, seed=seed)
    check_pattern(first | second, [18], random_extents=1, seed=seed)


@pytest.mark.parametrize(
    "pattern",
    [
        (fv.Causal() & fv.Strided(2, causal=False)) | fv.Partition(4),
        fv.Neighborhood((3, 3)) | fv.Axial(0) | fv.Axial(1),
        fv.Neighborhood((3, 3), dilation=2) & fv.Causal(),
        fv.Neighborhood((3, 3), border="wrap") & fv.Axial(1),
        (fv.Dense() & fv.Dense()) | fv.Causal(),
        fv.Axial(0) & fv.Axial(1),
        fv.Partition((3, 2), (1, 0)) & fv.Neighborhood((5, 5)),
        fv.Causal() & fv.Partition(4) & fv.Sliding(2),
    ],
    ids=lambda p: p.key,
)
def test_nested_combinations_keep_every_promise(
    pattern: fv.Pattern, source: torch.Generator
) -> None:
    extents = [21] if fv.Partition(4) in pattern.members else [(7, 6)]
    check_pattern(pattern, extents, random_extents=3, seed=source.initial_seed())


def test_simplify_drops_what_changes_nothing() -> None:
    extent = fv.Extent((8,), (8,))
    assert (fv.Dense() & fv.Causal()).simplify(extent) == fv.Causal()
    assert (fv.Dense() | fv.Causal()).simplify(extent) == fv.Dense()
    assert (fv.Causal() & fv.Causal()).simplify(extent) == fv.Causal()
    assert (fv.Sliding(8) & fv.Neighborhood(8, causal=True)).simplify(extent) == fv.Causal()
    assert (fv.Dense() & fv.Dense()).simplify(extent) == fv.Dense()


def test_written_keys_tell_the_sets_apart() -> None:
    keys = [p.key for p in ONE_AXIS]
    keys += [(a & b).key for a, b in PAIRS] + [(a | b).key for a, b in PAIRS]
    assert len(set(keys)) == len(keys)
    assert len({fv.Sliding(4), fv.Sliding(4), fv.Sliding(5)}) == 2


GRIDS = [
    (fv.Axial(0) | fv.Axial(1), (9, 11)),
    (fv.Axial(0) | fv.Axial(1), (16, 8)),
    (fv.Neighborhood((3, 3)) | fv.Causal(), (10, 17)),
    ((fv.Axial(0) | fv.Neighborhood((1, 3, 2))) & fv.Causal(), (5, 6, 4)),
    (fv.Partition((3, 4)) | fv.Axial(1), (20, 9)),
    ((fv.Axial(0) | fv.Axial(-1, True)) & fv.Neighborhood((5, 5)), (12, 12)),
]


@pytest.mark.parametrize(("pattern", "grid"), GRIDS, ids=str)
def test_on_a_grid_tiles_are_boxes(pattern: fv.Pattern, grid: tuple[int, ...]) -> None:
    (part,) = pattern.parts(fv.Extent(grid, grid)) or ()
    order, places = part.q_tokens[0], torch.arange(part.extent.Lq)
    mask = part.pattern.allows(places[:, None], places[None], part.extent)
    assert torch.equal(mask, pattern.dense_mask(grid, grid)[order][:, order])
    for tile in ((1, 1), (5, 3), (16, 16), (64, 64), (64, 32)):
        states = part.pattern.tile_map(part.extent, *tile)
        spread = states.repeat_interleave(tile[0], 0)[: len(places)]
        spread = spread.repeat_interleave(tile[1], 1)[:, : len(places)]
        assert not (mask & (spread == 0)).any()
        assert not (~mask & (spread == 2)).any()
    check_pattern(pattern, [grid], random_extents=1)


def test_a_cross_visits_its_row_and_column_of_tiles() -> None:
    grid = (96, 96)
    (part,) = (fv.Axial(0) | fv.Axial(1)).parts(fv.Extent(grid, grid)) or ()
    states = part.pattern.tile_map(part.extent, 64, 64)
    assert int((states > 0).sum()) == 144 * (12 + 12 - 1)


def test_members_that_are_no_boxes_keep_raster_order() -> None:
    pattern = fv.Neighborhood((3, 3), dilation=2) | fv.Axial(0)
    assert pattern.parts(fv.Extent((9, 9), (9, 9))) is None


def test_lists_per_key_head_join_lists_per_query_head(source: torch.Generator) -> None:
    """Four query heads on two key heads; one member is listed for the former, the other for the latter."""
    per_query = torch.rand(1, 4, 5, 6, generator=source) < 0.6
    per_key = torch.rand(2, 2, 7, 4, generator=source) < 0.6
    ends = torch.randint(0, 40, (2, 2, 23), generator=source)
    of_queries = fv.Blocks(fv.BlockSelection.from_block_mask(per_query, 4, 4))
    of_keys = fv.Blocks(fv.BlockSelection.from_block_mask(per_key, 3, 6))
    shapes = ((2, 19, 4, 3), (2, 23, 2, 3), (2, 23, 2, 5))
    q, k, v = (torch.randn(shape, generator=source) for shape in shapes)
    drawn = [p.dense_mask(19, 23) for p in (of_queries, of_keys, fv.Lifetimes(ends))]
    queries, keys, lives = (m.repeat_interleave(4 // m.shape[1], 1) for m in drawn)
    for pattern, mask in (
        (of_queries & of_keys, queries & keys),
        (of_keys | of_queries, keys | queries),
        (
            (of_keys & fv.Sliding(9)) | of_queries,
            (keys & fv.Sliding(9).dense_mask(19, 23)) | queries,
        ),
        (of_queries & fv.Lifetimes(ends), queries & lives),
        (fv.Lifetimes(ends) | of_queries, queries | lives),
    ):
        assert torch.equal(pattern.dense_mask(19, 23).expand(mask.shape), mask)
        for implementation in ("cpu", "reference"):
            check_attend(q, k, v, pattern, implementation=implementation)
