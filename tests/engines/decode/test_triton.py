"""The Triton edition in Triton's interpreter against float64, and compiled for GPUs."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

import foveal as fv
from foveal.caches import Cache, KVShape, Latent, Paged, Quantised
from foveal.engines.decode.problem import Terms
from tests.engines.decode import interpreted
from tests.engines.tile import interpreted as tile_interpreted
from tests.engines.tile.compiled import recorded

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
Run = Callable[..., Any]
QUICK = ("pages of 16", "several queries, key bias")


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


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in interpreted.CASES
    ],
)
def test_agrees_with_the_definition(name: str, interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.failures, name, seed(source)) == []


@pytest.mark.slow
def test_nan_stays_where_it_is(interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.nan_stays, seed(source)) == (True, True, True)


TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def _shape(head_dim: int, kv_heads: int = 2) -> KVShape:
    return KVShape(2, kv_heads, head_dim, dtype=torch.float16)


COMPILED: dict[str, Callable[[], tuple[Cache, int, Terms]]] = {
    "pages of 16": lambda: (Paged(_shape(128), pages=9), 1, Terms(0.1)),
    "long sequences": lambda: (Paged(_shape(128), pages=64), 1, Terms(0.1)),
    "several queries": lambda: (Paged(_shape(128), pages=9), 9, Terms(0.1, soft_cap=9.0)),
    "window, head_dim 256": lambda: (Paged(_shape(256, 1), pages=9), 1, Terms(0.1, left=99)),
    "int8": lambda: (Quantised(_shape(128), pages=9, bits="int8"), 1, Terms(0.1)),
    "int4": lambda: (Quantised(_shape(128), pages=9, bits="int4"), 1, Terms(0.1)),
    "latent": lambda: (Latent(2, 512, 64, pages=9, dtype=torch.float16), 1, Terms(0.1)),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("pages of 16", "sm_90"),
        *(
            pytest.param(name, target, marks=pytest.mark.slow)
            for name in COMPILED
            for target in TARGETS
            if (name, target) != ("pages of 16", "sm_90")
        ),
    ],
)
def test_every_kernel_compiles_and_fits(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    from foveal.engines.decode import launch, parts

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    kind = TARGETS[target][0]
    if ("amd" if kind == "hip" else "nvidia") not in backends:
        pytest.skip(f"this Triton has no backend for {kind}")
    monkeypatch.setattr(parts, "starts_early", lambda device: target in ("sm_90", "sm_100"))
    monkeypatch.setattr(launch, "shared_memory", lambda device: SHARED[target])
    cache, Lq, terms = COMPILED[name]()
    heads = 16 if name == "latent" else 8
    q = torch.zeros(2, Lq, heads, cache.shape.head_dim, dtype=torch.float16)
    names = ("decode_attend_forward", "decode_merge_forward")
    with recorded(dict(zip(names, (launch, parts), strict=True))) as found:
        launch.decode_on_device(cache.parts()[0].view, terms, q)
    assert [one.name for one in found] == list(names)
    for one in found:
        compiled = one.compile(GPUTarget(*TARGETS[target]))
        assert compiled.metadata.shared <= SHARED[target]


def test_long_sequences_take_wide_tiles() -> None:
    from foveal.engines.decode import launch

    device = torch.device("cpu")
    found = {}
    for pages, size in ((64, 16), (9, 16), (16, 64), (8, 128)):
        view = Paged(_shape(128), pages=pages, page_size=size).parts()[0].view
        found[pages, size] = launch.tiles_of(view, 4, device)
    programs = launch.processors(device)
    wide, narrow = (128, 5, programs), (64, 5, 2 * programs)
    assert [(x.keys, x.stages, x.programs) for x in found.values()] == [wide, narrow, narrow, wide]


def test_names_what_it_cannot_do() -> None:
    cache = Paged(KVShape(1, 1, 8, dtype=torch.float64), pages=1)
    with pytest.raises(fv.errors.RefusedError, match="CUDA"):
        fv.decode(torch.zeros(1, 1, 1, 8).double(), cache, implementation="triton")
