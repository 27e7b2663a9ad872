"""Compositions equal one softmax over what they put together, values and gradients."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.compose import (
    attend_finer,
    attend_weighted,
    attend_with_context,
    merge,
    padding_bias,
)
from foveal.testing.bounds import check_near, error, neighbour
from tests.compose import interpreted

double = torch.float64


def draw(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=double).requires_grad_()


def assert_same(left: tuple[Tensor, ...], right: tuple[Tensor, ...], *inputs: Tensor) -> None:
    """Values, and gradients by the same cotangents."""
    sides = []
    for side in (left, right):
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in side]
        sides.append(
            torch.autograd.grad(side, inputs, weights, retain_graph=True, materialize_grads=True)
        )
    for a, b in zip((*left, *sides[0]), (*right, *sides[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def dense(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """o and lse of flat q [B, Lq, H, D], k and v [B, Lk, Hkv, .], visible [Lq, Lk]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~visible, -torch.inf)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return o, scores.logsumexp(-1).transpose(1, 2)


def test_merge_of_pieces_is_the_whole(source: torch.Generator) -> None:
    q, k, v = draw(source, 2, 5, 4, 3), draw(source, 2, 9, 2, 3), draw(source, 2, 9, 2, 6)
    cuts = (slice(0, 4), slice(4, 5), slice(5, 9))
    parts = [fv.attend(q, k[:, cut], v[:, cut], return_lse=True) for cut in cuts]
    merged = merge(*zip(*parts, strict=True))
    assert_same(merged, dense(q, k, v, torch.ones(5, 9, dtype=torch.bool)), q, k, v)


def test_rows_that_nobody_sees_stay_zero(source: torch.Generator) -> None:
    outputs = [draw(source, 3, 2, 4) for _ in range(2)]
    lses = [torch.full((3, 2), -torch.inf, dtype=double) for _ in range(2)]
    lses[0][0] = 1.5
    lses = [lse.requires_grad_() for lse in lses]
    o, lse = merge(outputs, lses)
    assert torch.equal(o[0], outputs[0][0])
    assert o[1:].eq(0).all()
    assert lse[1:].eq(-torch.inf).all()
    gradients = torch.autograd.grad(o.sum() + lse[0].sum(), (*outputs, *lses))
    assert all(g.isfinite().all() for g in gradients)


def test_merge_refuses_what_does_not_fit(source: torch.Generator) -> None:
    o, lse = draw(source, 1, 3, 2, 4), draw(source, 1, 3, 2)
    with pytest.raises(fv.errors.ShapeError, match="as many"):
        merge([o, o], [lse])
    with pytest.raises(fv.errors.ShapeError, match="lse"):
        merge([o, o], [lse, lse[:, 1:]])


@pytest.mark.parametrize(
    ("grid", "pattern"),
    [
        ((11,), fv.Neighborhood(4, causal=True)),
        ((5, 6), fv.Neighborhood((3, 2), dilation=(1, 2), border=("shift", "wrap"))),
        ((3, 4, 2), fv.Neighborhood((2, 3, 1))),
    ],
)
@pytest.mark.parametrize("extra", [1, 7])
def test_context_is_a_concatenation(
    grid: tuple[int, ...], pattern: fv.Pattern, extra: int, source: torch.Generator
) -> None:
    q = draw(source, 2, *grid, 4, 5)
    k, v = draw(source, 2, *grid, 2, 5), draw(source, 2, *grid, 2, 3)
    ck, cv = draw(source, 2, extra, 2, 5), draw(source, 2, extra, 2, 3)
    got = attend_with_context(q, k, v, ck, cv, pattern, fv.Softmax(scale=0.7), return_lse=True)
    length = math.prod(grid)
    visible = torch.cat([pattern.dense_mask(grid, grid), torch.ones(length, extra).bool()], 1)
    o, lse = dense(
        q.flatten(1, -3),
        torch.cat([k.flatten(1, -3), ck], 1),
        torch.cat([v.flatten(1, -3), cv], 1),
        visible,
        0.7,
    )
    assert_same(got, (o.unflatten(1, grid), lse.unflatten(1, grid)), q, k, v, ck, cv)


def test_sink_counts_once_and_tables_speak_of_the_grid(source: torch.Generator) -> None:
    grid, pattern = (4, 5), fv.Neighborhood(3)
    q, k, v = (draw(source, 1, *grid, 2, 4) for _ in range(3))
    ck, cv = draw(source, 1, 3, 2, 4), draw(source, 1, 3, 2, 4)
    sink, table = draw(source, 2), draw(source, 2, 5, 5)
    score = fv.Softmax(soft_cap=2.0, sink=sink) + fv.RelativeBias(table)
    got = attend_with_context(q, k, v, ck, cv, pattern, score, return_lse=True)
    bias = fv.RelativeBias(table).values(
        table,
        torch.arange(20)[None],
        torch.arange(20)[None],
        fv.scores.base.Geometry(pattern, fv.Extent(grid, grid), 1, 2, 2),
    )[:, 0]
    q_f, k_f, v_f = (x.flatten(1, 2) for x in (q, k, v))
    keys, values = torch.cat([k_f, ck], 1), torch.cat([v_f, cv], 1)
    scores = 2.0 * torch.tanh(torch.einsum("bihd,bjhd->bhij", q_f, keys) / 2 / 2.0)
    scores = scores + torch.cat([bias, bias.new_zeros(1, 2, 20, 3)], -1)
    visible = torch.cat([pattern.dense_mask(grid, grid), torch.ones(20, 3).bool()], 1)
    scores = scores.masked_fill(~visible, -torch.inf)
    total = torch.cat([scores, sink[None, :, None, None].expand(1, 2, 20, 1)], -1).logsumexp(-1)
    o = torch.einsum("bhij,bjhd->bihd", torch.exp(scores - total[..., None]), values)
    expected = o.unflatten(1, grid), total.transpose(1, 2).unflatten(1, grid)
    assert_same(got, expected, q, k, v, ck, cv, sink, table)


@pytest.mark.parametrize(
    ("grid", "ratios", "pattern"),
    [
        ((7,), (3,), fv.Neighborhood(4, stride=2)),
        ((4, 5), (2, 1), fv.Neighborhood((3, 4), causal=(True, False))),
        ((3, 3, 2), (1, 2, 2), fv.Neighborhood((2, 3, 2), border="clip")),
    ],
)
def test_finer_queries_see_the_window_of_their_cell(
    grid: tuple[int, ...], ratios: tuple[int, ...], pattern: fv.Pattern, source: torch.Generator
) -> None:
    fine = tuple(n * r for n, r in zip(grid, ratios, strict=True))
    q = draw(source, 2, *fine, 4, 5)
    k, v = draw(source, 2, *grid, 2, 5), draw(source, 2, *grid, 2, 3)
    got = attend_finer(q, k, v, pattern, return_lse=True)
    cell = torch.arange(math.prod(grid)).view(grid)
    for axis, ratio in enumerate(ratios):
        cell = cell.repeat_interleave(ratio, dim=axis)
    visible = pattern.dense_mask(grid, grid)[cell.flatten()]
    o, lse = dense(*(x.flatten(1, -3) for x in (q, k, v)), visible)
    assert_same(got, (o.unflatten(1, fine), lse.unflatten(1, fine)), q, k, v)


def test_finer_queries_equal_dilation_on_repeated_keys(source: torch.Generator) -> None:
    q = draw(source, 1, 8, 12, 2, 4)
    k, v = draw(source, 1, 4, 4, 2, 4), draw(source, 1, 4, 4, 2, 4)
    repeated = [x.repeat_interleave(2, 1).repeat_interleave(3, 2) for x in (k, v)]
    expected = fv.attend(q, *repeated, fv.Neighborhood((3, 2), dilation=(2, 3)))
    assert_same((attend_finer(q, k, v, fv.Neighborhood((3, 2))),), (expected,), q, k, v)


def test_finer_queries_take_scores_per_head(source: torch.Generator) -> None:
    q, k, v = draw(source, 1, 8, 2, 3), draw(source, 1, 4, 1, 3), draw(source, 1, 4, 1, 3)
    sink, table, keys = draw(source, 2), draw(source, 2, 5), draw(source, 1, 2, 4)
    score = fv.Softmax(sink=sink) + fv.RelativeBias(table) + fv.KeyBias(keys)
    pattern = fv.Neighborhood(3)
    got = attend_finer(q, k, v, pattern, score, return_lse=True)
    each = [fv.attend(q[:, n::2], k, v, pattern, score, return_lse=True) for n in (0, 1)]
    expected = tuple(torch.stack(pair, 2).flatten(1, 2) for pair in zip(*each, strict=True))
    assert_same(got, expected, q, k, v, sink, table, keys)
    with pytest.raises(fv.errors.ScoreError, match="finer"):
        attend_finer(q, k, v, pattern, fv.Alibi(sink))
    with pytest.raises(fv.errors.ShapeError, match="multiples"):
        attend_finer(q[:, 1:], k, v, pattern)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_padding_takes_no_part(implementation: str, source: torch.Generator) -> None:
    grid, sizes = (5, 6), torch.tensor([[5, 6], [3, 4], [1, 2]])
    q, k, v = (draw(source, 3, *grid, 2, 4) for _ in range(3))
    pattern = fv.Neighborhood(5, border="clip")
    score = fv.Softmax() + padding_bias(sizes, grid)
    o = fv.attend(q, k, v, pattern, score, implementation=implementation)
    for sample, (height, width) in enumerate(sizes.tolist()):
        alone = [x[sample : sample + 1, :height, :width] for x in (q, k, v)]
        mask = fv.Neighborhood(5, border="clip").dense_mask(grid, grid).view(5, 6, 5, 6)
        mask = mask[:height, :width, :height, :width].reshape(height * width, -1)
        expected, _ = dense(*(x.flatten(1, 2) for x in alone), mask)
        got = o[sample : sample + 1, :height, :width]
        assert_same((got.flatten(1, 2),), (expected,), q, k, v)


def test_padding_hides_what_is_written_there(source: torch.Generator) -> None:
    q, k, v = (draw(source, 1, 6, 1, 4).detach() for _ in range(3))
    score = fv.Softmax() + padding_bias(torch.tensor([4]), (6,))
    before = fv.attend(q, k, v, fv.Dense(), score)
    k[:, 4:], v[:, 4:] = 7.0, -3.0
    torch.testing.assert_close(fv.attend(q, k, v, fv.Dense(), score), before)


BORDERS = ("shift", "clip", "wrap")


@pytest.mark.parametrize("border", BORDERS)
def test_every_feature_at_once_has_its_gradients(border: str, source: torch.Generator) -> None:
    """Context, table with gradient, sink, padding and border in one composition, by `reference`."""
    grid = (6, 6)
    q, k, v = (draw(source, 2, *grid, 2, 3) for _ in range(3))
    ck, cv, sink, table = (
        draw(source, 2, 4, 2, 3), draw(source, 2, 4, 2, 3), draw(source, 2), draw(source, 2, 5, 5)
    )  # fmt: skip
    pattern = fv.Neighborhood(3, dilation=2, border=border)
    padded = padding_bias(torch.tensor([[6, 6], [4, 5]]), grid)
    score = fv.Softmax(sink=sink) + fv.RelativeBias(table) + padded
    sides = [
        attend_with_context(
            q, k, v, ck, cv, pattern, score, return_lse=True, implementation=implementation
        )
        for implementation in ("cpu", "reference")
    ]
    assert_same(sides[0], sides[1], q, k, v, ck, cv, sink, table)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("dtype", [double, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_keys_in_columns(
    dtype: torch.dtype, square: bool, source: torch.Generator
) -> None:
    shapes = ((2, 4, 5, 4, 12), (2, 3, 7, 2, 12), (2, 3, 7, 2, 6))
    drawn = [torch.randn(shape, generator=source).to(dtype) for shape in shapes]
    log_w = -20 * torch.rand(21, generator=source)
    log_w[3] = -torch.inf
    score = fv.Softmax() + fv.KeyBias(log_w.to(double)[None, None])

    def results(tensors: list[Tensor], weighted: bool) -> dict[str, Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        if weighted:
            o, lse = attend_weighted(q, k, v, log_w, square=square, return_lse=True)
        else:
            o, lse = fv.attend(
                q, k, v, fv.Dense(), score, return_lse=True, implementation="reference"
            )
        total = (o.double() * torch.linspace(-1, 2, o.numel()).view_as(o)).sum() + lse.sum()
        dq, dk, dv = torch.autograd.grad(total, (q, k, v))
        return {"o": o.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}

    def errors_at(number: int) -> dict[str, float]:
        near = [neighbour(x, source) for x in drawn] if number else drawn
        exact = results([x.double() for x in near], False)
        return {name: error(x, exact[name]) for name, x in results(near, False).items()}

    exact = results([x.double() for x in drawn], False)
    verdicts = check_near(results(drawn, True), exact, errors_at)
    assert all(verdict.ok for verdict in verdicts), ", ".join(map(str, verdicts))


def test_weights_of_keys_survive_autocast(source: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 9, 2, 8, generator=source) for _ in range(3))
    log_w = -20 * torch.rand(9, generator=source)
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = attend_weighted(q, k, v, log_w, return_lse=True)
    low = (x.bfloat16() for x in (q, k, v))
    _, expected = attend_weighted(*low, log_w, return_lse=True)
    torch.testing.assert_close(lse, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_merge_and_add_branches_and_name_pages(source: torch.Generator) -> None:
    seeds = torch.randint(2**31, (3,), generator=source).tolist()
    shapes = ((2, 7, 3, 5), (1, 40, 2, 64), (1, 6, 2, 48))
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = list(pool.map(interpreted.merged, shapes, seeds))
            gated = pool.submit(interpreted.gated, seeds[0]).result()
            pages = pool.submit(interpreted.pages_of_blocks, seeds[1]).result()
    assert found == [[], [], []]
    assert max(gated) < 1e-5
    assert pages == []
