"""Random inputs that are fresh for every change of the code, and the same for all who check that code.

A comparison of random numbers is refused by chance, however rarely.  Were inputs drawn anew in every run, the
same code would pass in one run and not in the next; so the seed is a digest of the package and its tests,
and `--seed random` or a number looks elsewhere.  The report of a failure names the seed.
"""

from __future__ import annotations

import random
import secrets
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        default="code",
        help="of random inputs: code (a digest of it), random, or a number",
    )


@pytest.fixture(scope="session")
def run_seed(pytestconfig: pytest.Config) -> int:
    given = pytestconfig.getoption("--seed")
    if given == "code":
        return _digest(pytestconfig.rootpath)
    return secrets.randbits(32) if given == "random" else int(given)


def _digest(root: Path) -> int:
    """A number that changes with any line of the package and of its tests."""
    files = sorted(path for folder in ("src", "tests") for path in (root / folder).rglob("*.py"))
    digest = 0
    for path in files:
        digest = zlib.crc32(path.read_bytes(), digest)
    return digest


@pytest.fixture
def own_seed(request: pytest.FixtureRequest, run_seed: int) -> int:
    """A seed of its own for each test of each run."""
    return zlib.crc32(f"{run_seed} {request.node.nodeid}".encode())


@pytest.fixture
def source(request: pytest.FixtureRequest, run_seed: int, own_seed: int) -> torch.Generator:
    """The random source of a test."""
    request.node.user_properties.append(("seed", run_seed))
    return torch.Generator().manual_seed(own_seed)


@pytest.fixture(autouse=True)
def sources_of_others(own_seed: int) -> None:
    """The sources of PyTorch and Python do not depend on which tests ran before."""
    torch.manual_seed(own_seed)
    random.seed(own_seed)


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
