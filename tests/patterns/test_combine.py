import itertools

import pytest
import torch

import foveal as fv
from foveal.testing import check_pattern

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
