"""Kernels of low-bit estimates: in the interpreter and on a GPU."""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from foveal.selectors import LowBit, Tiling
from tests.engines.tile import interpreted_low_bit

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
SIZES = [
    (150, 150, 2, 2, 40, 4, 5, 64, 32),
    (130, 200, 4, 1, 8, 8, 33, 16, 4),
    (70, 290, 3, 3, 64, 3, 1, 1, 128),
]


@needs_triton
def test_kernels_agree_in_the_interpreter(run_seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(torch.set_num_threads, 1).result()
            for sizes in SIZES:
                run = pool.submit(interpreted_low_bit.differences, sizes, run_seed)
                median, largest = run.result()
                assert median < 64 * 2**-23, sizes
                # A value halfway between two whole numbers may go to either.
                assert largest < 0.05, sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1000, 1000, 8, 2, 128), (333, 1500, 4, 4, 256)])
def test_scores_on_a_gpu(
    sizes: tuple[int, ...], dtype: torch.dtype, source: torch.Generator
) -> None:
    Lq, Lk, heads, kv_heads, dim = sizes
    q = torch.randn(2, Lq, heads, dim, generator=source).to(dtype)
    k = (torch.randn(2, Lk, kv_heads, dim, generator=source) + 1).to(dtype)
    tiling = Tiling(Lq, Lk, 64, 32, True)
    plain = LowBit().scores(q.double(), k.double(), tiling)
    found = LowBit().scores(q.cuda(), k.cuda(), tiling).cpu()
    seen = tiling.visible(q.device).expand_as(plain)
    assert torch.equal(found[seen] == torch.inf, plain[seen] == torch.inf)
    far = seen & (plain < torch.inf)
    # One number that is rounded the other way moves an estimate by a unit of its query times a key's.
    away = (found - plain)[far].abs()
    assert float(away.median()) < 1e-4
    assert float(away.max()) < 0.5
