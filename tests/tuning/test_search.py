"""The search with a scripted timer: order, budget, continuation, and what it takes to win."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from foveal.bench import device_timer
from foveal.cli import _arguments, main, tune
from foveal.tuning import search, tile
from foveal.tuning.config import Config
from foveal.tuning.search import Kernel, candidates, kernels, refine
from foveal.tuning.store import Store

ALL = list(kernels())
FIRST = ALL[0]
SHIPPED = tile.shipped(FIRST.stage, "sm_90", FIRST.dim, FIRST.dtype)
TRIES = candidates(FIRST, SHIPPED)


class Script:
    """A timer whose seconds are written down; its clock runs as it measures."""

    def __init__(self, seconds: dict[Config, float], usual: float = 2.0) -> None:
        self.seconds, self.usual = seconds, usual
        self.calls: list[tuple[str, Config]] = []
        self.stop_at: int | None = None

    def __call__(self, kernel: Kernel, config: Config) -> float:
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((kernel.name, config))
        return self.seconds.get(config, self.usual)

    def clock(self) -> float:
        return float(len(self.calls))


@pytest.fixture(autouse=True)
def few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement is a file written: three kernels show what eighteen would."""
    monkeypatch.setattr(search, "kernels", lambda: iter(ALL[:3]))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store("a device", "some versions", tmp_path / "device.json")


def run_search(store: Store, script: Script, budget: float) -> list[tune.Outcome]:
    return refine(store, "sm_90", script, budget, lambda text, share: None, script.clock)


def test_takes_the_fastest(store: Store) -> None:
    outcomes = run_search(store, Script({TRIES[5]: 1.0, TRIES[6]: math.inf}), 1e6)
    assert len(outcomes) == 3
    assert outcomes[0].chosen == TRIES[5]
    assert outcomes[0].shipped_seconds / outcomes[0].seconds == 2.0
    assert store.read()[FIRST.name].config == TRIES[5]


def test_a_gain_within_noise_is_none(store: Store) -> None:
    assert run_search(store, Script({TRIES[5]: 1.99}), len(TRIES))[0].chosen == SHIPPED


def test_what_nobody_runs_stays_as_shipped(store: Store) -> None:
    assert run_search(store, Script({}, math.inf), len(TRIES))[0].chosen == SHIPPED


def test_goes_on_behind_its_budget(store: Store) -> None:
    first = Script({})
    outcomes = run_search(store, first, 4)
    assert len(first.calls) == 5
    assert outcomes[0].chosen is None
    assert (outcomes[0].tried, outcomes[0].candidates) == (5, len(TRIES))
    second = Script({TRIES[-1]: 1.0})
    assert run_search(store, second, 1e6)[0].chosen == TRIES[-1]
    assert not {config for name, config in second.calls if name == FIRST.name} & set(TRIES[1:5])


def test_an_interruption_loses_nothing(store: Store) -> None:
    script = Script({})
    script.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run_search(store, script, 1e6)
    assert len(store.read()[FIRST.name].seconds) == 3


@pytest.mark.parametrize("kernel", ALL, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_shipped_sizes_come_first(kernel: Kernel, architecture: str) -> None:
    shipped = tile.shipped(kernel.stage, architecture, kernel.dim, kernel.dtype)
    tries = candidates(kernel, shipped)
    assert tries[0] == shipped
    assert len(tries) == len(set(tries))


def test_tuned_sizes_go_before_shipped_ones(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Config(32, 32, 4, 1)
    store.add(FIRST.name, {found: 1.0}, found)
    monkeypatch.setattr(tile, "store", lambda device: store)
    device = torch.device("cuda", 0)
    tile.forget_tuned()
    try:
        assert tile.lookup(FIRST.stage, "sm_90", 100, torch.float16, device) == found
        assert tile.lookup(FIRST.stage, "sm_90", 64, torch.float16, device) != found
        with tile.forced(FIRST.stage, SHIPPED):
            assert tile.lookup(FIRST.stage, "sm_90", 100, torch.float16, device) == SHIPPED
    finally:
        tile.forget_tuned()


class NoTimer(Script):
    def __init__(self, device: torch.device) -> None:
        super().__init__({TRIES[5]: 1.0})


def on_a_device(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(tile, "store", lambda device: store)
    monkeypatch.setattr(tile, "architecture", lambda device: "sm_90")


def test_the_command_prints_what_it_found(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_device(store, monkeypatch)
    monkeypatch.setattr(device_timer, "DeviceTimer", NoTimer)
    assert main(["tune", "--budget", "10m"]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith(FIRST.name))
    assert row.split("  ")[-1] == "2.00x"
    assert str(SHIPPED) in row
    assert str(TRIES[5]) in row
    assert str(store.path) in text.replace("\n", "").replace(" " * 11, "")


def test_the_command_can_be_interrupted(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_device(store, monkeypatch)
    script = Script({})
    script.stop_at = 2
    monkeypatch.setattr(device_timer, "DeviceTimer", lambda device: script)
    assert main(["tune"]) == 130
    assert "goes on behind it" in capsys.readouterr().err


def test_the_command_names_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    for device, named in (("cpu", "a CUDA device is needed"), ("gpu!", "such as cuda:0")):
        assert main(["tune", "--device", device]) == 2
        assert named in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "--budget", "soon"])
    assert _arguments.seconds("1.5m") == 90.0
