"""Every sub-command: its text fits the terminal, its JSON holds the facts, its status tells."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import foveal as fv
from foveal.cli import doctor, main
from foveal.systems import systems

NAMES = [entry.name for entry in systems()]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(list(argv)) == 0
    return json.loads(capsys.readouterr().out)


def _text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_list_names_every_system_with_what_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    entries = _json(capsys, "list", "--json")
    assert [entry["name"] for entry in entries] == NAMES
    gna = next(entry for entry in entries if entry["name"] == "gna")
    assert gna["supports"]["cpu"]["cpu"] is None
    assert "dense and causal" in gna["supports"]["cpu"]["sdpa"]
    assert "CPU tensors" in gna["supports"]["cuda"]["cpu"]


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_list_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = _text(capsys, "list", "--family", "locality")
    assert max(map(len, text.splitlines())) <= columns
    assert all(entry.name in text for entry in systems("locality"))


@pytest.mark.parametrize("name", NAMES)
def test_show_fits_the_terminal_and_draws(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = _text(capsys, "show", name)
    assert max(map(len, text.splitlines())) <= 80
    drawn = fv.system(name).compose is not None
    assert Path(f"{name}.svg").exists() == drawn
    assert (f"written to {name}.svg" in text) == drawn


def test_show_takes_options_grid_and_path(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("show", "gna", "--window", "4x6", "--set", "stride=2", "--grid", "12x12")
    shown = _json(capsys, *argv, "--svg", "here.svg", "--json")
    assert shown["pattern"] == fv.Neighborhood((4, 6), stride=2).key
    assert shown["grid"] == [12, 12]
    assert shown["files"] == ["here.svg"]
    assert "Neighborhood((4, 6), stride=2)" in Path("here.svg").read_text()


def test_show_takes_the_rank_from_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = _text(capsys, "show", "gna", "--window", "2x4x4", "--stride", "1")
    assert "Neighborhood((2, 4, 4))" in text
    assert "(6 x 12 x 12 tokens)" in text


def test_show_json_writes_nothing_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _json(capsys, "show", "gna", "--json")
    assert shown["files"] == []
    assert "blocked" in shown["identities"]
    assert not [*Path.cwd().iterdir()]


def test_show_draws_expressions(capsys: pytest.CaptureFixture[str]) -> None:
    text = _text(capsys, "show", "Sliding(12, sink_tokens=2)", "--grid", "64")
    assert "i - left <= j <= i + right" in text
    assert Path("pattern.svg").exists()


def test_explain_tells_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "Sliding(512)", "--grid", "16384", "--heads", "4", "--head-dim", "64")
    told = _json(capsys, *argv, "--no-bound", "--json")
    assert told["implementation"] == "cpu"
    assert told["tiles"]["visited"] < told["tiles"]["total"] / 10
    assert told["tiles"]["pairs"] == 16384 * 513 - 512 * 513 // 2
    assert told["flops"] == 4 * 64 * 4 * told["tiles"]["pairs"]
    assert told["bound_seconds"] is None
    assert dict(told["refusals"])["sdpa"]


def test_explain_text_fits_and_has_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    text = _text(capsys, "explain", "gna", "--grid", "96x96", "--heads", "4", "--kv-heads", "2")
    assert max(map(len, text.splitlines())) <= 80
    assert "4 heads on 2 key heads" in text
    assert "ms forward on this device" in text
    assert "sdpa: it computes dense and causal attention only" in text


def test_explain_takes_the_shape_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    told = _json(capsys, "explain", "gna", "--no-bound", "--json")
    shape = fv.system("gna").reference_shapes[0]
    assert told["problem"]["q_grid"] == list(shape["grid"])
    assert told["pattern"] == fv.system("gna").pattern(shape["grid"], **shape["options"]).key


@pytest.mark.parametrize("name", [entry.name for entry in fv.systems() if entry.compose is None])
def test_explain_tells_what_it_can_of_systems_that_find_their_pairs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _json(capsys, "explain", name, "--no-bound", "--json")
    assert told["system"] == name
    assert told["runs"]
    assert told["bytes"] > 0
    if told["keys"] is not None:
        assert 0 < told["keys"] <= told["dense_keys"]
        assert told["flops"] > 0
    assert name in _text(capsys, "explain", name, "--no-bound")


def test_explain_counts_what_minference_and_nsa_read(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "minference", "--grid", "1000", "--heads", "2", "--head-dim", "8")
    told = _json(capsys, *argv, "--set", "vertical=3", "--set", "slash=4", "--json", "--no-bound")
    assert told["keys"] == pytest.approx(sum(min(7, i + 1) for i in range(1000)) / 1000)
    assert told["flops"] == pytest.approx(2 * 2 * 1000 * told["keys"] * 16)
    assert told["choice_flops"] == 2 * 2 * 8 * 64 * 1000
    assert "at most" in _text(capsys, *argv, "--no-bound")
    native = _json(capsys, "explain", "nsa", "--no-bound", "--json")
    assert 16384 / 32 < native["keys"] < 16384 / 32 + 16 * 64 + 512
    full = _json(capsys, "explain", "minference", "--grid", "100", "--no-bound", "--json")
    assert full["keys"] == full["dense_keys"] == 50.5


def test_explain_allocates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "Sliding(1000)", "--grid", "200000", "--batch", "4096", "--no-bound")
    assert "runs       cpu" in _text(capsys, *argv)


def test_explain_knows_packed_documents_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["explain", "Causal", "--grid", "100", "--documents", "30,70", "--no-bound", "--json"]
    told = _json(capsys, *argv, "--score", "Softmax(soft_cap=30.0)")
    assert told["tiles"]["pairs"] == 30 * 31 // 2 + 70 * 71 // 2
    assert told["score"] == fv.Softmax(soft_cap=30.0).key


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["show", "gnaa"], "did you mean gna"),
        (["show", "gna", "--svg", "no/such/folder.svg"], "No such file"),
        (["show", "gna", "--window", "7", "--grid", "4x4"], "window"),
        (["show", "gna", "--set", "windw=7"], "did you mean window?"),
        (["show", "cross_axis_attention", "--svg", "x.svg"], "selects pairs"),
        (["list", "--family", "locallity"], "did you mean locality"),
        (["explain", "Slidng(3)"], "did you mean Sliding?"),
        (["explain", "Sliding(3)", "--window", "3"], "carries its own options"),
        (["explain", "nsa", "--score", "Softmax()"], "nsa is told by a shape alone"),
        (["explain", "minference", "--set", "vertical=-1"], "vertical: got -1"),
        (["explain", "Sliding(3)", "--implementation", "sdpa"], "dense and causal"),
        (["explain", "Sliding(3)", "--implementation", "cpuu"], "did you mean cpu?"),
        (["explain", "Causal", "--device", "nowhere"], "--device"),
        (["bench", "--device", "nowhere"], "such as cuda:0"),
        (["bench", "--suite", "spares"], "did you mean sparse?"),
        (["bench", "--suite", "smoke", "--out", __file__], "File exists"),
        (["explain", "Causal", "--grid", "8", "--kv-heads", "3"], "must divide the 4 query heads"),
        (["explain", "Documents()", "--grid", "8"], "cu_seqlens"),
    ],
)
def test_bad_usage_is_two_and_a_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert "Traceback" not in printed.err


def test_without_a_command_it_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["lost"], "invalid choice: 'lost'"),
        (["show"], "foveal show: error"),
        (["show", "gna", "--windw", "3"], "foveal show: error: unrecognized arguments: --windw 3"),
        (["list", "locality"], "foveal list: error: unrecognized arguments: locality"),
        (["explain", "Causal", "--grid", "x"], "--grid: got 'x'"),
        (["bench", "--threads", "0"], "--threads: got '0'; a whole number above 0"),
        (["bench", "--budget", "-1"], "--budget"),
        (["search", "x", "--threads", "-1"], "--threads: "),
        (["verify", "x.py", "--patience", "nan"], "--patience: got 'nan'; a time is needed"),
    ],
)
def test_the_parser_says_two(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_nothing_is_told_of_what_cannot_be_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "Neighborhood(13)", "--grid", "8"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("foveal show: window: got 13")


def test_doctor_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    report = _json(capsys, "doctor", "--json")
    assert report["machine"]["foveal"] == fv.__version__
    assert not [check for check in report["self_test"]["checks"] if check["failure"]]
    plotly = next(p for p in report["packages"] if p["name"] == "plotly")
    assert "report" in plotly["extras"]


def test_doctor_tells_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = doctor.Package("plotly", None, ("demo", "report"))
    other = doctor.Package("gguf", "1.0", ("demo",))
    monkeypatch.setattr(doctor, "optional_packages", lambda: (package, other))
    text = _text(capsys, "doctor")
    assert "plotly: pip install 'foveal[report]'" in text
    assert max(map(len, text.splitlines())) <= 80


def test_doctor_of_sources_that_are_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(package: str) -> list[str]:
        raise doctor.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", unknown)
    monkeypatch.setattr(doctor, "_self_test", lambda: ([], 0.0))
    text = _text(capsys, "doctor")
    assert "pip install -e ." in text
    assert "extra" not in text


def test_one_guess_is_worth_more_than_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "neighborhod_attention"]) == 2
    assert "did you mean neighborhood_attention" in (error := capsys.readouterr().err)
    assert len(error) < 300


def test_doctor_with_a_failed_check_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ([doctor.Check("Dense() on 8", "error 1 > 0")], 0.0)
    monkeypatch.setattr(doctor, "_self_test", lambda: broken)
    assert main(["doctor"]) == 1
    assert "FAILED     Dense() on 8" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m foveal list | head -n 1"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("locality")
    assert not done.stderr


def test_no_command_shows_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert all(f"    {name} " in shown for name in ("list", "show", "explain", "bench", "doctor"))
