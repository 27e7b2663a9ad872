"""Spaces: every point valid, written in one way, one step from its neighbours."""

from __future__ import annotations

import random

import pytest

from foveal.errors import FovealError
from foveal.search.candidate import Candidate
from foveal.search.operators.parameters import _mutated
from foveal.search.space import Space, choice, flag, powers, steps

SPACE = Space(
    (
        powers("tile", 16, 128, 64),
        steps("stages", 1, 2, 3),
        flag("split"),
        powers("parts", 2, 8, needs=("split", (True,))),
        choice("loads", "plain", "block", "bulk"),
    ),
    lambda point: int(point["tile"]) * int(point["stages"]) <= 256,
)


def test_all_points_are_valid_and_different() -> None:
    points = list(SPACE.points())
    assert all(SPACE.valid(point) for point in points)
    assert len({Candidate(point).id for point in points}) == len(points)
    # 12 pairs of tile and stages less one, 1 + 3 states of split, 3 loads
    assert len(points) == 11 * 4 * 3


def test_a_parameter_that_does_not_count_is_written_in_one_way() -> None:
    point = {**SPACE.first, "split": False, "parts": 8}
    assert SPACE.clean(point) == SPACE.first


def test_random_points_mutants_and_neighbours_are_valid() -> None:
    source = random.Random(3)
    for _ in range(200):
        point = SPACE.draw(source)
        assert SPACE.valid(point)
        assert SPACE.clean(point) == point
        for near in SPACE.neighbours(point):
            assert SPACE.valid(near)
            assert near != point
        moved = SPACE.clean(_mutated(SPACE, point, source))
        assert all(moved[p.name] in p.values for p in SPACE.params)


def test_coordinates_are_in_the_unit_cube_and_tell_points_apart() -> None:
    rows = {tuple(SPACE.encode(point)) for point in SPACE.points()}
    assert len(rows) == len(list(SPACE.points()))
    assert all(0 <= x <= 1 for row in rows for x in row)


def test_the_start_is_the_declared_one() -> None:
    assert SPACE.first["tile"] == 64


@pytest.mark.parametrize("bad", [{"a": []}, {"a": 3}, {"a": [None]}])
def test_bad_spaces_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(FovealError, match="SPACE"):
        Space.of(bad)  # type: ignore[arg-type]
