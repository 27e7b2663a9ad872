"""The example that compares lines with constants: its tasks, its estimators, its small version."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from examples.test_time_regression.__main__ import main
from examples.test_time_regression.estimators import KNOBS, judge
from examples.test_time_regression.report import build
from examples.test_time_regression.tasks import InContext, Permutations, loss_of, score_of
from examples.test_time_regression.train import MIXERS


def test_points_stand_with_their_values(source: torch.Generator) -> None:
    task = InContext(3, 5, noise=0.0)
    tokens, targets = task.batch(4, source)
    assert tokens.shape == (4, 10, 5)
    asking, telling = tokens[:, ::2], tokens[:, 1::2]
    assert torch.equal(asking[..., :3], telling[..., :3])
    assert (asking[..., 3] == 0).all()
    assert torch.equal(telling[..., 3], targets[:, ::2])
    assert targets[:, 1::2].isnan().all()
    right = targets.nan_to_num()[..., None]
    assert float(loss_of(task, right, targets)) == 0
    assert float(score_of(task, right, targets)) == 0


def test_products_of_permutations(source: torch.Generator) -> None:
    task = Permutations(3, 7)
    tokens, targets = task.batch(5, source)
    every = list(itertools.permutations(range(3)))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        product = tuple(range(3))
        for token, number in zip(row, wanted, strict=True):
            product = tuple(every[token][product[i]] for i in range(3))
            assert every[number] == product
    logits = torch.nn.functional.one_hot(targets, task.vocabulary).float()
    assert float(score_of(task, logits, targets)) == 1


def test_a_line_beats_a_constant() -> None:
    errors = {record["model"]: record["error"] for record in judge(8, 128, 4, 0)}
    assert set(errors) == set(KNOBS)
    assert errors["local linear"] < errors["softmax"]


def test_the_small_version_writes_records_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--small", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    trained = [r for r in records if r["task"] != "regression"]
    assert len(trained) == 3 * len(MIXERS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Regression at test time" in page
    assert "Trained: recall" in page
    again = tmp_path / "again"
    assert main(["--render", str(tmp_path / "records.jsonl"), "--out", str(again)]) == 0
    assert (again / "report.html").exists()


def test_runs_of_different_length_are_not_averaged() -> None:
    one = {
        "task": "recall", "measure": "share right", "sizes": {"pairs": 2}, "model": "linear", "dim": 8,
        "heads": 1, "depth": 1, "steps": 200, "batch": 4, "seed": 0, "score": 0.125, "parameters": 9,
        "seconds": 1.0, "device": "cpu", "torch": "2",
    }  # fmt: skip
    page = build([one, one | {"steps": 600, "score": 0.75}], "command").render()
    assert "200 steps" in page
    assert "600 steps" in page
    assert "0.125" in page
    assert "0.750" in page
