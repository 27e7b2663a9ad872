"""The kernel that computes marked gradient rows of the Hopper edition again, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from tests.engines.tile import interpreted, interpreted_repair

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpreted.start) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            pool.submit(interpreted.ready).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def seed(source: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=source))


@pytest.mark.slow
@pytest.mark.parametrize("name", interpreted_repair.BOXES)
def test_marked_rows_of_boxes(name: str, interpreter: Run, source: torch.Generator) -> None:
    verdicts = interpreter(interpreted_repair.boxes_repaired, name, seed(source))
    assert all("<=" in verdict for verdict in verdicts), verdicts


@pytest.mark.slow
def test_marked_rows_of_two_intervals(interpreter: Run, source: torch.Generator) -> None:
    verdicts = interpreter(interpreted_repair.two_intervals_repaired, seed(source))
    assert all("<=" in verdict for verdict in verdicts), verdicts


@pytest.mark.slow
def test_marked_rows_of_lists(interpreter: Run, source: torch.Generator) -> None:
    verdicts = interpreter(interpreted_repair.lists_repaired, seed(source))
    assert all("<=" in verdict for verdict in verdicts), verdicts
