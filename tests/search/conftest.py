"""One nursery for all tests of the search: it costs one import of torch."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from foveal.search.isolate.process import Nursery
from foveal.search.task import Task, read_task
from foveal.search.verify.judge import Judge
from tests.search.attacks import TASK


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


@pytest.fixture(scope="session")
def softmax_task(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("task") / "scaled_softmax.py"
    path.write_text(TASK)
    return read_task(path, nursery)


@pytest.fixture(scope="session")
def softmax_judge(nursery: Nursery, softmax_task: Task) -> Iterator[Judge]:
    with Judge(softmax_task, nursery, seconds=0.8) as found:
        yield found


@pytest.fixture
def judge(softmax_judge: Judge, own_seed: int) -> Judge:
    """Its random inputs are those of the test, whichever ran before."""
    softmax_judge.source = random.Random(own_seed)
    return softmax_judge


@pytest.fixture(autouse=True)
def seeds_of_judges(monkeypatch: pytest.MonkeyPatch, own_seed: int) -> None:
    """What a judge without a seed draws depends on the seed of the run."""
    monkeypatch.setattr(
        "foveal.search.verify.judge.secrets.randbits", random.Random(own_seed).getrandbits
    )
