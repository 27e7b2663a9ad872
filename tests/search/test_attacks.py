"""Every attack of the catalogue is rejected, at the stage that is there for it; honest programs pass."""

from __future__ import annotations

import statistics

import pytest

from foveal.search.task import source_program
from foveal.search.verify.judge import Judge, ratios
from foveal.search.verify.race import Rounds
from tests.search.attacks import ATTACKS, HONEST, SLOW, Attack

ROUNDS = Rounds(4, 1)


def test_an_honest_program_passes(judge: Judge) -> None:
    program = source_program(HONEST, "honest")
    verdict = judge.verify(program, ROUNDS)
    assert verdict.ok, verdict.findings[-1]
    assert judge.confirm(program).ok


def test_the_catalogue_is_large_and_names_are_not_repeated() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 25


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_gains_nothing(judge: Judge, attack: Attack) -> None:
    program = source_program(attack.text, "candidate")
    verdict = judge.verify(program, ROUNDS)
    if attack.stages == (SLOW,):
        assert verdict.ok, verdict.findings[-1]
        for samples in verdict.samples.values():
            assert statistics.median(ratios(samples)) < 0.5
    elif attack.stages == ("hidden",):
        assert verdict.ok
        assert not judge.confirm(program).ok
    else:
        assert not verdict.ok, f"{attack.name} passed"
        assert verdict.stage in attack.stages, verdict.findings[-1]
