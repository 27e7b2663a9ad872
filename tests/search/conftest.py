"""One nursery for all tests of the search: it costs one import of torch."""

from __future__ import annotations

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
def judge(nursery: Nursery, softmax_task: Task) -> Iterator[Judge]:
    with Judge(softmax_task, nursery, seconds=0.8) as found:
        yield found
