"""The Hopper edition: what it refuses, the boxes it chooses, and on a GPU its results."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import foveal as fv
from foveal._problem import describe
from foveal.engines.tile import hopper
from foveal.engines.tile.hopper_plan import forward_walk, keys_walk, queries_walk, shared_heads
from foveal.patterns.base import Extent
from foveal.scores.base import Geometry
from foveal.scores.normal import normal_form
from foveal.testing import Sizes, check_attend, poisoned_allocations, qkv

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]

# A pattern, its grids of queries and keys.
CASES = [
    (fv.Dense(), ((200,), (333,))),
    (fv.Dense(), ((3,), (5,))),
    (fv.Causal(), ((500,), (500,))),
    (fv.Causal(), ((100,), (333,))),
    (fv.Causal(), ((333,), (100,))),
    (fv.Sliding(70, 5), ((400,), (400,))),
    (fv.Sliding(40), ((300,), (90,))),
    (fv.Strided(3), ((200,), (200,))),
    (fv.Neighborhood(33, stride=4), ((257,), (257,))),
    (fv.Neighborhood((9, 7)), ((30, 27), (30, 27))),
    (fv.Neighborhood((9, 7), dilation=2), ((30, 27), (30, 27))),
    (fv.Neighborhood((9, 7), stride=3, causal=(True, False)), ((30, 27), (30, 27))),
    (fv.Neighborhood((9, 7), border="clip"), ((22, 31), (22, 31))),
    (fv.Neighborhood((5, 6, 7)), ((9, 10, 11), (9, 10, 11))),
    (fv.Axial(0), ((20, 24), (20, 24))),
    (fv.Partition((8, 8), shift=(4, 4)), ((20, 24), (20, 24))),
]


def refusal(pattern: fv.Pattern, sizes: Sizes, dtype: torch.dtype, score: fv.Score) -> str | None:
    """What the edition says of tensors on the GPU, on whatever machine this runs."""
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in sizes.shapes)
    problem = dataclasses.replace(describe(q, k, v, False), device="cuda")
    geometry = Geometry(pattern, problem.extent, 1, problem.q_heads, problem.kv_heads)
    form = normal_form(score, problem.head_dim, geometry)
    return (
        hopper._refuses_sizes(problem)
        or hopper._refuses_score(form)
        or hopper._refuses_pattern(pattern.simplify(problem.extent), problem.extent)
    )


@pytest.mark.parametrize(
    ("sizes", "dtype", "score", "word"),
    [
        (Sizes((64,), head_dim=64), torch.float32, fv.Softmax(), "float32"),
        (Sizes((64,), head_dim=64, value_dim=32), torch.bfloat16, fv.Softmax(), "Dv = D"),
        (Sizes((64,), head_dim=60), torch.bfloat16, fv.Softmax(), "steps of 8"),
        (Sizes((64,), head_dim=256), torch.bfloat16, fv.Softmax(), "from 16 to 128"),
        (Sizes((0,), head_dim=64), torch.bfloat16, fv.Softmax(), "empty"),
        (Sizes((64,), head_dim=64), torch.bfloat16, fv.Softmax(soft_cap=5.0), "soft cap"),
        (Sizes((64,), head_dim=64), torch.bfloat16, fv.Softmax(sink=torch.zeros(1)), "sink"),
        (Sizes((64,), head_dim=64), torch.float16, fv.Alibi(torch.ones(1)), "additive"),
        (Sizes((64,), head_dim=64), torch.float16, fv.Softmax(scale=-1.0), "positive scale"),
    ],
)
def test_refuses_what_it_cannot_compute(
    sizes: Sizes, dtype: torch.dtype, score: fv.Score, word: str
) -> None:
    reason = refusal(fv.Dense(), sizes, dtype, score)
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize(
    "pattern", [fv.Sliding(3) | fv.Strided(5), fv.Fixed(4, 1), fv.Sliding(3, sink_tokens=2)]
)
def test_refuses_patterns_that_are_no_boxes(pattern: fv.Pattern) -> None:
    reason = refusal(pattern, Sizes((40,), head_dim=64), torch.bfloat16, fv.Softmax())
    assert reason is not None
    assert "interval" in reason


@pytest.mark.parametrize(("pattern", "grids"), CASES)
def test_accepts_every_case_of_the_gpu_tests(
    pattern: fv.Pattern, grids: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    sizes = Sizes(*grids, head_dim=64)
    assert refusal(pattern, sizes, torch.bfloat16, fv.Softmax()) is None


def test_refuses_tensors_on_the_cpu() -> None:
    q = torch.zeros(1, 8, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(fv.errors.RefusedError, match="CUDA"):
        fv.attend(q, q, q, implementation="hopper")


def test_dense_and_strided_windows_need_no_mask() -> None:
    line, image = Extent((1024,), (1024,)), Extent((256, 256), (256, 256))
    assert not forward_walk(fv.Dense(), line, 128).hides
    assert forward_walk(fv.Dense(), Extent((1024,), (1000,)), 128).hides
    assert forward_walk(fv.Causal(), line, 128).hides
    assert not forward_walk(fv.Neighborhood((80, 80), stride=16), image, 128).hides


def test_boxes_hold_what_the_kernels_expect() -> None:
    extent = Extent((30, 48, 80), (30, 48, 80))
    pattern = fv.Neighborhood((18, 24, 24))
    for walk, rows, columns in (
        (forward_walk(pattern, extent, 128), 64, 128),
        (queries_walk(pattern, extent, 128), 64, 64),
        (keys_walk(pattern, extent, 128), 64, 64),
    ):
        x, y, z = walk.rows
        assert x * y * z == rows
        x, y, z = walk.columns
        assert x * y * z == columns
        assert z >= 4


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (12, 3), (24, 1), (7, 7)])
def test_heads_that_run_together_divide_all_heads(heads: int, groups: int) -> None:
    for columns in (1, 1000, 100_000):
        assert heads % shared_heads(heads, groups, columns, 128) == 0


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("head_dim", [128, 64])
    @pytest.mark.parametrize(("pattern", "grids"), CASES)
    def test_agrees_with_the_definition(
        self,
        pattern: fv.Pattern,
        grids: tuple[tuple[int, ...], tuple[int, ...]],
        head_dim: int,
        source: torch.Generator,
    ) -> None:
        sizes = Sizes(*grids, batch=2, q_heads=4, kv_heads=2, head_dim=head_dim)
        for dtype in (torch.bfloat16, torch.float16):
            q, k, v = qkv(sizes, source, dtype, device="cuda")
            with poisoned_allocations():
                check_attend(q, k, v, pattern, implementation="hopper")

    @pytest.mark.parametrize("head_dim", [16, 24, 32, 80, 96])
    def test_head_sizes(self, head_dim: int, source: torch.Generator) -> None:
        sizes = Sizes((150,), batch=2, q_heads=6, kv_heads=2, head_dim=head_dim)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        for pattern in (fv.Dense(), fv.Causal()):
            check_attend(q, k, v, pattern, implementation="hopper")

    @pytest.mark.parametrize("layout", ["heads_first", "strided", "broadcast"])
    def test_layouts(self, layout: str, source: torch.Generator) -> None:
        sizes = Sizes((12, 13), batch=2, q_heads=4, head_dim=64)
        q, k, v = qkv(sizes, source, torch.bfloat16, layout, "cuda")
        check_attend(q, k, v, fv.Neighborhood((5, 6)), implementation="hopper")

    def test_documents(self, source: torch.Generator) -> None:
        q, k, v = qkv(Sizes((700,), q_heads=2, head_dim=64), source, torch.bfloat16, device="cuda")
        cuts = torch.tensor([0, 3, 3, 200, 201, 640, 700], dtype=torch.int32)
        for pattern in (fv.Documents(), fv.Causal()):
            check_attend(q, k, v, pattern, cu_seqlens=cuts, implementation="hopper")

    def test_results_repeat_bit_by_bit(self, source: torch.Generator) -> None:
        q, k, v = qkv(Sizes((900,), q_heads=4, head_dim=128), source, torch.bfloat16, device="cuda")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        runs = []
        for _ in range(3):
            o, lse = fv.attend(*leaves, fv.Causal(), return_lse=True, implementation="hopper")
            runs.append((o, lse, *torch.autograd.grad((o.float().sum() + lse.sum()), leaves)))
        for results in zip(*runs, strict=True):
            assert all(torch.equal(results[0], again) for again in results[1:])
