"""What counts as a change between two runs."""

import itertools

import pytest

from foveal.bench.compare import compare, mann_whitney, other_machine
from foveal.bench.record import MEASURED, Record


def _record(samples: list[float], device: str = "x") -> Record:
    return Record(
        run="r",
        case={"name": "case"},
        key="k",
        competitor="foveal",
        title="foveal",
        status=MEASURED,
        samples={"forward": samples},
        environment={"device_name": device},
    )


def _verdict(old: list[float], new: list[float]) -> str:
    return compare([_record(old)], [_record(new)])[0].verdict


BASE = [1.00, 1.01, 0.99, 1.02, 0.98, 1.005, 0.995, 1.015]


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.2, "slower"), (0.8, "faster"), (1.03, "same"), (1.0, "same")]
)
def test_moves_beyond_noise_and_threshold_are_marked(factor: float, verdict: str) -> None:
    assert _verdict(BASE, [factor * value for value in BASE]) == verdict


def test_noise_is_not_a_change() -> None:
    noisy = [1.0, 1.6, 0.9, 1.4, 1.1, 1.3]
    assert _verdict(noisy, [value * 1.1 for value in reversed(noisy)]) == "same"


def test_three_samples_are_too_few() -> None:
    assert _verdict([1.0, 1.1, 1.2], [2.0, 2.1, 2.2]) == "too few samples"


def test_p_value_equals_counting_all_arrangements() -> None:
    a, b = [1.0, 4.0, 6.0], [2.0, 3.0, 5.0, 7.0]

    def distance(chosen: tuple[float, ...]) -> float:
        rest = [x for x in (*a, *b) if x not in chosen]
        return abs(sum(x > y for x in chosen for y in rest) - len(a) * len(b) / 2)

    arrangements = list(itertools.combinations((*a, *b), len(a)))
    extreme = sum(distance(each) >= distance(tuple(a)) for each in arrangements)
    assert mann_whitney(a, b) == pytest.approx(extreme / len(arrangements))


def test_equal_samples_never_differ() -> None:
    assert mann_whitney([1.0] * 6, [1.0] * 6) == 1.0


def test_other_machines_are_said() -> None:
    assert other_machine([_record(BASE)], [_record(BASE)]) is None
    assert "x and y" in (other_machine([_record(BASE)], [_record(BASE, "y")]) or "")
