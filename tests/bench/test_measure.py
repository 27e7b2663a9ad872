"""Samples, memory and their summaries."""

import time

import pytest
import torch

from foveal.bench.measure import (
    BACKWARD,
    BOTH,
    FORWARD,
    Budget,
    measure,
    peak_memory,
    ratio,
    summarise,
)

CPU = torch.device("cpu")
SHORT = Budget(seconds=0.05, rounds=(4, 6), warm_up=0.0)


class Sleeper:
    def __init__(self, log: list[str], name: str, seconds: float, backward: bool) -> None:
        self.log, self.name, self.seconds, self.backward = log, name, seconds, backward

    def forward(self) -> None:
        self.log.append(self.name)
        time.sleep(self.seconds)

    def loss_and_gradients(self):
        if not self.backward:
            return None
        return (lambda: time.sleep(self.seconds)), (lambda out: time.sleep(2 * self.seconds))


def test_samples_are_paired_and_the_order_rotates() -> None:
    log: list[str] = []
    runners = {name: [Sleeper(log, name, 0.001, name == "a")] for name in "abc"}
    samples = measure(runners, CPU, SHORT)
    counts = {len(values) for each in samples.values() for values in each.values()}
    assert len(counts) == 1
    assert 4 <= counts.pop() <= 6
    assert "".join(log)[:12] == "abc" + "abc" + "bca" + "cab"


def test_passes_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves only where something sleeps: how busy the machine is does not show."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    samples = measure({"a": [Sleeper([], "a", 0.004, True)]}, CPU, SHORT)["a"]
    times = {part: summarise(values).median for part, values in samples.items()}
    assert times[FORWARD] == pytest.approx(0.004)
    assert times[BACKWARD] == pytest.approx(0.008)
    assert times[BOTH] == pytest.approx(0.012)


def test_runner_without_backward_has_forward_samples_only() -> None:
    assert list(measure({"a": [Sleeper([], "a", 0.0, False)]}, CPU, SHORT)["a"]) == [FORWARD]


def test_progress_ends_at_one() -> None:
    heard: list[float] = []
    measure({"a": [Sleeper([], "a", 0.001, False)]}, CPU, SHORT, heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_peak_memory_counts_what_is_freed_again() -> None:
    size = 2**24

    def run() -> torch.Tensor:
        return torch.ones(2, size // 4).sum(1)

    peak = peak_memory(run, CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert 1.9 * size <= peak < 2.5 * size


def test_what_a_run_keeps_counts_where_it_is_given_back_before() -> None:
    size = 2**24
    kept: list[torch.Tensor] = []

    def run() -> None:
        if not kept:
            kept.append(torch.ones(size // 4))

    peak = peak_memory(run, CPU, kept.clear)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert 0.9 * size <= peak < 1.5 * size


def test_summary_is_median_and_quartiles() -> None:
    summary = summarise([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (summary.low, summary.median, summary.high, summary.count) == (2.0, 3.0, 4.0, 5)
    assert summary.spread == pytest.approx(1 / 3)


def test_ratio_pairs_rounds() -> None:
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]).median == 2.0
    assert ratio([4.0], [1.0, 3.0, 2.0]).median == 2.0
