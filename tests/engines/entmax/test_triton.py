"""The Triton edition of entmax in Triton's interpreter against float64, and what it refuses."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

import foveal as fv
from foveal._problem import describe
from foveal.engines.entmax import triton as edition
from foveal.engines.tile import triton as tile
from foveal.scores.entmax import EntmaxForm
from foveal.tuning import tile as tuning
from tests.engines.entmax import interpreted
from tests.engines.tile import interpreted as tile_interpreted
from tests.engines.tile.compiled import Launch, recorded

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
FAST = ("causal", "tiles only")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    """Runs functions of `interpreted` in a process with Triton's interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=tile_interpreted.start) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            pool.submit(tile_interpreted.ready).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def seed(source: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=source))


@needs_triton
@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in interpreted.CASES
    ],
)
def test_agrees_with_the_definition(name: str, interpreter: Run, source: torch.Generator) -> None:
    interpreter(interpreted.run, name, seed(source))


@needs_triton
def test_rows_that_see_nothing_are_zero(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.blind_rows_are_zero, seed(source))


@needs_triton
@pytest.mark.slow
def test_results_repeat_bit_by_bit(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.repeated, seed(source))


def refusal(alpha: float | torch.Tensor = 1.5, scale: float = 0.25, lse: bool = False) -> str:
    q = torch.zeros(1, 32, 2, 16)
    problem = describe(q, q, q, lse)
    return edition.refuses(problem, fv.Causal(), EntmaxForm(scale, alpha)) or ""


def test_refusals_say_why() -> None:
    assert "log-sum-exp" in refusal(lse=True)
    assert "per head" in refusal(torch.full((2,), 1.5))
    assert "1.01" in refusal(1.001)
    assert "scale above 0" in refusal(scale=-1.0)
    assert "CUDA" in refusal()


KERNELS = (
    "entmax_threshold", "entmax_keys", "entmax_support_q", "entmax_values",
    "entmax_values_gathered", "entmax_support_kv", "entmax_queries", "entmax_backward_q",
    "entmax_backward_q_gathered", "entmax_backward_kv", "entmax_backward_kv_gathered",
)  # fmt: skip


def launches(architecture: str, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What forward and backward of a causal case launch on a device of this class."""
    from foveal.engines.entmax import launch

    monkeypatch.setattr(tile, "_interpreted", lambda: True)
    monkeypatch.setattr(tuning, "architecture", lambda device: architecture)
    q = torch.zeros(1, 512, 2, 64, dtype=torch.float16).requires_grad_()
    with recorded(dict.fromkeys(KERNELS, launch)) as found:
        fv.attend(q, q, q, fv.Causal(), fv.Entmax(1.5), implementation="triton").sum().backward()
    return found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "target", "shared"),
    [
        ("sm_80", ("cuda", 80, 32), 163 << 10),
        ("sm_90", ("cuda", 90, 32), 227 << 10),
        ("gfx942", ("hip", "gfx942", 64), 64 << 10),
    ],
)
def test_every_kernel_compiles_and_fits(
    architecture: str, target: tuple[Any, ...], shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    if ("amd" if target[0] == "hip" else "nvidia") not in backends:
        pytest.skip(f"this Triton has no backend for {target[0]}")
    found = launches(architecture, monkeypatch)
    assert {launch.name for launch in found} == set(KERNELS)
    for launch in found:
        compiled = launch.compile(GPUTarget(*target))
        assert compiled.metadata.shared <= shared, launch.name
