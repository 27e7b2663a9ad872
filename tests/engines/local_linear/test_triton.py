"""The Triton edition in Triton's interpreter against float64, and its kernels on GPUs that are not here."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

import foveal as fv
from tests.engines import suites
from tests.engines.local_linear import decoding, interpreted
from tests.engines.local_linear.cases import CASES
from tests.engines.tile.compiled import Launch

pytestmark = pytest.mark.skipif(
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


QUICK = (("window", "solved"), ("packed", "detached"), ("dilated", "given"))


@pytest.mark.parametrize(("name", "kind"), QUICK)
def test_agrees_with_the_definition(
    name: str, kind: str, interpreter: Run, source: torch.Generator
) -> None:
    interpreter(interpreted.agree, name, kind, torch.float32, seed(source))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_agrees_on_every_pattern(name: str, interpreter: Run, source: torch.Generator) -> None:
    for kind in ("solved", "given"):
        interpreter(interpreted.agree, name, kind, torch.float32, seed(source))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "lists & causal"])
def test_agrees_in_half_precision(name: str, interpreter: Run, source: torch.Generator) -> None:
    for kind in ("solved", "given"):
        interpreter(interpreted.agree, name, kind, torch.float16, seed(source))


def test_rows_with_fewer_keys_than_dimensions(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.first_rows, seed(source), 0.01) < 5e-3


@pytest.mark.parametrize("pattern", [fv.Causal(), fv.Sliding(300)], ids=repr)
def test_decodes(pattern: fv.Pattern, interpreter: Run, source: torch.Generator) -> None:
    for ridge in (0.5, None):
        assert all(interpreter(interpreted.decoded, seed(source), pattern, ridge))


def test_decodes_a_query_beside_its_keys(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.decoded_beside_its_keys, seed(source))


def test_spread_of_keys(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.spread, seed(source)) < 1e-4


def test_lists_open_rows(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.lists_open_rows, seed(source))


def test_solves_noisy_tiles_again(interpreter: Run, source: torch.Generator) -> None:
    assert all(interpreter(interpreted.solved_again, seed(source)))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pattern", [fv.Causal(), fv.Sliding(9)], ids=repr)
def test_finds_all_anew_where_a_sum_is_not_finite(
    pattern: fv.Pattern, odd: float, interpreter: Run, source: torch.Generator
) -> None:
    assert interpreter(interpreted.marked, seed(source), pattern, odd)


def test_small_gradients(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.small_gradients, seed(source))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [fv.Causal(), fv.Sliding(5), fv.Dense()], ids=repr)
def test_what_is_not_finite_reaches_the_rows_that_see_it(
    pattern: fv.Pattern, interpreter: Run, source: torch.Generator
) -> None:
    assert interpreter(interpreted.contained, seed(source), pattern)


def launches(dim: int, pattern: fv.Pattern) -> list[Launch]:
    """Every kernel with the arguments of a real call, none of them run."""
    from foveal._problem import describe
    from foveal.engines.local_linear import kernels, launch, launch_decode, tuning
    from foveal.engines.tile.parts import Task, whole_task
    from foveal.scores.base import Geometry
    from foveal.scores.normal import NormalForm

    found: list[Launch] = []

    class Listed:
        def __init__(self, kernel: Any, programs: int, arguments: Any, options: Any) -> None:
            self.one = Launch(kernel, arguments, options)

        def __call__(self) -> None:
            found.append(self.one)

    def task_of(q: torch.Tensor, k: torch.Tensor) -> Task:
        problem = describe(q, k, k, True)
        simple = pattern.simplify(problem.extent)
        geometry = Geometry(simple, problem.extent, 1, 2, 2)
        return whole_task(problem, simple, NormalForm(0.1, None, None, ()), geometry, q.device)

    def sizes(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Any:
        return tuning.shipped(name, size, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "Launch", Listed)
        patch.setattr(launch_decode, "Launch", Listed)
        patch.setattr(launch, "sizes", sizes)
        q, k = (torch.zeros(1, n, 2, dim, dtype=torch.float16) for n in (512, 512))
        task, solver = task_of(q, k), kernels.Solver(torch.ones(2), 1e-3, 9)
        mean, lse = kernels.moments(task, q, k, k)
        x, _ = kernels.solve(task, solver, q, k, k, mean, lse)
        rows = kernels.Rows(x, mean, lse)
        o = kernels.output(task, q, k, k, rows)
        kernels.backward(task, solver, q, k, k, rows, o, q, lse, False)
        if dim <= 128:
            launch_decode.decode(task_of(q[:, :1], k), solver, q[:, :1], k, k)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_decode_compiles_for(device: str) -> None:
    from triton.backends import backends

    if ("amd" if device == "gfx942" else "nvidia") not in backends:
        pytest.skip(f"this Triton has no backend for {device}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=suites.start) as pool:
        names, wrong = pool.submit(decoding.outcome, device).result()
    assert wrong == []
    assert names == {
        "decode.local_linear_decode",
        "decode.local_linear_decode_merge",
        "decode.local_linear_decode_solve",
        "decode_given.local_linear_decode_given",
        "decode_given.local_linear_decode_given_merge",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "architecture"), [(128, "sm_90"), (64, "sm_80")])
def test_compiles_for(dim: int, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    most = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}[architecture]
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    for one in launches(dim, fv.Causal()):
        compiled = one.compile(target)
        assert compiled.metadata.shared <= most, one.name
