import pytest
import torch

from foveal import Causal, Dense, Extent, Rectangle, Sliding, errors
from foveal.patterns import Pattern
from foveal.patterns.documents import Packed
from foveal.testing import check_pattern
from tests import pattern_rules as rules


@pytest.mark.parametrize(
    ("queries", "keys"), [((0, 5), (2, 9)), ((4, 4), (0, 3)), ((3, 99), (7, 99))]
)
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (17, 17), (5, 20), (20, 5)])
def test_equals_the_rule(queries: tuple[int, int], keys: tuple[int, int], Lq: int, Lk: int) -> None:
    def seen(i: int) -> set[int]:
        inside = queries[0] <= i < queries[1]
        return {j for j in range(Lk) if inside and keys[0] <= j < keys[1]}

    assert torch.equal(Rectangle(queries, keys).dense_mask(Lq, Lk), rules.mask_of(Lq, Lk, seen))


PREFIX = Causal() | Rectangle((0, 13), (0, 13))
JOINED = [
    Rectangle((3, 30), (5, 21)),
    PREFIX,
    Packed(PREFIX, (20, 7, 30)),
    Packed(Causal(), (20, 7, 30)) | Rectangle((20, 57), (0, 20)),
    Packed(Causal(), (20, 7, 30)) | Rectangle((27, 57), (0, 27)),
    Sliding(3, 3) | Rectangle((0, 57), (0, 5)) | Rectangle((0, 5), (0, 57)),
]


@pytest.mark.parametrize("pattern", JOINED, ids=repr)
def test_keeps_every_promise(pattern: Pattern, source: torch.Generator) -> None:
    check_pattern(pattern, [57], random_extents=0, seed=source.initial_seed())


@pytest.mark.parametrize("pattern", [Rectangle((3, 9), (5, 21)), PREFIX], ids=repr)
def test_keeps_every_promise_on_other_extents(pattern: Pattern, source: torch.Generator) -> None:
    extents = [1, Extent((20,), (50,)), Extent((50,), (20,)), (4, 5)]
    check_pattern(pattern, extents, seed=source.initial_seed())


def test_a_union_is_separable_exactly_where_its_intervals_join() -> None:
    extent = Extent((57,), (57,))
    assert [pattern.bounds(extent) is not None for pattern in JOINED] == [
        *(True, True, True),
        *(False, False, False),
    ]
    gap = Sliding(0) | Rectangle((0, 57), (0, 1))
    assert gap.bounds(extent) is None
    assert (Causal() | Rectangle((0, 57), (0, 57))).bounds(extent).pairs == 57 * 57


def test_whole_rectangle_is_dense() -> None:
    whole = Rectangle((0, 9), (0, 9)).bounds(Extent((9,), (9,)))
    dense = Dense().bounds(Extent((9,), (9,)))
    assert torch.equal(whole.lower[0], dense.lower[0])
    assert torch.equal(whole.upper[0], dense.upper[0])


@pytest.mark.parametrize("ends", [(3, 2), (-1, 4), (0, 1, 2), 5, (0, True), (0.0, 1)])
def test_ends_out_of_order_are_refused(ends: object) -> None:
    with pytest.raises(errors.PatternError, match="queries"):
        Rectangle(ends, (0, 1))
    with pytest.raises(errors.PatternError, match="keys"):
        Rectangle((0, 1), ends)
