"""The Triton edition in Triton's interpreter against float64, compiled for GPUs, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

import foveal as fv
from foveal.engines.state import triton as edition
from foveal.engines.state.problem import describe_scan
from tests.engines.state import interpreted
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
            pool.submit(tile_interpreted.ready).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def seed(source: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=source))


@pytest.mark.parametrize("name", interpreted.CASES)
def test_agrees_with_the_definition(name: str, interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.failures, name, seed(source)) == []


@pytest.mark.slow
def test_pieces_of_a_sequence_are_the_whole(interpreter: Run, source: torch.Generator) -> None:
    assert max(interpreter(interpreted.split, seed(source))) < 1e-5


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("norm", [1.0, 1.6], ids=["unit keys", "longer keys"])
def test_float16_is_near_the_definition(
    decay: str, norm: float, interpreter: Run, source: torch.Generator
) -> None:
    """Keys of norm 1.6 let writes grow: the inverse of a chunk is not found by float16 then."""
    assert interpreter(interpreted.in_half, decay, norm, seed(source)) < 4e-3


@pytest.mark.parametrize(
    ("count", "heads", "dims", "first"),
    [(9, 2, (16, 16), True), (10, 1, (24, 40), False), (17, 2, (32, 16), True)],
)
def test_many_pieces_join_to_the_states_before_them(
    count: int,
    heads: int,
    dims: tuple[int, int],
    first: bool,
    interpreter: Run,
    source: torch.Generator,
) -> None:
    assert interpreter(interpreted.joined, count, heads, dims, first, seed(source)) < 1e-5


def test_one_step_is_the_definition(interpreter: Run, source: torch.Generator) -> None:
    assert max(interpreter(interpreted.step, seed(source))) < 1e-5


TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
COMPILED = [
    *((fv.Delta(), "channel", 128, torch.float16, target) for target in TARGETS),
    (fv.Additive(), "token", 128, torch.float16, "sm_90"),
    (fv.Delta(), "token", 256, torch.float16, "sm_90"),
    (fv.Delta(), "channel", 64, torch.float32, "sm_90"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "decay", "dim", "dtype", "target"), COMPILED)
def test_every_kernel_compiles(
    rule: fv.Rule,
    decay: str,
    dim: int,
    dtype: torch.dtype,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.backends.compiler import GPUTarget

    from foveal.engines.state import launch, launch_additive, task
    from tests.engines.tile import compiled

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    monkeypatch.setitem(compiled._TYPES, torch.float64, "*fp64")
    monkeypatch.setattr(edition, "_interpreted", lambda: True)
    leaves = [torch.zeros(1, 128, 2, dim, dtype=dtype).requires_grad_() for _ in range(3)]
    shape = (1, 128, 2) if decay == "token" else (1, 128, 2, dim)
    modules = (launch, launch_additive, task)
    kernels = {name: module for module in modules for name in vars(module) if name[:6] == "state_"}
    with compiled.recorded(kernels) as launches:
        o = fv.scan(
            *leaves, rule, log_decay=torch.zeros(shape), write_gate=torch.ones(1, 128, 2),
            implementation="triton",
        )  # fmt: skip
        o.backward(torch.zeros_like(o))
    names = set()
    for each in {(one.name, str(sorted(one.options.items()))): one for one in launches}.values():
        made = each.compile(GPUTarget(*TARGETS[target]))
        assert made.metadata.shared <= SHARED[target], each.name
        names.add(each.name)
    needed = {"state_walk_forward", "state_walk_backward", "state_keys_backward"}
    if rule == fv.Additive():
        needed = {f"state_additive_{part}_backward" for part in ("queries", "walk", "keys")}
    assert needed <= names


def refusal(device: str = "cuda", **changes: Any) -> str | None:
    x = torch.zeros(1, 4, 2, 16)
    problem = describe_scan(x, x, x, fv.Delta(), None, None, None, None)
    return edition.refuses(dataclasses.replace(problem, device=device, **changes), fv.Delta())


def test_says_what_it_refuses() -> None:
    assert refusal("cpu") == "it runs on CUDA tensors; these are on cpu"
    assert "float64" in str(refusal(dtype=torch.float64))
    assert "300" in str(refusal(head_dim=300))
    assert refusal() is None
