"""Identical programs do not win, true gains are found: with modelled noise and with recorded noise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from foveal.search.acceptance import (
    CHALLENGE,
    CONFIRMATION,
    LOST,
    OPEN,
    WON,
    Looks,
    decide,
    least_successes,
    samples_to_next_look,
)
from foveal.search.simulate import Noise, modelled, rates, recorded

RECORDED = json.loads((Path(__file__).parent / "noise.json").read_text())


def noises() -> dict[str, Noise]:
    found = {"calm": modelled(0.005, 0.005, 0.0), "usual": modelled(), "busy": modelled(bursts=0.2)}
    return found | {name: recorded(pairs) for name, pairs in RECORDED.items()}


@pytest.mark.parametrize("name", noises())
def test_identical_programs_do_not_win(name: str) -> None:
    assert rates(noises()[name], 0.0, 300).wins == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", noises())
def test_false_wins_are_below_one_in_a_thousand_even_unconfirmed(name: str) -> None:
    found = rates(noises()[name], 0.0, 20_000, confirmed=False)
    assert found.wins <= 1e-3


@pytest.mark.parametrize("name", ["calm", "usual", "h100"])
def test_a_gain_of_three_percent_is_found(name: str) -> None:
    assert rates(noises()[name], 0.03, 60).wins >= 0.8


def test_few_successes_are_enough_only_if_a_fair_coin_has_none() -> None:
    for count, error in ((8, 4e-3), (13, 1.3e-4), (20, 2e-4), (40, 1e-4), (80, 1e-4)):
        least = least_successes(count, error)
        tail = sum(math.comb(count, k) for k in range(least, count + 1)) / 2**count
        more = sum(math.comb(count, k) for k in range(least - 1, count + 1)) / 2**count
        assert tail <= error < more
    sifted, sure = (sum(error for _, error in looks) for looks in (CHALLENGE, CONFIRMATION))
    assert sure <= 5e-4
    assert sifted * sure <= 1e-5


@pytest.mark.parametrize("looks", [CHALLENGE, CONFIRMATION])
def test_looks_follow_each_other(looks: Looks) -> None:
    count = 0
    for look, _ in looks:
        count += samples_to_next_look(count, looks)
        assert count == look
    assert samples_to_next_look(count, looks) == 0


def test_a_clear_gain_wins_and_a_clear_loss_is_given_up_early() -> None:
    assert decide({"a": [-0.1] * 13}).verdict == WON
    assert decide({"a": [-0.1] * 8}).verdict == OPEN
    assert decide({"a": [-0.1] * 8}, looks=CHALLENGE).verdict == WON
    assert decide({"a": [-0.1] * 7 + [0.0]}, looks=CHALLENGE).verdict == OPEN
    assert decide({"a": [0.1] * 8}).verdict == LOST


def test_a_case_that_loses_much_outweighs_a_gain() -> None:
    decision = decide({"a": [-0.3] * 20, "b": [0.05] * 20})
    assert decision.verdict == LOST
    assert "b" in decision.reason


def test_cases_are_weighted() -> None:
    samples = {"a": [-0.1] * 20, "b": [0.01] * 20}
    assert decide(samples).verdict == WON
    assert decide(samples, {"a": 1.0, "b": 20.0}).verdict == LOST
