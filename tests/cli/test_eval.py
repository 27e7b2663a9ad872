"""`foveal eval` on a tiny model: lines, resumption, report, usage."""

import json
from pathlib import Path
from typing import Any

import pytest

from foveal.cli import main

pytest.importorskip("transformers", reason="foveal eval needs transformers, extra hf")

COMMAND = ["eval", "snapkv", "kda", "Sliding(31, sink_tokens=2)", "--model", "random"]
COMMAND += ["--budget", "0.5,16", "--length", "256", "--task", "loss,needle,recall,speed"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("eval.jsonl").read_text().splitlines()]


def test_measures_once_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--json", "--report", "eval.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = lines()
    assert found == first
    assert len(first) == 5 * (1 + 5 + 1 + 1)
    loss = {(x["variant"], x["budget"]): x["values"] for x in first if x["task"] == "loss"}
    assert loss["dense", None]["divergence"] == 0.0
    assert loss["dense", None]["agreement"] == 1.0
    exact = loss["dense", None]["cache_bytes"]
    assert loss["snapkv", 16]["cache_bytes"] < loss["snapkv", 0.5]["cache_bytes"] < exact
    refused = {x["variant"] for x in first if x["status"] == "refused"}
    assert refused == {"kda"}
    page = Path("eval.html").read_text()
    assert "Needle in a haystack" in page
    assert "something else than fewer pairs" in page
    Path("eval.jsonl").write_text("\n".join(map(json.dumps, first[:7])) + '\n{"key": "cut o')
    assert main(COMMAND) == 0
    again = [json.loads(x) for x in Path("eval.jsonl").read_text().splitlines() if x[-1] == "}"]
    assert again[:7] == first[:7]
    assert sorted(x["key"] for x in again) == sorted(x["key"] for x in first)


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--budget=0", "shares of the prompt"), ("--length=12", "128"), ("--task=joy", "loss")],
)
def test_bad_usage(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "snapkv", argument])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_unknown_variants_come_with_close_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "snapvk", "--model", "random"]) == 2
    assert "did you mean snapkv" in capsys.readouterr().err
