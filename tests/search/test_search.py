"""A search end to end: on the CPU with real timings, from the command line, with a report at its end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from pathlib import Path

import pytest

from foveal.cli import main
from foveal.search import export, knowledge, report
from foveal.search.acceptance import LOST, Decision
from foveal.search.archive import Archive
from foveal.search.candidate import Candidate
from foveal.search.controller import Search
from foveal.search.evaluator import Comparison, Effort, JudgedEvaluator
from foveal.search.isolate.process import Nursery
from foveal.search.strategies import strategy
from foveal.search.task import read_task
from foveal.search.verify.judge import Judge
from foveal.search.verify.race import Rounds

SLOW_START = """
import torch

SHAPES = [{"x": (3, 5), "role": "verify"}, {"x": (32, 64)}, {"x": (7, 33), "role": "hidden"}]
SPACE = {"turns": [40, 1]}

def reference(x):
    return torch.softmax(x, -1)

def candidate(x, turns=40):
    for _ in range(turns):
        y = torch.exp(x - x.amax(-1, keepdim=True))
        y = y / y.sum(-1, keepdim=True)
    return y
"""
QUICK = Effort(Rounds(3, 1), Rounds(1, 0))


class Unraced(JudgedEvaluator):
    """Judges, and times nothing twice."""

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return Decision(LOST, 0.0, 8, "not raced"), {}


@pytest.fixture
def shared(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line starts no nursery of its own."""
    monkeypatch.setattr(
        "foveal.search.isolate.process.Nursery", lambda: contextlib.nullcontext(nursery)
    )


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "slow_start.py"
    path.write_text(SLOW_START)
    return path


def test_a_search_finds_what_is_faster_and_reports_it(
    nursery: Nursery, task_file: Path, tmp_path: Path
) -> None:
    task = read_task(task_file, nursery)
    path = tmp_path / "search.db"
    with Judge(task, nursery) as judge:
        judge.admit()
        with Archive(path) as archive:
            search = Search(
                task, archive, [JudgedEvaluator(task, judge, QUICK)], strategy("random"), 3
            )
            search.run(200.0, most=2)
            champion = archive.champion()
            assert champion is not None
            assert champion.candidate.params == {"turns": 1}
            assert archive.check() == "ok"
            kinds = [c["kind"] for c in archive.challenges(champion.id)]
            assert kinds[:2] == ["challenge", "confirmation"]
            judged = archive.count()
        with Archive(path) as archive:  # nothing is judged twice
            Search(task, archive, [JudgedEvaluator(task, judge, QUICK)], strategy("random"), 3).run(
                0.0
            )
            assert archive.count() == judged
    with Archive(path, readonly=True) as archive:
        page = report.write(archive, task, tmp_path / "report.html", "foveal search").read_text()
        assert "turns 1" in page
        assert "Content-Security-Policy" in page
        text = export.champion_text(archive, task)
        assert export.write_steps(archive, task, tmp_path / "steps.jsonl") == 0
    (tmp_path / "champion.py").write_text(text)
    arguments = ["verify", str(tmp_path / "champion.py"), "--task", str(task_file), "--no-timing"]
    assert main(arguments) == 0


def test_workers_side_by_side_judge_each_candidate_once(
    nursery: Nursery, task_file: Path, tmp_path: Path
) -> None:
    task = read_task(task_file, nursery)
    with (
        Judge(task, nursery) as one,
        Judge(task, nursery) as two,
        Archive(tmp_path / "a.db") as archive,
    ):
        first = Unraced(task, one, QUICK)
        second = Unraced(task, two, QUICK, first.exclusive)
        Search(task, archive, [first, second], strategy("random"), 0).run(100.0)
        entries = archive.entries(evaluated=True)
        assert len(entries) == len({e.id for e in entries}) == 2
        assert all(e.evaluation is not None and e.evaluation.ok for e in entries)


def test_a_rewrite_is_judged_and_remembered(
    nursery: Nursery, task_file: Path, tmp_path: Path
) -> None:
    task = read_task(task_file, nursery)
    with Judge(task, nursery) as judge, Archive(tmp_path / "a.db") as archive:
        evaluator = Unraced(task, judge, QUICK)
        Search(task, archive, [evaluator], strategy("autokernel"), 2).run(100.0, most=4)
        children = [e for e in archive.entries(evaluated=True) if e.parents]
        assert children
        assert archive.transitions()
        steps = list(export.steps(archive, task))
        assert {step["operator"] for step in steps} <= {"rewrite", "mutation"}
        assert len(steps) == len(children)
        lessons = tmp_path / "lessons.jsonl"
        count = knowledge.write(archive, lessons)
        assert count == len(archive.lessons())
    with Archive(tmp_path / "b.db") as other:
        assert knowledge.read(other, lessons, "cpu") == count


@pytest.mark.usefixtures("shared")
def test_the_command_line_searches_and_goes_on(
    task_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("foveal.search.evaluator.JudgedEvaluator", Unraced)
    archive = str(tmp_path / "search.db")
    command = ["search", str(task_file), "--archive", archive, "--strategy", "random", "--json"]
    assert main([*command, "--budget", "1s", "--report", str(tmp_path / "r.html")]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["counts"]["judged"] >= 1
    assert (tmp_path / "r.html").exists()
    assert main([*command, "--budget", "1s"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["counts"]["judged"] >= first["counts"]["judged"]
    assert second["accepted"][: len(first["accepted"])] == first["accepted"]
    assert main([*command, "--status"]) == 0
    assert json.loads(capsys.readouterr().out)["accepted"] == second["accepted"]


@pytest.mark.usefixtures("shared")
def test_verify_prints_a_verdict(
    task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(task_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert set(found["samples"]) == {"32x64"}
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def candidate(x, turns=1):\n    return x\n")
    assert main(["verify", str(wrong), "--task", str(task_file), "--no-timing"]) == 1
    assert re.search(r"smoke +FAILED", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["search"], "TASK: got none"),
        (["search", "nothing.py"], "neither a file nor a template"),
        (["search", "attention/causal", "--strategy", "cuda_forge"], "it needs a language model"),
        (["search", "attention/causal", "--strategy", "best"], "known: full"),
        (["search", "attention/causal", "--workers", "0"], "at least 1"),
        (["verify", "nothing.py"], "cannot be read"),
        (["verify", "sm_90/backward_kv/64/half=128x64", "--device", "cuda:99"], "got 'cuda:99'"),
        (["search", "attention/causal", "--device", "gpu"], "such as cuda:0"),
    ],
)
@pytest.mark.usefixtures("shared")
def test_bad_usage_is_a_sentence(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FOVEAL_CACHE_DIR", str(tmp_path))
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_templates_and_strategies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in ("attention/causal", "kernel_foundry", "robust_kbench", "cuda_llm", "avo"):
        assert name in printed


def test_an_interrupt_ends_after_what_is_in_flight() -> None:
    from foveal.cli.search import _interruptible

    class Running:
        stop = threading.Event()

    before = signal.getsignal(signal.SIGINT)
    with _interruptible(Running()):  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)
        assert Running.stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
