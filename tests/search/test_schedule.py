"""Amdahl's law, and which part comes next."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from foveal.search.schedule import Part, profiled, ranked, whole, work_down


def test_the_whole_follows_from_its_parts() -> None:
    assert whole([Part("a", 0.5, 2.0)]) == pytest.approx(1 / 0.75)
    assert whole([Part("a", 0.5, 2.0), Part("b", 0.5, 2.0)]) == pytest.approx(2.0)
    assert whole([]) == 1.0


def test_the_largest_gain_per_hour_comes_first() -> None:
    large, small = Part("large", 0.6), Part("small", 0.1, hoped=10.0)
    assert [part.name for part in ranked([small, large])] == ["large", "small"]
    slow = Part("large", 0.6, hours=100.0)
    assert [part.name for part in ranked([small, slow])] == ["small", "large"]


def test_parts_are_left_alone_when_nothing_more_comes() -> None:
    parts = [
        Part("rejected", 0.3, rejected=5),
        Part("at the limit", 0.3, of_roofline=0.95),
        Part("done", 0.3, speedup=2.0),
    ]
    assert ranked(parts) == []


def test_a_profile_adds_up_and_finds_the_product() -> None:
    x = torch.randn(256, 256)
    parts = profiled(lambda: torch.softmax(x @ x @ x, -1))
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    assert "mm" in {part.name for part in parts[:3]}


def test_the_list_is_worked_down() -> None:
    clock = [0.0]
    worked: list[str] = []

    def improve(part: Part, seconds: float) -> Part:
        clock[0] += seconds
        worked.append(part.name)
        if part.name == "large" and part.speedup < 1.5:
            return dataclasses.replace(part, speedup=part.speedup + 0.5)
        return dataclasses.replace(part, rejected=part.rejected + 5)

    parts = [Part("small", 0.1), Part("large", 0.7)]
    found = {p.name: p for p in work_down(parts, improve, 1e6, 60.0, lambda: clock[0])}
    assert worked == ["large", "large", "small"]
    assert found["large"].speedup == 1.5
    clock[0], worked[:] = 0.0, []
    work_down(parts, improve, 100.0, 60.0, lambda: clock[0])
    assert clock[0] == 100.0
    assert len(worked) == 2
