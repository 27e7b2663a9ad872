"""The locality family on a GPU: every pattern, score and composition against float64."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.compose import attend_finer, attend_with_context, padding_bias
from foveal.layers.diagonal import diagonal
from foveal.layers.groups import document_groups
from foveal.layers.shards import head_shards
from foveal.layers.sphere import area_score
from foveal.systems.locality.groups import regular_document
from foveal.testing import Sizes, check_attend, qkv
from foveal.testing.bounds import check, error
from foveal.tuning import tile as tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IMPLEMENTATIONS = ("triton", "hopper")
Case = tuple[fv.Pattern, Sizes, Callable[[torch.Generator], fv.Score]]


def plain(source: torch.Generator) -> fv.Score:
    return fv.Softmax()


def area(grid: tuple[int, int]) -> Callable[[torch.Generator], fv.Score]:
    return lambda source: area_score(grid, device="cuda")


def table(*sides: int) -> Callable[[torch.Generator], fv.Score]:
    def drawn(source: torch.Generator) -> fv.Score:
        return fv.Softmax() + fv.RelativeBias(torch.randn(2, *sides, generator=source).cuda())

    return drawn


def sinks(source: torch.Generator) -> fv.Score:
    return fv.Softmax(sink=torch.randn(2, generator=source).cuda())


def sized(*grids: tuple[int, ...], kv_heads: int = 2) -> Sizes:
    return Sizes(grids[0], grids[-1], q_heads=2, kv_heads=kv_heads, head_dim=64)


def shards() -> fv.Pattern:
    mask = head_shards(8, 2, local_blocks=2, vert_stride=3)
    return fv.Blocks(fv.BlockSelection.from_block_mask(mask, 64, 64)) & fv.Causal()


RELATIVES: dict[str, Case] = {
    "sphere, global": (fv.Dense(), sized((18, 36)), area((18, 36))),
    "sphere, radius": (fv.Sphere(0.3), sized((18, 36)), area((18, 36))),
    "sphere, gauss": (fv.Sphere(0.35, "gauss-legendre"), sized((16, 30)), plain),
    "sphere, coarser queries": (fv.Sphere(0.4), sized((9, 18), (18, 36)), area((18, 36))),
    "tree": (fv.Tree(document_groups(regular_document(600, 17, 5))), sized((600,)), plain),
    "scales, own": (fv.Scales((1, 2, 5, 9, 16)), sized((367,)), plain),
    "scales, before": (fv.Scales((1, 2, 5, 9, 16), "before"), sized((367,)), plain),
    "scales, window": (fv.Scales((1, 2, 5, 9, 16), window=7), sized((367,)), plain),
    "rows": (
        fv.Rows(torch.arange(500) * 7 % 300, torch.arange(500) * 11 % 400),
        sized((500,), (400,)),
        plain,
    ),
    "rows that rise": (
        fv.Rows(torch.arange(500) // 3, torch.arange(500) // 2 + 90),
        sized((500,), (400,)),
        plain,
    ),
    "demucs": (diagonal(500, 300, 20, 10, True), sized((500,), (300,)), plain),
    "head shards": (shards(), sized((500,)), plain),
    "sparse transformer": (fv.Sliding(31) | fv.Strided(32), sized((500,)), plain),
    "fixed": (fv.Fixed(64, 16), sized((500,)), plain),
    "both axes": (fv.Axial(0) | fv.Axial(1), sized((20, 24)), plain),
    "windows with a table": (fv.Partition((7, 7), (3, 3)), sized((21, 28)), table(13, 13)),
    "chunks": (fv.Partition(40, before=5, after=5), sized((500,)), plain),
}
"""Pattern, sizes and score of each."""

NEIGHBORHOODS: dict[str, Case] = {
    "1-D table": (fv.Neighborhood(31), sized((400,)), table(61)),
    "2-D table": (fv.Neighborhood((7, 9)), sized((25, 22), kv_heads=1), table(13, 17)),
    "2-D table, dilated": (fv.Neighborhood((5, 5), dilation=3), sized((25, 22)), table(9, 9)),
    "3-D table": (fv.Neighborhood((3, 5, 4)), sized((6, 9, 10)), table(5, 9, 7)),
    "wrap": (fv.Neighborhood(33, border="wrap"), sized((300,)), plain),
    "wrap, 2-D": (fv.Neighborhood((5, 8), border="wrap"), sized((20, 24)), plain),
    "wrap, table": (fv.Neighborhood((5, 7), border="wrap"), sized((20, 24)), table(9, 13)),
    "one axis wraps": (
        fv.Neighborhood((5, 8), dilation=(1, 2), border=("shift", "wrap")),
        sized((20, 24)),
        sinks,
    ),
    "wrap, 3-D": (
        fv.Neighborhood((3, 4, 5), border=("clip", "wrap", "shift")),
        sized((6, 8, 10)),
        plain,
    ),
    "sinks": (fv.Neighborhood((7, 9), stride=2), sized((25, 22)), sinks),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [*RELATIVES, *NEIGHBORHOODS])
def test_agrees_with_float64(name: str, implementation: str, source: torch.Generator) -> None:
    pattern, sizes, score = (RELATIVES | NEIGHBORHOODS)[name]
    q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
    answered(lambda: check_attend(q, k, v, pattern, score(source), implementation=implementation))


def answered(work: Callable[[], object]) -> None:
    try:
        work()
    except fv.errors.RefusedError as refusal:
        pytest.skip(f"refused: {refusal.reason}")


Composition = Callable[..., tuple[Tensor, Tensor]]


def on_a_finer_grid(implementation: str | None) -> tuple[Composition, list[tuple[int, ...]]]:
    def compose(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return attend_finer(
            q, k, v, fv.Neighborhood((5, 6)), fv.Softmax(sink=sink),
            return_lse=True, implementation=implementation,
        )  # fmt: skip

    return compose, [(1, 24, 33, 2, 64), (1, 12, 11, 1, 64), (1, 12, 11, 1, 64), (2,)]


def with_registers(implementation: str | None) -> tuple[Composition, list[tuple[int, ...]]]:
    def compose(
        q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor, sink: Tensor
    ) -> tuple[Tensor, Tensor]:
        return attend_with_context(
            q, k, v, more_k, more_v, fv.Neighborhood((7, 5), stride=2), fv.Softmax(sink=sink),
            return_lse=True, implementation=implementation,
        )  # fmt: skip

    grid = (1, 20, 18, 2, 64)
    return compose, [grid, grid, grid, (1, 37, 2, 64), (1, 37, 2, 64), (2,)]


def with_padding(implementation: str | None) -> tuple[Composition, list[tuple[int, ...]]]:
    def compose(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor([[20, 18], [13, 17]], device=q.device)
        score = fv.Softmax() + padding_bias(sizes, (20, 18))
        pattern = fv.Neighborhood((7, 5))
        return fv.attend(q, k, v, pattern, score, return_lse=True, implementation=implementation)

    return compose, [(2, 20, 18, 2, 64)] * 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", [on_a_finer_grid, with_registers, with_padding])
def test_compositions_agree_with_float64(
    make: Callable[[str | None], tuple[Composition, list[tuple[int, ...]]]],
    implementation: str,
    source: torch.Generator,
) -> None:
    there, shapes = make(implementation)
    here, _ = make("reference")
    inputs = [torch.randn(shape, generator=source).bfloat16() for shape in shapes]
    weights: list[Tensor] = []

    def results(work: Composition, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        outputs = work(*leaves)
        if not weights:
            weights.extend(torch.randn(x.shape, generator=source).cpu() for x in outputs)
        seen = [torch.where(x.isfinite(), x, 0.0) for x in outputs]
        pairs = zip(seen, weights, strict=True)
        gradients = torch.autograd.grad(sum((x.double() * w.to(x)).sum() for x, w in pairs), leaves)
        return [*(x.detach() for x in outputs), *gradients]

    exact = results(here, [x.double() for x in inputs])
    errors = [0.0] * len(exact)
    for number in range(8):
        nearby = torch.Generator().manual_seed(number)
        moved = [
            x * (1 + number * 2.0**-9 * torch.randn(x.shape, generator=nearby)).to(x)
            for x in inputs
        ]
        near = results(here, [x.double() for x in moved])
        pairs = zip(results(here, moved), near, strict=True)
        errors = [max(e, error(a, b)) for e, (a, b) in zip(errors, pairs, strict=True)]

    def work() -> None:
        found = results(there, [x.cuda() for x in inputs])
        for number, (got, e, right) in enumerate(zip(found, errors, exact, strict=True)):
            verdict = check(f"result {number}", got.cpu(), e, right)
            assert verdict.ok, str(verdict)

    answered(work)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["sphere, radius", "tree", "2-D table", "sinks", "wrap, 2-D"])
def test_gradients_repeat_bit_by_bit(
    name: str, implementation: str, source: torch.Generator
) -> None:
    pattern, sizes, score = (RELATIVES | NEIGHBORHOODS)[name]
    sizes = dataclasses.replace(sizes, batch=3)
    tensors = [x.requires_grad_() for x in qkv(sizes, source, torch.bfloat16, device="cuda")]
    scored = score(source)

    def gradients() -> tuple[Tensor, ...]:
        o = fv.attend(*tensors, pattern, scored, implementation=implementation)
        return torch.autograd.grad(o, tensors, torch.ones_like(o))

    def work() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            first = gradients()
            for _ in range(3):
                assert all(itertools.starmap(torch.equal, zip(first, gradients(), strict=True)))
        finally:
            torch.use_deterministic_algorithms(False)

    answered(work)


@pytest.mark.parametrize(
    "config",
    [tuning.Config(32, 32, 2, 1), tuning.Config(64, 32, 4, 2), tuning.Config(128, 64, 4, 2)],
)
@pytest.mark.parametrize("name", ["2-D table", "sphere, radius", "one axis wraps"])
def test_results_do_not_depend_on_the_tile(
    name: str, config: tuning.Config, source: torch.Generator
) -> None:
    pattern, sizes, score = (RELATIVES | NEIGHBORHOODS)[name]
    q, k, v = qkv(sizes, source, torch.bfloat16, device="cuda")
    stages = (tuning.FORWARD, tuning.BACKWARD_Q, tuning.BACKWARD_KV)
    with contextlib.ExitStack() as stack:
        for stage in stages:
            stack.enter_context(tuning.forced(stage, config))
        check_attend(q, k, v, pattern, score(source), implementation="triton")


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [((8, 8, 1), (8, 16, 1)), ((4, 16, 1), (32, 4, 1)), ((16, 4, 1), (2, 64, 1))],
)
def test_results_do_not_depend_on_the_boxes_of_the_hopper_edition(
    rows: tuple[int, int, int], columns: tuple[int, int, int], source: torch.Generator
) -> None:
    from foveal.engines.tile.hopper_forward import launch_forward
    from foveal.engines.tile.hopper_plan import Walk

    pattern, extent = fv.Neighborhood((9, 7)), fv.Extent((30, 27), (30, 27))
    q, k, v = qkv(sized((30, 27)), source, torch.bfloat16, device="cuda")
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    walk = Walk(rows, columns, 2, hides=True, skips=False)
    found, _ = launch_forward(pattern, extent, 0.125, *flat, walk)
    exact = fv.attend(*(x.double() for x in (q, k, v)), pattern, implementation="reference")
    plain = fv.attend(q, k, v, pattern, implementation="reference")
    verdict = check("o", found.view_as(exact), plain, exact)
    assert verdict.ok, str(verdict)
