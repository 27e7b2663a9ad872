"""Fresh random inputs in every run, with the seed that repeats them in the report of a failure."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Generator, Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat the random inputs of a run")


@pytest.fixture(scope="session")
def run_seed(pytestconfig: pytest.Config) -> int:
    given = pytestconfig.getoption("--seed")
    return secrets.randbits(32) if given is None else int(given)


@pytest.fixture
def source(request: pytest.FixtureRequest, run_seed: int) -> torch.Generator:
    """A random source of its own for each test of each run."""
    request.node.user_properties.append(("seed", run_seed))
    return torch.Generator().manual_seed(zlib.crc32(f"{run_seed} {request.node.nodeid}".encode()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several workers share two cores, and sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    seeds = [value for name, value in item.user_properties if name == "seed"]
    if report.failed and seeds:
        report.sections.append(("random inputs", f"repeat them with --seed {seeds[0]}"))
    return report
