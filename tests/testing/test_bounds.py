import math

import pytest
import torch

from foveal.testing import check, check_near
from foveal.testing.bounds import INPUTS

EXACT = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)


def off(error: float) -> torch.Tensor:
    return EXACT + torch.tensor([0.0, error, 0.0, 0.0], dtype=torch.float64)


def test_twice_the_plain_error_passes_and_more_does_not() -> None:
    plain = off(1e-3).float()
    assert check("o", off(1.9e-3).float(), plain, EXACT).ok
    assert not check("o", off(2.1e-3).float(), plain, EXACT).ok


def test_one_rounding_is_granted_where_the_plain_result_is_exact() -> None:
    eps = torch.finfo(torch.float32).eps
    assert check("o", off(0.9 * 4 * eps).float(), EXACT.float(), EXACT).ok
    assert not check("o", off(3 * 4 * eps).float(), EXACT.float(), EXACT).ok


def test_the_rounding_is_that_of_the_largest_term() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    got = torch.full((4,), 5e-6)
    assert not check("dq", got, zero.float(), zero).ok
    assert check("dq", got, zero.float(), zero, terms=zero + 100.0).ok


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_be_so_on_both_sides(wrong: float) -> None:
    bad = EXACT.clone()
    bad[1] = wrong
    assert not check("o", bad.float(), EXACT.float(), EXACT).ok
    assert not check("o", EXACT.float(), bad.float(), bad).ok or wrong != wrong
    assert check("o", bad.float(), bad.float(), bad).ok


def test_other_shapes_and_empty_results() -> None:
    with pytest.raises(ValueError, match=r"\[2\].*\[4\]"):
        check("o", torch.ones(2), EXACT.float(), EXACT)
    assert check("o", torch.ones(0, 3), torch.ones(0, 3), torch.ones(0, 3)).ok


def test_a_verdict_says_what_was_allowed() -> None:
    assert str(check("dk", EXACT.float(), EXACT.float(), EXACT)).startswith("dk: error 0 <= ")


def test_an_error_taken_elsewhere_counts_like_a_plain_result() -> None:
    assert check("o", off(1.9e-3).float(), 1e-3, EXACT).ok
    assert not check("o", off(2.1e-3).float(), 1e-3, EXACT).ok


def refused_by_chance(inputs: int) -> float:
    """p(n) of the rule: |X| > 2 max |Y_i| for normal X and n normal Y."""
    step = 1e-3
    places = [step * i for i in range(1, 12_000)]
    density = math.sqrt(2 / math.pi)
    return step * sum(
        density * math.exp(-x * x / 2) * math.erf(x / math.sqrt(8)) ** inputs for x in places
    )


def test_the_number_of_inputs_is_that_of_the_derivation() -> None:
    assert refused_by_chance(1) == pytest.approx(0.295, abs=0.002)
    assert refused_by_chance(INPUTS) == pytest.approx(1.5e-5, rel=0.05)


def test_neighbours_are_visited_until_one_allows_the_error() -> None:
    visited = []

    def errors_at(number: int) -> dict[str, float]:
        visited.append(number)
        return {"o": 1e-3 if number == 3 else 1e-6, "lse": 1.0}

    found = {"o": off(1.9e-3).float(), "lse": EXACT.float()}
    exact = {"o": EXACT, "lse": EXACT}
    assert all(verdict.ok for verdict in check_near(found, exact, errors_at))
    assert visited == [0, 1, 2, 3]
    visited.clear()
    found["o"] = off(2.1e-3).float()
    assert [verdict.ok for verdict in check_near(found, exact, errors_at)] == [False, True]
    assert visited == list(range(INPUTS))


def test_results_that_are_missing_are_no_agreement() -> None:
    with pytest.raises(ValueError, match=r"found: got \['o'\]; exact are \['o', 'lse'\]"):
        check_near({"o": EXACT}, {"o": EXACT, "lse": EXACT}, lambda number: {"o": 0.0, "lse": 0.0})
