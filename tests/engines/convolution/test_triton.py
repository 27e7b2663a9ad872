"""The Triton editions in Triton's interpreter against float64, compiled for GPUs, and what they refuse."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

import foveal as fv
from tests.engines.convolution import interpreted
from tests.engines.convolution.problems import MIXES, ROWS, failures
from tests.engines.tile import interpreted as tile_interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    """Runs functions of `interpreted` in a process with Triton's interpreter."""
    context = multiprocessing.get_context("spawn")
    start = tile_interpreted.start
    with ProcessPoolExecutor(1, mp_context=context, initializer=start) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(interpreted.ready).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def seed(source: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=source))


QUICK = ("square", "even and dilated", "shifted sequence")


def cases(names: tuple[str, ...]) -> list[Any]:
    """The quick ones, and the others as slow tests."""
    marks = {name: () if name in QUICK else (pytest.mark.slow,) for name in names}
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.mark.parametrize("name", cases(interpreted.DIRECT))
def test_direct_agrees_with_the_definition(
    name: str, interpreter: Run, source: torch.Generator
) -> None:
    first = name == "volume"
    assert interpreter(interpreted.failures_of, name, "triton", first, seed(source)) == []


@pytest.mark.parametrize("name", cases(interpreted.BANDED))
def test_toeplitz_agrees_with_the_definition(
    name: str, interpreter: Run, source: torch.Generator
) -> None:
    first = name in ("volume", "wide")
    assert interpreter(interpreted.failures_of, name, "toeplitz", first, seed(source)) == []


@pytest.mark.parametrize("name", cases(tuple(MIXES)))
def test_local_mix_agrees_with_the_definition(
    name: str, interpreter: Run, source: torch.Generator
) -> None:
    assert interpreter(interpreted.failures_of_mix, name, seed(source)) == []


@pytest.mark.parametrize("name", ROWS)
def test_strips_agree_with_the_definition(
    name: str, interpreter: Run, source: torch.Generator
) -> None:
    assert interpreter(interpreted.failures_of_strips, name, name == "dilated", seed(source)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_strips_agree_with_the_definition_on_a_gpu(
    name: str, dtype: torch.dtype, source: torch.Generator
) -> None:
    case = ROWS[name]
    for first in (False, True):
        tensors = [t.cuda() for t in case.draw(source, dtype)]
        assert failures(case.call("triton", first), case.definition, tensors, source) == []


TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("implementation", ["triton", "toeplitz", "strips", "mix"])
def test_every_kernel_compiles(
    implementation: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget

    from foveal.engines.convolution import (
        launch,
        launch_layout,
        launch_mix,
        launch_strips,
        launch_toeplitz,
    )
    from foveal.engines.convolution import triton as edition
    from tests.engines.tile import compiled

    monkeypatch.setattr(edition, "interpreted", lambda: True)
    modules = (launch, launch_toeplitz, launch_layout, launch_mix, launch_strips)
    kernels = {
        name: module
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("convolution_") and type(value).__name__ == "JITFunction"
    }
    x = torch.zeros(2, 16, 16, 64, dtype=torch.float16)
    with compiled.recorded(kernels) as launches:
        if implementation == "mix":
            v = x.unflatten(-1, (2, 32)).requires_grad_()
            weights = torch.zeros(2, 16, 16, 2, 25, dtype=torch.float16).requires_grad_()
            o = fv.local_mix(weights, v, 5, border="shift", implementation="triton")
        elif implementation == "strips":
            taps = torch.zeros(64, 5, dtype=torch.float16).requires_grad_()
            o = fv.convolve(x.requires_grad_(), fv.Strips(taps, taps), implementation="triton")
        else:
            x = x.requires_grad_()
            filter = torch.zeros(64, 5, 5, dtype=torch.float16).requires_grad_()
            o = fv.convolve(x, filter, implementation=implementation)
        o.backward(torch.zeros_like(o))
    names = set()
    for each in {(one.name, str(sorted(one.options.items()))): one for one in launches}.values():
        made = each.compile(GPUTarget(*TARGETS[target]))
        assert made.metadata.shared <= SHARED[target], each.name
        names.add(each.name)
    wanted = {
        "triton": {"convolution_direct_forward", "convolution_direct_filter_backward"},
        "toeplitz": {"convolution_toeplitz_forward", "convolution_products_backward"},
        "strips": {"convolution_strips_forward", "convolution_direct_filter_backward"},
        "mix": {"convolution_mix_forward", "convolution_mix_values_backward"},
    }
    assert wanted[implementation] <= names


def test_says_what_it_refuses() -> None:
    def refusals(dtype: torch.dtype, *filter: int, **options: Any) -> dict[str, str]:
        grid = (8,) * (len(filter) - 1)
        x = torch.empty(2, *grid, 4, device="meta", dtype=dtype)
        taps = torch.empty(filter, device="meta", dtype=dtype)
        return dict(fv.explain_convolve(x, taps, device="cuda", **options).refusals)

    assert "float64" in refusals(torch.float64, 4, 3, 3)["triton"]
    assert "sequence" in refusals(torch.bfloat16, 4, 3)["toeplitz"]
    assert "dilated" in refusals(torch.bfloat16, 4, 3, 3, dilation=2)["toeplitz"]
    assert "float32" in refusals(torch.float32, 4, 3, 3)["toeplitz"]
