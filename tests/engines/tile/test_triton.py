"""The Triton edition in Triton's interpreter against float64, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

import foveal as fv
from foveal._problem import describe
from foveal.engines.tile import triton as edition
from foveal.patterns.base import Extent
from foveal.scores.base import Geometry
from foveal.scores.normal import normal_form
from foveal.tuning import tile as tuning
from tests.engines.tile import interpreted

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    """Runs functions of `interpreted` in a process with Triton's interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpreted.start) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            pool.submit(interpreted.ready).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def seed(source: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=source))


@needs_triton
@pytest.mark.parametrize("name", interpreted.CASES)
def test_agrees_with_the_definition(name: str, interpreter: Run, source: torch.Generator) -> None:
    interpreter(interpreted.agree, name, seed(source))


@needs_triton
def test_tokens_are_taken_out_and_put_back(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.moved, seed(source))


@needs_triton
def test_gradients_repeat_bit_by_bit(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.repeated, seed(source))


@needs_triton
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "pattern", [fv.Causal(), fv.Sliding(5, sink_tokens=2), fv.Neighborhood((3, 3))], ids=str
)
def test_non_finite_values_reach_the_rows_that_see_them(
    pattern: fv.Pattern, value: float, where: str, interpreter: Run, source: torch.Generator
) -> None:
    if where == "k" and math.isinf(value):
        pytest.skip("inf in k gives scores of both signs: NaN or not depends on the order of sums")
    assert interpreter(interpreted.contained, pattern, value, where, seed(source))


@needs_triton
@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
@pytest.mark.parametrize(
    "pattern", [fv.Causal(), fv.Sliding(5, sink_tokens=2), fv.Neighborhood((3, 3))], ids=str
)
def test_nan_reaches_the_gradients_of_what_it_is_seen_with(
    pattern: fv.Pattern, where: str, interpreter: Run, source: torch.Generator
) -> None:
    assert interpreter(interpreted.contained_gradients, pattern, where, seed(source))


def refusal(pattern: fv.Pattern, score: fv.Score = fv.Softmax(), **changes: Any) -> str | None:
    x = torch.zeros(1, 64, 2, 8)
    problem = describe(x, x, x, return_lse=False)
    geometry = Geometry(pattern, problem.extent, 1, 2, 2)
    form = normal_form(score, 8, geometry)
    return edition.refuses(dataclasses.replace(problem, **changes), pattern, form)


def test_refuses_the_cpu() -> None:
    assert refusal(fv.Causal()) == "it runs on CUDA tensors; these are on cpu"


def test_refuses_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal(fv.Causal(), device="cuda") == "the package triton is not installed"


@needs_triton
@pytest.mark.parametrize(
    ("pattern", "score", "changes", "named"),
    [
        (fv.Causal(), fv.Softmax(), {"dtype": torch.float64}, "float64"),
        (fv.Causal(), fv.Softmax(), {"head_dim": 512}, "512"),
        (
            fv.Blocks(fv.BlockSelection(torch.zeros(1, 1, 7, 1, dtype=torch.int32), 10, 10)),
            fv.Softmax(),
            {},
            "10 x 10",
        ),
        (
            fv.Causal(),
            fv.Alibi(torch.ones(2)) + fv.KeyBias(torch.ones(1, 1, 64)) + fv.Bias(torch.ones(1, 1, 64, 64)),
            {},
            "at most 2 kinds",
        ),
    ],
    ids=["float64", "head_dim", "blocks", "terms"],
)  # fmt: skip
def test_refuses_in_a_sentence(
    pattern: fv.Pattern,
    score: fv.Score,
    changes: dict[str, Any],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edition, "_interpreted", lambda: True)
    reason = refusal(pattern, score, **changes)
    assert reason is not None
    assert named in reason


def test_shapes_hold_the_size_and_fit_the_grid() -> None:
    for box in tuning.shapes(64, (5, 40, 3)):
        assert math.prod(box) == 64
        assert box[0] < 10
        assert box[2] < 6


def test_chosen_shapes_follow_the_window() -> None:
    bounds = fv.Neighborhood((3, 33)).bounds(Extent((64, 64), (64, 64)))
    own, other = tuning.choose_shapes(bounds.lower, bounds.upper, (64, 64), 64, 64)
    assert math.prod(own) == math.prod(other) == 64
    assert other[2] > other[1]
