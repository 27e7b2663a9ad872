"""The sparse suite: what it measures is right on small tensors, and the command measures once and reports."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.bench.selection.markdown import markdown
from foveal.bench.selection.measure import exact, pairs_of, quality, seconds
from foveal.bench.selection.methods import METHODS, Call, Method, method
from foveal.bench.selection.reading import Document, Layer, Reading
from foveal.bench.selection.report import build, points, table
from foveal.bench.selection.run import Case, Plan
from foveal.cli import main
from foveal.patterns import Causal, Chosen, Extent, Sliding, TokenSelection

needs_model = pytest.mark.skipif(
    find_spec("transformers") is None, reason="reading a model needs transformers, extra hf"
)
LENGTH = 300


def reading(source: torch.Generator) -> Reading:
    q = torch.randn(1, LENGTH, 4, 16, generator=source)
    k, v = (torch.randn(1, LENGTH, 2, 16, generator=source) for _ in range(2))
    about = Document(torch.zeros(LENGTH).long(), 0, 0.5, (140, 144), LENGTH - 5, (200, 290))
    return Reading(about, (Layer(3, q, k, v),))


def keeping(keys: Tensor) -> Method:
    """Keeps the keys that a mask [1, Hq, L, L] says."""
    chosen = Chosen(TokenSelection.from_mask(keys)) & Causal()
    return Method("mask", "", (0.0,), lambda call: chosen)


def test_quality_is_what_the_definition_says(source: torch.Generator) -> None:
    found = reading(source)
    layer, about = found.layers[0], found.document
    keys = torch.rand(1, 4, LENGTH, LENGTH, generator=source) < 0.3
    keys |= torch.eye(LENGTH, dtype=torch.bool)
    whole = exact(layer, about, 0)
    got = quality(keeping(keys), Call(3, layer.q, layer.k, 0.0), layer, about, whole)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    q, k, v = (x.double() for x in (layer.q, layer.k, layer.v))
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    p = torch.softmax(s.masked_fill(~causal, -torch.inf), -1)
    seen = keys & causal
    ours = torch.softmax(s.masked_fill(~seen, -torch.inf), -1)
    outputs = [torch.einsum("bhij,bjhd->bhid", w, v) for w in (p, ours)]
    lost = (outputs[0] - outputs[1]).norm(dim=(2, 3)) / outputs[0].norm(dim=(2, 3))
    fact = p[:, :, LENGTH - 5 :, 140:144]
    expected = {
        "density": seen.double().sum() / 4 / causal.sum(),
        "mass": (p * seen).sum(-1).mean(),
        "error": lost.mean(),
        "needle": (fact * seen[:, :, LENGTH - 5 :, 140:144]).sum() / fact.sum(),
    }
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), rel=1e-4), name


def test_pairs_of_blocks_are_counted_without_a_matrix(source: torch.Generator) -> None:
    for Lq, size in ((LENGTH, 16), (37, 1)):
        mask = torch.rand(2, 3, -(-Lq // size), -(-LENGTH // 16), generator=source) < 0.4
        pattern = fv.Blocks(fv.BlockSelection.from_block_mask(mask, size, 16)) & Causal()
        extent = Extent((Lq,), (LENGTH,))
        seen = pattern.dense_mask(Lq, LENGTH).double()
        assert pairs_of(pattern, extent) == pytest.approx(float(seen.sum(-1).mean()))
    assert pairs_of(Sliding(3), Extent((9,), (9,))) == pytest.approx(30 / 9)


@pytest.mark.parametrize("each", METHODS, ids=lambda x: x.name)
def test_every_method_runs_and_more_is_better(each: Method, source: torch.Generator) -> None:
    found = reading(source)
    layer, about = found.layers[0], found.document
    first = 0 if each.rows == "all" else about.text[0]
    whole = exact(layer, about, first)
    fitted = None if each.fit is None else each.fit(found)
    results = []
    for setting in (each.settings[0], each.settings[-1]):
        call = Call(3, layer.q[:, first:], layer.k, setting, {}, fitted)
        if each.memory:
            assert each.choose is not None
            each.choose(call)
        results.append(quality(each, call, layer, about, whole))
    few, many = results
    assert 0 < few["density"] <= many["density"] <= 1 + 1e-6
    assert many["error"] <= few["error"] + 0.02
    assert 0 <= few["needle"] <= 1 + 1e-6
    if few["mass"] is not None:
        assert few["mass"] <= many["mass"] <= 1 + 1e-5


def test_times_are_taken_of_what_a_method_has(source: torch.Generator) -> None:
    layer = reading(source).layers[0]
    found = seconds(method("xattention"), Call(3, layer.q, layer.k, 0.5), layer, 1)
    assert set(found) == {"seconds", "dense_seconds", "choosing_seconds"}
    found = seconds(method("pyramid_sparse"), Call(3, layer.q, layer.k, 0.1), layer, 1)
    assert set(found) == {"seconds", "dense_seconds"}


def test_readings_survive_a_file(source: torch.Generator, tmp_path: Path) -> None:
    found = reading(source)
    found.save(tmp_path / "one.pt")
    again = Reading.load(tmp_path / "one.pt")
    assert again.document.needle == (140, 144)
    assert torch.equal(again.layers[0].q, found.layers[0].q)
    half = again.to(torch.device("cpu"), torch.bfloat16).layers[0].k
    assert half.dtype == torch.bfloat16


def test_middle_settings_of_all_methods_come_first() -> None:
    cases = Plan(METHODS[:2], (64,), (0.5,), ("quality",)).cases()
    assert [(x.method.name, x.setting) for x in cases[:2]] == [
        (each.name, each.settings[2]) for each in METHODS[:2]
    ]
    assert len({x.key for x in cases}) == len(cases) == 10


def line(case: Case, **values: float | None) -> dict[str, object]:
    return {
        "key": case.key, "subject": "x", "task": case.task, "length": case.length, "part": case.part,
        "depth": case.depth, "method": case.method.name, "setting": case.setting,
        "rows": case.method.rows, "status": "measured", "reason": "", "values": values,
    }  # fmt: skip


def test_a_page_has_every_method_and_a_plot_for_each() -> None:
    found = []
    for case in Plan(METHODS[:3], (64,), (0.25, 0.75)).cases():
        if case.task == "quality":
            found.append(line(case, density=case.setting, mass=0.5 + case.part / 4, error=None))
        elif case.task == "speed":
            found.append(line(case, seconds=0.5, dense_seconds=1.0, choosing_seconds=0.1))
        else:
            found.append(line(case, agreement=0.9))
    merged = points(found)
    assert len(merged) == 15
    assert merged[0]["values"] == {
        "density": merged[0]["setting"], "mass": 0.625, "error": None, "agreement": 0.9,
        "seconds": 0.5, "dense_seconds": 1.0, "choosing_seconds": 0.1, "time": 0.5,
    }  # fmt: skip
    page = build(found, [("command", "x")])
    titles = [section.title for section in page.sections]
    assert titles[0] == "64 tokens, all queries"
    assert {each.name for each in METHODS[:3]} <= {title.split(",")[0] for title in titles[1:]}
    assert all(section.has_figures for section in page.sections)
    assert len(table(found)) == 16


def test_tables_stand_between_the_settings() -> None:
    found = []
    for case in Plan(METHODS[:2], (64,), (0.5,), ("quality", "agreement")).cases():
        if case.task == "quality":
            found.append(line(case, density=case.setting, mass=case.setting, error=None))
        elif case.setting == 0.1:
            found.append(line(case, agreement=0.9, divergence=0.25, hits=1.0))
    facts = {"environment": {"device_name": "a machine"}}
    text = markdown([each | facts for each in found])
    assert "| window and first tokens | 15.8 / 31.7 |" in text
    assert "| random blocks | 10.0 | 10.0 | 90.0 | 0.250 | 100.0 |" in text
    assert text.endswith("x; 64 tokens on a machine.")


COMMAND = ["bench", "--suite", "sparse", "--model", "random", "--lengths", "300", "--json"]


@needs_model
def test_command_measures_once_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*COMMAND, "--only", "loki", "--out", "one"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [x["task"] for x in found] == ["quality"] * 5 + ["agreement"] * 5 + ["speed"] * 5
    quality_of = {x["setting"]: x["values"] for x in found if x["task"] == "quality"}
    assert quality_of[0.2]["mass"] > quality_of[0.025]["mass"]
    assert len(quality_of[0.2]["layers"]) == 2
    model = [x["values"] for x in found if x["task"] == "agreement"]
    assert all(0 <= x["agreement"] <= 1 and x["divergence"] >= -1e-6 for x in model)
    assert main(words) == 2
    assert "--resume continues it" in capsys.readouterr().err
    size = (tmp_path / "one" / "records.jsonl").stat().st_size
    assert main([*words, "--resume"]) == 0
    assert (tmp_path / "one" / "records.jsonl").stat().st_size == size
    capsys.readouterr()
    assert main(["bench", "sparse", "--render", "one", "--html", "again.html"]) == 0
    assert "loki" in capsys.readouterr().out
    assert "loki, 300 tokens" in Path("again.html").read_text(encoding="utf-8")
    assert main(["bench", "sparse", "--render", "nowhere"]) == 2


@pytest.mark.parametrize("words", [("--only", "nothing"), ("--tasks", "joy")])
def test_bad_usage_is_status_two(
    words: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, *words]) == 2


@needs_model
def test_a_window_of_the_length_changes_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    from foveal.bench.selection import command

    whole = Method("window", "", (1.0,), lambda call: Sliding(LENGTH))
    monkeypatch.setattr(command, "METHODS", (whole,))
    assert main([*COMMAND, "--tasks", "quality,agreement"]) == 0
    found = {x["task"]: x["values"] for x in json.loads(capsys.readouterr().out)}
    assert found["quality"]["mass"] == pytest.approx(1.0, abs=1e-5)
    assert found["quality"]["density"] == pytest.approx(1.0)
    assert found["agreement"]["agreement"] == 1.0
    assert found["agreement"]["hits"] == found["agreement"]["exact_hits"]


OWN = """
class Nearest:
    def scores(self, q, k, tiling):
        import torch

        place = torch.arange(tiling.kv_blocks).to(q)
        return place.expand(1, 1, tiling.q_blocks, -1)
"""


@needs_model
def test_a_selector_in_a_file_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    words = ["--selector", "own.py:Nearest", "--only", "Nearest", "--tasks", "quality"]
    assert main([*COMMAND, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [x["method"] for x in found] == ["Nearest"] * 5
    densities = {x["setting"]: x["values"]["density"] for x in found}
    assert densities[0.2] >= densities[0.025] > 0


@pytest.mark.parametrize(
    ("text", "said"), [("gone.py:A", "FILE.py"), ("own.py:B", "Nearest"), ("own.py:OWN", "scores")]
)
def test_wrong_selectors_are_named(
    text: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN + "OWN = 3\n")
    assert main([*COMMAND, "--selector", text]) == 2
    assert said in capsys.readouterr().err
