"""Kernels of antidiagonal scores: in the interpreter, for compilers, and on a GPU."""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from foveal.engines.tile import antidiagonal
from foveal.selectors import Antidiagonal, Tiling
from tests.engines.tile import compiled, interpreted_antidiagonal

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
SIZES = [
    ((130, 130, 2, 1, 16, 4, 16, 16), True),
    ((100, 203, 4, 2, 32, 8, 24, 16), True),
    ((130, 90, 2, 1, 16, 2, 16, 32), True),  # the first queries see no key
    ((70, 90, 2, 2, 16, 2, 16, 16), False),
]


@needs_triton
def test_kernels_agree_in_the_interpreter(run_seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(torch.set_num_threads, 1).result()
            for sizes, causal in SIZES:
                run = pool.submit(interpreted_antidiagonal.difference, sizes, causal, run_seed)
                # Shares add up to q_block / stride in a row.
                assert run.result() < 1e-5 * sizes[6] / sizes[5], sizes


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "shared"),
    [
        (("cuda", 80, 32), 163 << 10),
        (("cuda", 90, 32), 227 << 10),
        (("cuda", 100, 32), 227 << 10),
        (("hip", "gfx942", 64), 64 << 10),
    ],
    ids=lambda x: str(x[1]) if isinstance(x, tuple) else "",
)
def test_kernels_compile_for_gpus_that_are_not_here(
    target: tuple[str, Any, int], shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    if ("amd" if target[0] == "hip" else "nvidia") not in backends:
        pytest.skip(f"this Triton has no backend for {target[1]}")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    found: list[compiled.Launch] = []

    def keep(kernel: Any, _: object, *arguments: Any, **options: Any) -> None:
        found.append(compiled.Launch(kernel, arguments, options))

    monkeypatch.setattr(antidiagonal, "launch", keep)
    q, k = (torch.zeros(1, 512, h, 128, dtype=torch.bfloat16) for h in (8, 2))
    shape = antidiagonal.shape_for(target[0] == "hip", shared)
    antidiagonal.scores(q, k, 16, (128, 128), True, shape)
    for launch in found:
        assert launch.compile(GPUTarget(*target)).metadata.shared <= shared, launch.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "causal"),
    [
        ((3001, 3001, 4, 1, 128, 16, 128, 128), True),
        ((1500, 4000, 4, 2, 64, 8, 64, 128), True),
        ((2048, 1000, 2, 2, 256, 16, 48, 64), False),
    ],
)
def test_scores_on_a_gpu(
    sizes: tuple[int, ...], causal: bool, dtype: torch.dtype, source: torch.Generator
) -> None:
    Lq, Lk, heads, kv_heads, dim, stride, *blocks = sizes
    q = 6 * torch.randn(2, Lq, heads, dim, generator=source).to(dtype)
    k = torch.randn(2, Lk, kv_heads, dim, generator=source).to(dtype)
    tiling = Tiling(Lq, Lk, blocks[0], blocks[1], causal)
    plain = Antidiagonal(stride).scores(q.double(), k.double(), tiling)
    q, k = q.cuda(), k.cuda()
    assert antidiagonal.serves(q, k, stride, blocks[1])
    found = Antidiagonal(stride).scores(q, k, tiling)
    # float32 sums of stride dim products, relative to shares that add up to q_block / stride.
    assert float((found.cpu() - plain).abs().max()) < 1e-4 * blocks[0] / stride
