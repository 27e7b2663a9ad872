"""Sizes by class of patterns: what belongs to which class, who goes before whom, and what changes a table."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import foveal as fv
from foveal.cli import main
from foveal.engines.tile.kinds import kind_of
from foveal.engines.tile.launch import separable
from foveal.errors import FovealError
from foveal.patterns.base import Extent
from foveal.patterns.documents import Packed
from foveal.search.verify import sizes
from foveal.search.verify.sizes import Checked
from foveal.tuning import tile
from foveal.tuning.config import Config
from foveal.tuning.proposal import Change, Timing, problems, propose
from foveal.tuning.store import Store
from foveal.tuning.tables import EXCEPTIONS, PATTERNS, architectures

ROOT = Path(__file__).resolve().parents[2]
LINE, PLANE = Extent((64,), (64,)), Extent((8, 8), (8, 8))
BLOCKS = fv.Blocks(
    fv.BlockSelection.from_block_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 16)
)
WRITTEN = "sm_90/backward_kv/64/half/causal=128x64 warps 4 stages 2"
FOUND = Change.parse("sm_90/backward_kv/64/half=128x64 warps 4 stages 2")


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    """What is looked up is kept; tables and stores change in these tests."""
    yield
    tile.shipped.cache_clear()
    tile.forget_tuned()


@pytest.mark.parametrize(
    ("pattern", "extent", "kind"),
    [
        (fv.Dense(), LINE, "dense"),
        (fv.Causal(), LINE, "causal"),
        (fv.Sliding(7), LINE, "window"),
        (fv.Neighborhood((3, 3)), PLANE, "window"),
        (fv.Sliding(7, sink_tokens=3), LINE, "lists"),
        (BLOCKS, LINE, "lists"),
        (BLOCKS & fv.Causal(), LINE, "lists"),
        (Packed(fv.Causal(), (24, 40)), LINE, "documents"),
        (Packed(fv.Dense(), (24, 40)) & fv.Causal(), LINE, "documents"),
    ],
    ids=str,
)
def test_classes_of_patterns(pattern: fv.Pattern, extent: Extent, kind: str) -> None:
    assert kind_of(pattern, separable(pattern, extent)) == kind


@pytest.mark.parametrize("architecture", architectures())
def test_without_an_exception_all_patterns_have_the_sizes_of_the_row(architecture: str) -> None:
    for stage in (tile.FORWARD, tile.BACKWARD_Q, tile.BACKWARD_KV):
        for dim in (16, 64, 100, 256):
            for dtype in (torch.bfloat16, torch.float32):
                row = tile.shipped(stage, architecture, dim, dtype)
                kind = "float32" if dtype == torch.float32 else "half"
                for pattern in PATTERNS:
                    size = next(s for s in tile.SIZES if dim <= s)
                    if (architecture, kind, stage, size, pattern) not in EXCEPTIONS:
                        assert tile.shipped(stage, architecture, dim, dtype, pattern) == row


def test_an_exception_holds_for_its_patterns_only(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Config(32, 32, 8, 1)
    row = tile.shipped("forward", "sm_80", 100, torch.float16)
    monkeypatch.setitem(EXCEPTIONS, ("sm_80", "half", "forward", 128, "window"), own)
    tile.shipped.cache_clear()
    found = {p: tile.lookup("forward", "sm_80", 100, torch.float16, pattern=p) for p in PATTERNS}
    assert found == {**dict.fromkeys(PATTERNS, row), "window": own}
    assert tile.lookup("forward", "sm_80", 64, torch.float16, pattern="window") != own


def test_measured_sizes_of_a_class_go_before_those_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store("a device", "some versions", tmp_path / "device.json")
    every, own = Config(32, 32, 4, 1), Config(64, 32, 4, 1)
    store.add(tile.kernel_name("forward", 128, torch.float16), {every: 1.0}, every)
    store.add(tile.kernel_name("forward", 128, torch.float16, "causal"), {own: 1.0}, own)
    monkeypatch.setattr(tile, "store", lambda device: store)
    tile.forget_tuned()
    found = [
        tile.lookup("forward", "sm_90", 128, torch.float16, torch.device("cuda", 0), pattern)
        for pattern in ("causal", "dense", None)
    ]
    assert found == [own, every, every]


def test_changes_are_written_as_they_are_read() -> None:
    change = Change.parse(WRITTEN)
    assert str(change) == WRITTEN
    assert change.entry == '("sm_90", "half", "backward_kv", 64, "causal"): Config(128, 64, 4, 2),'
    assert str(FOUND) == "sm_90/backward_kv/64/half=128x64 warps 4 stages 2"
    for wrong in ("", "sm_70/forward/64/half=64x64 warps 4 stages 2", WRITTEN + "0", WRITTEN[6:]):
        with pytest.raises(FovealError, match="is needed, such as"):
            Change.parse(wrong)


def timings(**gains: list[float]) -> list[Timing]:
    return [
        Timing(f"{pattern} {number}", pattern, number > 0, gain, 0.001, True)
        for pattern, every in gains.items()
        for number, gain in enumerate(every)
    ]


def reasons(every: list[Timing]) -> dict[str | None, str]:
    return {each.change.pattern: each.reason for each in propose({FOUND: every})}


def test_a_change_needs_held_out_gains_and_no_loss() -> None:
    found = reasons(
        timings(
            causal=[0.1, 0.06, 0.15],
            window=[0.2, 0.2, -0.02],
            dense=[0.2, 0.3],
            documents=[0.3, 0.03, 0.04],
        )
    )
    assert found["causal"] == ""
    assert "window 2 takes 2.0% more" in found["window"]
    assert "2 are needed" in found["dense"]
    assert "5% are needed" in found["documents"]


def test_a_change_of_all_patterns_needs_all_of_them() -> None:
    good = {"dense": [0.1, 0.1, 0.1], "causal": [0.1, 0.1, 0.1], "window": [0.1, 0.1, 0.1]}
    assert reasons(timings(**good)) == {None: ""}
    assert set(reasons(timings(**{**good, "lists": [0.1, -0.2, 0.1]}))) == {
        "dense",
        "causal",
        "window",
        "lists",
    }


def test_wrong_results_and_a_moved_control_stop_a_change() -> None:
    first, *rest = timings(causal=[0.1, 0.1, 0.1])
    wrong = Timing(first.problem, first.pattern, True, 0.1, 0.0, False)
    assert "out of bounds" in reasons([wrong, *rest])["causal"]
    moved = Timing(first.problem, first.pattern, True, 0.1, 0.03, True)
    assert "control" in reasons([moved, *rest])["causal"]
    (proposal,) = propose({FOUND: [first, *rest]})
    assert f'foveal verify "{WRITTEN}"' in str(proposal)


def test_exceptions_are_what_the_records_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("gpu_search")
    allowed = [
        proposal.change
        for proposal in script.proposals([ROOT / "benchmarks" / "search_h100.jsonl"])
        if not proposal.reason
    ]
    assert {
        (c.architecture, c.kind, c.stage, c.size, c.pattern): c.config for c in allowed
    } == EXCEPTIONS


def test_problems_are_of_their_class() -> None:
    change = Change.parse("sm_80/forward/64/half=16x16 warps 4 stages 1")
    assert set(problems(change)) == set(PATTERNS)
    for kind, found in problems(change).items():
        for problem in found:
            grid = problem["grid"]
            extent = Extent(grid, grid)
            pattern = problem["pattern"].simplify(extent)
            if "cu_seqlens" in problem:
                first, second, end = problem["cu_seqlens"]
                assert (first, end) == (0, grid[0])
                pattern = Packed(pattern, (second, end - second))
            assert kind_of(pattern, separable(pattern, extent)) == kind


def test_verify_judges_a_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = Checked("compiled", "for sm_90: 255 registers", "", 1.0)
    monkeypatch.setattr(sizes, "check_compiled", lambda change: fine)
    for wrong, status in (("", 0), ("o is out of bounds", 1)):
        found = [Checked("lists", "Sliding(48, 0, sink_tokens=17), 171 tokens", wrong, 2.0)]
        monkeypatch.setattr(sizes, "check_change", lambda *_, found=found: found)
        change = WRITTEN.replace("causal", "lists")
        assert main(["verify", change]) == status
        text = capsys.readouterr()
        assert str(tile.shipped("backward_kv", "sm_90", 64, torch.bfloat16, "lists")) in text.out
        assert change in text.out
        assert wrong in text.err
    assert main(["verify", "sm_90/forward=1"]) == 2
    assert "is needed, such as" in capsys.readouterr().err


@pytest.mark.slow
def test_sizes_are_compiled_and_run_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    change = Change.parse("sm_90/forward/64/half/window=32x16 warps 4 stages 2")
    assert sizes.check_compiled(change).wrong == ""
    found = sizes.check_change(change, "cpu", lambda text, share: None)
    assert [each.wrong for each in found] == ["", ""]
    large = Change.parse("sm_86/forward/128/half=128x128 warps 8 stages 4")
    assert "shared memory" in sizes.check_compiled(large).wrong
