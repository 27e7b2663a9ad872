"""The Hopper edition: what it refuses, the boxes it chooses, and on a GPU its results."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import foveal as fv
from foveal._problem import describe
from foveal.engines.tile import hopper
from foveal.engines.tile.hopper_plan import (
    forward_walk,
    joint_walk,
    keys_walk,
    queries_walk,
    shared_heads,
)
from foveal.engines.tile.lists import walk_lists
from foveal.patterns.base import Extent
from foveal.patterns.documents import Packed
from foveal.scores.base import Geometry
from foveal.scores.normal import normal_form
from foveal.testing import Sizes, check_attend, poisoned_allocations, qkv
from foveal.testing.agreement import Agreement

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
    (fv.Sliding(60, sink_tokens=5), ((500,), (500,))),
    (fv.Sliding(60) | fv.Strided(37), ((300,), (333,))),
]


def blocks(q_block: int, kv_block: int) -> fv.Blocks:
    indices = torch.zeros(1, 1, 512 // q_block, 1, dtype=torch.int32)
    return fv.Blocks(fv.BlockSelection(indices, q_block, kv_block))


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
        (Sizes((64,), head_dim=64, value_dim=12), torch.bfloat16, fv.Softmax(), "value_dim"),
        (Sizes((64,), head_dim=60), torch.bfloat16, fv.Softmax(), "steps of 8"),
        (Sizes((64,), head_dim=264), torch.bfloat16, fv.Softmax(), "from 16 to 256"),
        (Sizes((0,), head_dim=64), torch.bfloat16, fv.Softmax(), "empty"),
        (Sizes((64,), head_dim=64), torch.float16, fv.Bias(torch.zeros(1, 1, 64, 64)), "per pair"),
        (Sizes((64,), head_dim=64), torch.float16, fv.Softmax(scale=-1.0), "positive scale"),
    ],
)
def test_refuses_what_it_cannot_compute(
    sizes: Sizes, dtype: torch.dtype, score: fv.Score, word: str
) -> None:
    reason = refusal(fv.Dense(), sizes, dtype, score)
    assert reason is not None
    assert word in reason


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
    ragged = Extent((1000,), (1000,))
    assert joint_walk(fv.Dense(), ragged, 64).hides
    assert not joint_walk(fv.Dense(), ragged, 64, biased=True).hides
    assert joint_walk(fv.Causal(), ragged, 64, biased=True).hides
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
@pytest.mark.parametrize("even", [False, True])
def test_heads_that_run_together_divide_all_heads(heads: int, groups: int, even: bool) -> None:
    for columns in (1, 1000, 50_000, 100_000):
        assert heads % shared_heads(heads, groups, columns, 128, even) == 0


def test_two_heads_run_together_where_one_would_end_with_its_longest_items() -> None:
    assert shared_heads(8, 1, 32_768, 128) == 1
    assert shared_heads(8, 1, 32_768, 128, even=False) == 2
    assert shared_heads(8, 1, 262_144, 128, even=False) == 1


@pytest.mark.parametrize("by_key", [False, True])
def test_lists_name_the_tiles_of_the_map(by_key: bool, source: torch.Generator) -> None:
    kept = torch.rand(2, 3, 4, 5, generator=source) < 0.5
    pattern = fv.Blocks(fv.BlockSelection.from_block_mask(kept, 128, 128)) & fv.Causal()
    extent, cpu = Extent((500,), (600,)), torch.device("cpu")
    lists = walk_lists(pattern, extent, 128, 128, 6, cpu, by_key)
    states = pattern.tile_map(extent, 128, 128).clone()
    if by_key:
        states = states.mT
    # A last tile of columns that is not full is tested.
    states[..., -1] = states[..., -1].clamp(max=1)
    assert lists.heads_per_list == 2
    for batch, head in ((0, 0), (1, 2)):
        words = lists.words.flatten(0, 2)[batch * lists.batch_stride + head * lists.list_stride :]
        words = words[: states.shape[2]]
        assert bool((words[:-1, 2] >= words[1:, 2]).all())
        assert sorted(words[:, 0].tolist()) == list(range(states.shape[2]))
        for tile, tested, count, *columns in words.tolist():
            row = states[batch, head, tile]
            assert columns[:tested] == torch.nonzero(row == 1).flatten().tolist()
            assert columns[tested:count] == torch.nonzero(row == 2).flatten().tolist()


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        (blocks(128, 128), None),
        (blocks(128, 256) & fv.Sliding(40), None),
        (blocks(128, 128) | fv.Causal(), None),
        (blocks(64, 128), "multiples of 128"),
        (fv.Fixed(64, 4), "multiples of 128"),
        (blocks(128, 128) & fv.Strided(5), None),
        (blocks(128, 128) & (blocks(128, 128) | fv.Causal()), "one & or one |"),
    ],
)
def test_refuses_lists_that_it_cannot_walk(pattern: fv.Pattern, word: str | None) -> None:
    reason = refusal(pattern, Sizes((512,), head_dim=64), torch.bfloat16, fv.Softmax())
    assert (reason is None) == (word is None)
    assert word is None or word in str(reason)


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
            # Poisoning asks PyTorch for repeatable gradients, by other kernels.
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

    @pytest.mark.parametrize(
        ("head_dim", "value_dim"), [(128, 64), (64, 256), (192, 128), (256, 256)]
    )
    def test_value_sizes(self, head_dim: int, value_dim: int, source: torch.Generator) -> None:
        sizes = Sizes((300,), q_heads=2, head_dim=head_dim, value_dim=value_dim)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        for pattern in (fv.Dense(), fv.Causal()):
            check_attend(q, k, v, pattern, implementation="hopper")

    @pytest.mark.parametrize("lists", [1, 2, 4])
    @pytest.mark.parametrize("joined", ["alone", "and", "or"])
    @pytest.mark.parametrize("head_dim", [64, 128, 192])
    def test_block_lists(
        self, head_dim: int, joined: str, lists: int, source: torch.Generator
    ) -> None:
        tokens = 1024 if joined == "or" else 1000
        sizes = Sizes((tokens,), batch=2, q_heads=4, kv_heads=2, head_dim=head_dim)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        kept = torch.rand(2, lists, 8, 8, generator=source) < 0.4
        kept[:, 0, 3] = False
        pattern: fv.Pattern = fv.Blocks(fv.BlockSelection.from_block_mask(kept, 128, 128))
        if joined == "and":
            pattern = pattern & fv.Causal()
        if joined == "or":
            pattern = pattern | fv.Sliding(70)
        check_attend(q, k, v, pattern, implementation="hopper")

    def test_a_graph_finds_lists_again(self, source: torch.Generator) -> None:
        q, k, v = qkv(Sizes((512,), q_heads=2, head_dim=64), source, torch.bfloat16, device="cuda")
        lists = torch.tensor([[[0, 2], [1, -1], [0, 3], [2, 3]], [[3, -1], [0, 1], [1, 2], [0, 2]]])
        first = lists[None].to("cuda", torch.int32)
        second = first.flip(1)
        pattern = fv.Blocks(fv.BlockSelection(first.clone(), 128, 128))
        fv.attend(q, k, v, pattern, implementation="hopper")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = fv.attend(q, k, v, pattern, implementation="hopper")
        for indices in (first, second):
            pattern.selection.indices.copy_(indices)
            graph.replay()
            again = fv.Blocks(fv.BlockSelection(indices, 128, 128))
            assert torch.equal(o, fv.attend(q, k, v, again, implementation="hopper"))

    @pytest.mark.parametrize("soft_cap", [None, 3.0])
    @pytest.mark.parametrize("sink", [False, True])
    def test_scores(self, soft_cap: float | None, sink: bool, source: torch.Generator) -> None:
        sizes = Sizes((300,), batch=2, q_heads=4, kv_heads=2, head_dim=64)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        sinks = torch.randn(4, generator=source).cuda() if sink else None
        score = fv.Softmax(scale=0.3, soft_cap=soft_cap, sink=sinks)
        for pattern in (fv.Dense(), fv.Sliding(50)):
            check_attend(q, k, v, pattern, score, implementation="hopper")

    @pytest.mark.parametrize("soft_cap", [None, 3.0])
    def test_terms(self, soft_cap: float | None, source: torch.Generator) -> None:
        sizes = Sizes((300,), batch=2, q_heads=4, kv_heads=2, head_dim=64)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        slopes = fv.Alibi(torch.rand(4, generator=source).cuda())
        bias = fv.KeyBias(torch.randn(2, 2, 300, generator=source).cuda())
        for pattern in (fv.Dense(), fv.Causal(), fv.Strided(3), fv.Sliding(40, sink_tokens=3)):
            for term in (slopes, bias):
                score = fv.Softmax(soft_cap=soft_cap) + term
                check_attend(q, k, v, pattern, score, implementation="hopper")

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize(
        "pattern",
        [
            Packed(fv.Causal(), (87, 124, 159, 130)) | fv.Rectangle((87, 500), (0, 87)),
            fv.Sliding(60, 60) | fv.Rectangle((0, 60), (0, 500)) | fv.Rectangle((0, 500), (0, 60)),
            fv.Sliding(60, sink_tokens=5),
        ],
        ids=["shared question", "global window", "sinks"],
    )
    def test_two_intervals_per_token(
        self, pattern: fv.Pattern, head_dim: int, source: torch.Generator
    ) -> None:
        sizes = Sizes((500,), batch=2, q_heads=4, kv_heads=2, head_dim=head_dim)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        check_attend(q, k, v, pattern, implementation="hopper")

    @pytest.mark.parametrize(
        ("pattern", "grid", "head_dim", "biases"),
        [
            (fv.Dense(), (300,), 64, (2, 4)),
            (fv.Dense(), (12, 13), 128, (1, 1)),
            (fv.Causal(), (500,), 64, (1, 2)),
            (fv.Neighborhood((5, 6, 7)), (9, 10, 11), 64, (2, 1)),
            (fv.Sliding(60, sink_tokens=5), (500,), 64, (2, 2)),
            (fv.Neighborhood((5, 5), dilation=2), (20, 18), 64, (2, 1)),
        ],
        ids=str,
    )
    def test_gradients_beside_a_bias_that_needs_none(
        self,
        pattern: fv.Pattern,
        grid: tuple[int, ...],
        head_dim: int,
        biases: tuple[int, int],
        source: torch.Generator,
    ) -> None:
        sizes = Sizes(grid, batch=2, q_heads=4, kv_heads=2, head_dim=head_dim)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        bias = torch.randn(*biases, math.prod(grid), generator=source).cuda()
        bias[..., torch.rand(math.prod(grid), generator=source) < 0.2] = -math.inf
        for score in (fv.KeyBias(bias), fv.KeyBias(bias.nan_to_num(neginf=-60.0))):
            problem = Agreement(q, k, v, pattern, score)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            o, lse = fv.attend(*leaves, pattern, score, return_lse=True, implementation="hopper")
            weights = problem._weights({"o": o, "lse": lse})
            cotangents = [weights["o"].to(o), weights["lse"].to(lse)]
            gradients = torch.autograd.grad([o, lse], leaves, cotangents)
            found = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
            exact = problem._evaluate("reference", torch.float64)
            verdicts = problem.verdicts({**exact, **found, "o": o.detach(), "lse": lse.detach()})
            assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))

    @pytest.mark.parametrize("grid", [(12, 13), (5, 6, 7)])
    def test_biases_on_grids(self, grid: tuple[int, ...], source: torch.Generator) -> None:
        sizes = Sizes(grid, batch=2, q_heads=2, head_dim=64)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        bias = fv.KeyBias(torch.randn(2, 1, math.prod(grid), generator=source).cuda())
        pattern = fv.Neighborhood((3,) * len(grid))
        check_attend(q, k, v, pattern, bias, implementation="hopper")

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["q", "k", "v"])
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize(
        ("pattern", "grid"),
        [
            (fv.Causal(), (300,)),
            (fv.Sliding(40, 3), (300,)),
            (fv.Neighborhood((5, 6)), (14, 15)),
            (fv.Neighborhood((3, 4, 3)), (6, 7, 8)),
            (fv.Sliding(40, sink_tokens=3), (300,)),
            (fv.Blocks(fv.BlockSelection(torch.tensor([[[[0], [1], [2]]]]), 128, 128)), (300,)),
        ],
        ids=str,
    )
    def test_non_finite_values_reach_the_rows_that_see_them(
        self,
        pattern: fv.Pattern,
        grid: tuple[int, ...],
        head_dim: int,
        where: str,
        value: float,
        source: torch.Generator,
    ) -> None:
        if where != "v" and math.isinf(value):
            pytest.skip("scores of both signs: NaN or not depends on the order of sums")
        sizes = Sizes(grid, batch=2, q_heads=2, head_dim=head_dim)
        tensors = dict(zip("qkv", qkv(sizes, source, torch.bfloat16, device="cuda"), strict=True))
        flat = tensors[where].flatten(1, -3)
        flat[0, 100, 0, :2] = value
        flat[1, 133, 1, 5] = value
        found = fv.attend(*tensors.values(), pattern, return_lse=True, implementation="hopper")
        exact = (x.double() for x in tensors.values())
        expected = fv.attend(*exact, pattern, return_lse=True, implementation="reference")
        for got, want in zip(found, expected, strict=True):
            for test in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(test(got), test(want))
            torch.testing.assert_close(
                got.double().nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0), rtol=0.02, atol=0.02
            )

    def test_results_repeat_bit_by_bit(
        self, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        q, k, v = qkv(Sizes((900,), q_heads=4, head_dim=128), source, torch.bfloat16, device="cuda")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        runs = []
        for _ in range(3):
            o, lse = fv.attend(*leaves, fv.Causal(), return_lse=True, implementation="hopper")
            runs.append((o, lse, *torch.autograd.grad((o.float().sum() + lse.sum()), leaves)))
        for results in zip(*runs, strict=True):
            assert all(torch.equal(results[0], again) for again in results[1:])

    @pytest.mark.parametrize("repeatable", [False, True])
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("where", ["q", "k", "v", "do"])
    @pytest.mark.parametrize(
        ("pattern", "grid"),
        [
            (fv.Causal(), (300,)),
            (fv.Neighborhood((5, 7)), (20, 19)),
            (fv.Sliding(40, sink_tokens=3), (300,)),
        ],
    )
    def test_nan_reaches_the_gradients_of_what_it_is_seen_with(
        self,
        pattern: fv.Pattern,
        grid: tuple[int, ...],
        where: str,
        head_dim: int,
        repeatable: bool,
        source: torch.Generator,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: repeatable)
        sizes = Sizes(grid, q_heads=2, kv_heads=1, head_dim=head_dim)
        q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
        do = torch.randn(q.shape, generator=source).to(q)
        row = math.prod(grid) // 2
        {"q": q, "k": k, "v": v, "do": do}[where].flatten(1, -3)[0, row, :, :2] = math.nan
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = fv.attend(*leaves, pattern, implementation="hopper")
        dq, dk, dv = (x.flatten(1, -3) for x in torch.autograd.grad(o, leaves, do))
        seen = pattern.dense_mask(grid, grid)
        queries, keys = torch.zeros(len(seen)) > 0, torch.zeros(len(seen)) > 0
        if where in ("q", "do"):
            queries[row] = True
        else:
            queries |= seen[:, row]
        keys |= seen[queries].any(0)
        spoilt = {
            # dV takes P and dO, and P is NaN where a score is.
            "dv": keys if where in ("q", "k", "do") else torch.zeros_like(keys),
            "dq": queries,
            "dk": keys,
        }
        for name, got in (("dq", dq), ("dk", dk), ("dv", dv)):
            assert torch.equal(got[0].isnan().any(-1).any(-1).cpu(), spoilt[name]), name
