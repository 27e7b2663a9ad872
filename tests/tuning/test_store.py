"""What was measured survives restarts, other writers, and files that nobody can read."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path

import pytest

from foveal.tuning.config import Config
from foveal.tuning.store import Measured, Store, folder

FAST, SLOW = Config(128, 64, 8, 3), Config(64, 64, 4, 2)


def store(path: Path, conditions: str = "triton 3.6.0") -> Store:
    return Store("NVIDIA H100 80GB HBM3", conditions, path / "device.json")


def test_keeps_what_is_added(tmp_path: Path) -> None:
    store(tmp_path).add("forward/128/half", {SLOW: 2e-3}, None)
    store(tmp_path).add("forward/128/half", {FAST: math.inf}, None)
    store(tmp_path).add("forward/128/half", {}, SLOW)
    found = store(tmp_path).read()
    assert found == {"forward/128/half": Measured(SLOW, {SLOW: 2e-3, FAST: math.inf})}
    assert not list(tmp_path.glob("*.tmp"))
    json.loads((tmp_path / "device.json").read_text(), parse_constant=pytest.fail)


def test_lies_where_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEAL_CACHE_DIR", str(tmp_path / "own"))
    assert folder() == tmp_path / "own"
    made = Store("NVIDIA H100 80GB HBM3", "")
    assert made.path == tmp_path / "own" / "tuning" / "nvidia-h100-80gb-hbm3.json"
    monkeypatch.delenv("FOVEAL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "foveal"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "foveal"


def test_other_conditions_are_not_read(tmp_path: Path) -> None:
    store(tmp_path).add("forward/64/half", {FAST: 1.0}, FAST)
    later = store(tmp_path, "triton 3.9.0")
    assert later.read() == {}
    later.add("forward/128/half", {SLOW: 1.0}, None)
    assert list(later.read()) == ["forward/128/half"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        '{"version": 99}',
        '{"version": 1, "conditions": "triton 3.6.0"}',
        '{"version": 1, "conditions": "triton 3.6.0", "kernels": {"a": {"config": "7x7"}}}',
        '{"version": 1, "conditions": "triton 3.6.0", "kernels": '
        '{"a": {"config": "100x64 warps 4 stages 2", "seconds": {}}}}',
    ],
)
def test_an_unreadable_file_is_named_and_put_aside(content: str, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"device.json is not read, the shipped sizes are used"):
        assert store(tmp_path).read() == {}
    store(tmp_path).add("a", {FAST: 1.0}, FAST)
    assert store(tmp_path).read()["a"].config == FAST
    assert path.with_suffix(".unreadable").read_text() == content


def add_many(path: Path, writer: int) -> None:
    for number in range(10):
        store(path).add(f"kernel {writer} {number}", {FAST: 1.0 + writer}, FAST)


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_many, args=(tmp_path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = store(tmp_path).read()
    assert len(found) == 40
    assert found["kernel 3 9"].seconds == {FAST: 4.0}


def test_configs_read_as_they_are_written() -> None:
    assert Config.parse(str(FAST)) == FAST
    for wrong in ("", "128x64", "128x64 warps 8 stages x", "128x64 warps 8 stages 99"):
        with pytest.raises(ValueError, match="size"):
            Config.parse(wrong)
