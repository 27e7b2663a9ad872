import math

import pytest
import torch

from foveal import Extent, Fixed, Strided
from foveal.patterns.strided import Triangular
from foveal.testing import check_pattern
from tests import pattern_rules as rules

LENGTHS = [(1, 1), (23, 23), (5, 20), (20, 5), (1, 9), (9, 1)]


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Lq", "Lk"), LENGTHS)
def test_strided_equals_the_rule(stride: int, causal: bool, Lq: int, Lk: int) -> None:
    got = Strided(stride, causal).dense_mask(Lq, Lk)
    keys = lambda i: rules.strided_keys(Lk, i, stride, causal)  # noqa: E731
    assert torch.equal(got, rules.mask_of(Lq, Lk, keys))


@pytest.mark.parametrize(("stride", "summary"), [(1, 1), (4, 1), (4, 4), (6, 4), (7, 3), (30, 2)])
@pytest.mark.parametrize(("Lq", "Lk"), LENGTHS)
def test_fixed_equals_the_rule(stride: int, summary: int, Lq: int, Lk: int) -> None:
    got = Fixed(stride, summary).dense_mask(Lq, Lk)
    keys = lambda i: rules.fixed_keys(Lk, i, stride, summary)  # noqa: E731
    assert torch.equal(got, rules.mask_of(Lq, Lk, keys))


@pytest.mark.parametrize(
    "pattern",
    [
        Strided(1),
        Strided(3),
        Strided(5, causal=False),
        Strided(40),
        Fixed(4, 1),
        Fixed(6, 4),
        Fixed(1, 1),
        Fixed(40, 3),
        Fixed(8, 8),
    ],
)
def test_keeps_every_promise(pattern: Strided | Fixed, source: torch.Generator) -> None:
    extents = [1, 64, Extent((20,), (50,)), Extent((50,), (20,)), (4, 7)]
    check_pattern(pattern, extents, seed=source.initial_seed())


@pytest.mark.parametrize("step", [1.0, 0.37, 1.9])
def test_triangular_steps_grow_by_one(step: float) -> None:
    queries, keys = 17, 23
    mask = Triangular(step).dense_mask(queries, keys)
    for i in range(queries):
        offsets = {s * t * (t + 1) // 2 for t in range(60) for s in (1, -1)}
        columns = {math.trunc(step * i + o) for o in offsets}
        assert set(mask[i].nonzero()[:, 0].tolist()) == {c for c in columns if 0 <= c < keys}
    check_pattern(Triangular(step), [17, Extent((9,), (20,))], random_extents=0)
