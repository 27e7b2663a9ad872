"""`foveal eval` on a tiny model: lines, resumption, report, usage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.cli import main
from foveal.eval.report import build
from foveal.eval.run import Lines, Plan, run
from foveal.eval.subject import load
from foveal.eval.tasks import Bench, Case
from foveal.eval.variants import variants

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


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "snapkv", "--model", str(Path("nowhere").absolute())]) == 2
    said = capsys.readouterr().err
    assert "model: got" in said
    assert "cannot load" in said


COVERED = (
    "louis_kv:pages=80,page=4,window=16",
    "retrieval_attention:keys=300,sinks=2,window=8",
    "nosa:block=16,window=16,stride=8,budget=40,by_query=5",
)
FEWER = (
    "louis_kv:pages=2,page=4,window=16",
    "cache=retrieval_attention:keys=4,sinks=2,window=8",
    "nosa:block=16,window=16,stride=8,budget=5,by_query=4",
)


def test_caches_on_the_host_are_read_token_by_token() -> None:
    bench = Bench(load("random", None, "cpu", torch.float32), targets=6, new_tokens=4)
    chosen = variants([*COVERED, *FEWER, "attention=retrieval_attention"], [], {})
    plan = Plan(chosen, ("loss", "needle", "speed"), (256,), depths=(0.5,))
    found = run(bench, plan, Lines("host.jsonl"), {}, lambda text, share: None)
    assert {line["status"] for line in found} == {"measured"}
    values = {
        task: [line["values"] for line in found if line["task"] == task] for task in plan.tasks
    }
    exact, *others = values["loss"]
    for v in others[:3]:
        assert abs(v["divergence"]) < 1e-5
        assert v["agreement"] == 1.0
    for v in others[3:6]:
        assert v["divergence"] > 1e-5
        assert v["cache_bytes"] < exact["cache_bytes"]
    assert all(0 < v["host_bytes"] <= exact["cache_bytes"] for v in others[:6])
    assert others[6]["host_bytes"] == 0
    first, *needles = values["needle"]
    assert all(abs(v["answer_loss"] - first["answer_loss"]) < 1e-4 for v in needles[:3])
    moved = [v.get("fetched_bytes") for v in values["speed"]]
    assert moved[0] is None
    assert moved[7] is None
    assert all(bytes_of_a_token > 0 for bytes_of_a_token in moved[1:7])
    assert all(v["same_tokens"] == 4 for v in values["speed"][1:4])
    titles = [line["variant"] for line in found if line["task"] == "loss"]
    assert titles[4:] == ["cache=louis_kv", "cache=retrieval_attention", "cache=nosa", titles[-1]]
    assert titles[-1] == "retrieval_attention"
    page = build(found, []).write("host.html").read_text()
    assert "on the host [MB]" in page
    assert "fetched [MB]" in page


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("louis_kv:pagse=4", "did you mean page"),
        ("cache=louis", "did you mean louis_kv"),
        ("attention=snapvk", "did you mean snapkv"),
        ("louis_kv:pages", "NAME=VALUE"),
        ("louis_kv:pages=0", "pages"),
        ("nosa:weights=absent.py:f", "FILE.py:NAME"),
    ],
)
def test_bad_caches_are_refused_before_a_model_is_loaded(
    variant: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", variant, "--model", "no such model"]) == 2
    assert said in capsys.readouterr().err


def test_weights_of_nosa_are_read_from_a_file() -> None:
    Path("weights.py").write_text(
        "def lengths(keys, layer):\n    return keys.norm(dim=-1) + layer\n"
    )
    (_, found) = variants(["nosa:block=16,weights=weights.py:lengths"], [], {})
    assert found.options == (("block", 16), ("weights", "weights.py:lengths"))
    bench = Bench(load("random", None, "cpu", torch.float32), targets=2)
    values = bench.run(Case("loss", 256, found))
    assert values["host_bytes"] > 0


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
