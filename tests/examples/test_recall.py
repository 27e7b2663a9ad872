"""The example that trains on recall and text: its tasks, its models step by step, its small version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.recall.__main__ import main
from examples.recall.models import MIXERS, LanguageModel
from examples.recall.tasks import HIDDEN, Recall, Text
from examples.recall.train import Run, train


@pytest.mark.parametrize("held_out", [True, False])
def test_keys_ask_for_what_stood_behind_them(held_out: bool, source: torch.Generator) -> None:
    task = Recall(pairs=8, length=24, words=9)
    tokens, targets = task.batch(64, source, held_out=held_out)
    assert tokens.shape == targets.shape == (64, 24)
    assert int(tokens.max()) < task.vocabulary
    counts = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = wanted.count(HIDDEN) // 2
        counts.add(pairs)
        told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs
        assert wanted[: 2 * pairs] == [HIDDEN] * 2 * pairs
        assert wanted[2 * pairs :] == [told[key] for key in row[2 * pairs :]]
    assert counts <= ({8} if held_out else {1, 2, 4, 8})


def test_a_perfect_answer_scores_one(source: torch.Generator) -> None:
    task = Recall(pairs=2, length=9, words=4)
    _, targets = task.batch(3, source)
    logits = torch.nn.functional.one_hot(targets.clamp(min=0), task.vocabulary).float()
    assert float(task.score(logits, targets)) == 1.0


def test_text_asks_for_the_next_character(source: torch.Generator) -> None:
    task = Text(20)
    tokens, targets = task.batch(4, source)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    uniform = torch.zeros(4, 20, task.vocabulary)
    bits = float(task.score(uniform, targets))
    assert bits == pytest.approx(torch.tensor(task.vocabulary).double().log2().item())
    held_out, _ = task.batch(4, source, held_out=True)
    assert held_out.shape == tokens.shape


@pytest.mark.parametrize("name", MIXERS)
def test_steps_are_the_whole(name: str, source: torch.Generator) -> None:
    model = LanguageModel(name, 11, 8, 2).double()
    tokens = torch.randint(11, (2, 9), generator=source)
    logits, state = model(tokens), None
    for t in range(9):
        step, state = model._run(tokens[:, t : t + 1], state)
        torch.testing.assert_close(step[:, 0], logits[:, t], rtol=1e-9, atol=1e-9)
    assert model.generate(tokens, 3, source).shape == (2, 12)
    longer = model.state_bytes(64) - model.state_bytes(32)
    assert (longer > 0) == (name == "softmax")


def test_the_small_version_writes_records_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--small", "--device", "cpu", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [r["model"] for r in records] == [*MIXERS, "Lightning"]
    assert all(0 <= r["score"] <= 1 for r in records[:-1])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Recall of 2 pairs" in page
    again = tmp_path / "again"
    assert main(["--render", str(tmp_path / "records.jsonl"), "--out", str(again)]) == 0
    assert (again / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "Gated DeltaNet"])
def test_pairs_are_learned(name: str) -> None:
    task = Recall(pairs=4, length=20, words=8)
    run = Run(task, name, 32, 2, steps=250, batch=32, learning_rate=1e-2)
    assert train(run, "cpu")["score"] > 0.9
