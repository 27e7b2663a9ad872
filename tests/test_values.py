"""Patterns, scores, rules, systems and errors are values: they travel between processes and into files."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from tests.problems import PATTERNS

LISTS = fv.Blocks(fv.BlockSelection(torch.tensor([[0, 1], [1, 2], [2, -1]])[None, None], 8, 8))
SCORES = [
    fv.Softmax(scale=0.5, soft_cap=3.0, sink=torch.tensor([0.1, -0.4])),
    fv.Softmax() + fv.Alibi(torch.tensor([0.5, 0.25])) + fv.KeyBias(torch.linspace(-1, 1, 20)[None, None]),
    fv.RelativeBias(torch.linspace(-1, 1, 78).view(2, 39)),
    fv.Entmax(1.5),
    fv.LocalLinear(2.0),
]  # fmt: skip
RULES = [fv.Additive(), fv.Additive(normalised=True), fv.Delta(), fv.MLSTM(), fv.TwoState(chunk=4)]


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    lambda x: pickle.loads(pickle.dumps(x)),
    _saved,
]


def _qkv(source: torch.Generator) -> list[Tensor]:
    return [torch.randn(1, 20, 2, 4, generator=source) for _ in range(3)]


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_patterns_and_rules_are_equal(copied: Callable[[Any], Any]) -> None:
    for value in [*(pattern for pattern, _ in PATTERNS), *RULES, fv.Extent((3, 4), (5, 6))]:
        again = copied(value)
        assert again == value
        assert hash(again) == hash(value)
        assert repr(again) == repr(value)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_scores_and_lists_compute_the_same(
    copied: Callable[[Any], Any], source: torch.Generator
) -> None:
    q, k, v = _qkv(source)
    for score in SCORES:
        want = fv.attend(q, k, v, fv.Causal(), score)
        assert torch.equal(fv.attend(q, k, v, fv.Causal(), copied(score)), want)
    assert torch.equal(fv.attend(q, k, v, copied(LISTS)), fv.attend(q, k, v, LISTS))


def test_systems_travel_by_name() -> None:
    for entry in fv.systems():
        assert pickle.loads(pickle.dumps(entry)) is entry
        assert copy.deepcopy(entry) is entry


def test_errors_travel_with_their_fields() -> None:
    for error in (
        fv.errors.ShapeError("q", [3], "[4] is needed"),
        fv.errors.RefusedError("cpu", "it rests"),
        fv.errors.UnknownNameError("system", "gan", ("gna",)),
        fv.errors.OutOfPagesError(1, 2, 3, 4),
        fv.errors.MissingDependencyError("plotly", "the report", "report"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def _windows(source: torch.Generator) -> list[tuple[list[Tensor], fv.Pattern]]:
    return [(_qkv(source), fv.Sliding(left, sink_tokens=left % 3)) for left in range(12)]


def _results(problem: tuple[list[Tensor], fv.Pattern]) -> list[Tensor]:
    tensors, pattern = problem
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = fv.attend(*leaves, pattern)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]


def test_threads_call_at_once(source: torch.Generator) -> None:
    """Twelve kinds of calls in four threads, planned and computed while others do the same."""
    problems = _windows(source)
    want = [_results(problem) for problem in problems]
    wrong: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for turn in range(12):
                number = (start + turn) % len(problems)
                for a, b in zip(_results(problems[number]), want[number], strict=True):
                    torch.testing.assert_close(a, b)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(3 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def _in_a_child(problem: tuple[list[Tensor], fv.Pattern], end: Any) -> None:
    torch.set_num_threads(1)
    end.send([x.tolist() for x in _results(problem)])


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
def test_a_forked_process_computes_the_same(source: torch.Generator) -> None:
    """Workers of a data loader are forks of a process that may have attended before."""
    problem = _windows(source)[5]
    want = _results(problem)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_a_child, args=(problem, there))
    child.start()
    try:
        assert here.poll(120.0), "the forked process does not answer"
        found = here.recv()
    finally:
        child.terminate()
        child.join()
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(torch.tensor(a), b)
