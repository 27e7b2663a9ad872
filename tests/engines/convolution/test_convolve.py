"""`convolve` on the CPU: every implementation against PyTorch in float64, its limits, its plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveal as fv
from foveal.testing.poison import poisoned_allocations
from tests.engines.convolution.problems import (
    ROWS,
    SHAPES,
    convolved,
    defined,
    draw,
    failures,
    results,
)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", ["reference", "torch", "cpu", None])
def test_agrees_with_the_definition(
    name: str, implementation: str | None, source: torch.Generator
) -> None:
    for shape in (SHAPES[name], SHAPES[name].first()):
        tensors = draw(shape, source, torch.float64)
        exact = results(defined(shape), tensors)
        try:
            found = results(convolved(shape, implementation), tensors)
        except fv.errors.RefusedError:
            assert "no samples" in name
            continue
        for what, got in found.items():
            torch.testing.assert_close(got, exact[what], rtol=1e-10, atol=1e-10, msg=what)


@pytest.mark.parametrize("name", ["thirteen", "even and dilated", "a filter for each sample"])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_is_as_good_as_float32_allows(
    name: str, implementation: str, source: torch.Generator
) -> None:
    shape = SHAPES[name]
    tensors = draw(shape, source, torch.float32)
    with poisoned_allocations():
        found = failures(convolved(shape, implementation), defined(shape), tensors, source)
    assert found == []


@pytest.mark.parametrize("implementation", ["reference", "torch", "cpu"])
def test_reads_any_memory_layout(implementation: str, source: torch.Generator) -> None:
    shape = SHAPES["square"]
    x, filter, bias = draw(shape, source, torch.float64)
    wanted = fv.convolve(x, filter, bias=bias, implementation=implementation)
    spread = torch.full((4, 18, 16, 10), torch.nan, dtype=torch.float64)[::2, ::2, ::2, ::2]
    for seen in (spread.copy_(x), x.transpose(1, 2).contiguous().transpose(1, 2)):
        got = fv.convolve(seen, filter, bias=bias, implementation=implementation)
        torch.testing.assert_close(got, wanted)


def test_several_filters_serve_their_channels(source: torch.Generator) -> None:
    x = torch.randn(2, 6, 7, 6, generator=source)
    filters = [torch.randn(size, generator=source) for size in ((3, 3, 3), (2, 1, 11), (1, 5, 2))]
    bias = torch.randn(6, generator=source)
    parts = x.split([3, 2, 1], -1), bias.split([3, 2, 1])
    wanted = [
        fv.convolve(part, each, bias=own)
        for part, each, own in zip(parts[0], filters, parts[1], strict=True)
    ]
    got = fv.convolve(x, filters, bias=bias)
    torch.testing.assert_close(got, torch.cat(wanted, -1))
    first = fv.convolve(x.movedim(-1, 1), filters, bias=bias, channels_first=True)
    torch.testing.assert_close(first.movedim(1, -1), got)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("implementation", ["reference", "in turn", None])
def test_strips_agree_with_the_definition(
    name: str, implementation: str | None, source: torch.Generator
) -> None:
    case = ROWS[name]
    tensors = case.draw(source, torch.float64)
    exact = results(case.definition, tensors)
    for first in (False, True):
        found = results(case.call(implementation, first), tensors)
        for what, got in found.items():
            torch.testing.assert_close(got, exact[what], rtol=1e-10, atol=1e-10, msg=what)


def test_strips_are_their_product(source: torch.Generator) -> None:
    x = torch.randn(2, 9, 8, 4, generator=source, dtype=torch.float64)
    row, column = (torch.randn(4, k, generator=source, dtype=torch.float64) for k in (5, 7))
    got = fv.convolve(x, fv.Strips(row, column))
    torch.testing.assert_close(got, fv.convolve(x, column[:, :, None] * row[:, None, :]))
    found = fv.explain_convolve(x, fv.Strips(row, column))
    assert found.implementation == ("in turn",)
    assert "5 and then 7 taps" in found.problem
    whole = fv.explain_convolve(x, column[:, :, None] * row[:, None, :])
    assert found.flops < whole.flops


def test_strips_of_other_shapes_are_refused() -> None:
    row, column = torch.ones(4, 3), torch.ones(4, 5)
    for wrong in (torch.ones(3, 5), torch.ones(4, 5, 1)):
        with pytest.raises(fv.errors.ShapeError, match="filter"):
            fv.Strips(row, wrong)
    with pytest.raises(fv.errors.DtypeError, match="column"):
        fv.Strips(row, column.double())
    with pytest.raises(fv.errors.ShapeError, match="two grid axes"):
        fv.convolve(torch.ones(1, 9, 4), fv.Strips(row, column))
    with pytest.raises(fv.errors.ShapeError, match="divisor"):
        fv.convolve(torch.ones(1, 9, 9, 6), fv.Strips(row, column))
    with pytest.raises(fv.errors.ShapeError, match="between"):
        fv.convolve(torch.ones(1, 9, 9, 4), fv.Strips(row, column, torch.ones(3)))


def test_equals_the_toeplitz_product(source: torch.Generator) -> None:
    x = torch.randn(1, 9, 2, generator=source, dtype=torch.float64)
    filter = torch.randn(2, 5, generator=source, dtype=torch.float64)
    lag = torch.arange(9) - torch.arange(9)[:, None] + 2
    matrix = torch.where((lag >= 0) & (lag < 5), filter[:, lag.clamp(0, 4)], 0.0)
    wanted = torch.einsum("cij,bjc->bic", matrix, x)
    torch.testing.assert_close(fv.convolve(x, filter), wanted)


def test_a_later_token_does_not_change_a_causal_past(source: torch.Generator) -> None:
    x = torch.randn(1, 12, 3, generator=source)
    filter = torch.randn(3, 5, generator=source)
    changed = x.clone()
    changed[:, 7] += 1.0
    before, after = (fv.convolve(each, filter, causal=True) for each in (x, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_keeps_the_dtype_and_follows_autocast(source: torch.Generator) -> None:
    x, filter = torch.randn(1, 5, 5, 3, generator=source), torch.randn(3, 3, 3, generator=source)
    assert fv.convolve(x.half(), filter.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        y = fv.convolve(x, filter)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, fv.convolve(x.bfloat16(), filter.bfloat16()))


def test_without_gradients_nothing_is_kept(source: torch.Generator) -> None:
    x = torch.randn(1, 5, 5, 3, generator=source)
    filter = torch.randn(3, 3, 3, generator=source)
    assert not fv.convolve(x, filter).requires_grad
    only = filter.clone().requires_grad_()
    fv.convolve(x, only).sum().backward()
    wanted = filter.clone().requires_grad_()
    F.conv2d(x.movedim(-1, 1), wanted[:, None], padding=1, groups=3).sum().backward()
    torch.testing.assert_close(only.grad, wanted.grad)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def test_the_plan_on_a_gpu_follows_the_arithmetic() -> None:
    large = fv.explain_convolve(meta(64, 56, 56, 128), meta(128, 31, 31), device="cuda")
    small = fv.explain_convolve(meta(64, 56, 56, 128), meta(128, 7, 7), device="cuda")
    exact = fv.explain_convolve(
        meta(64, 56, 56, 128, dtype=torch.float32), meta(128, 31, 31, dtype=torch.float32),
        device="cuda",
    )  # fmt: skip
    assert [each.implementation for each in (large, small, exact)] == [
        ("toeplitz",),
        ("triton",),
        ("triton",),
    ]
    assert "estimated to be faster" in dict(small.refusals)["toeplitz"]
    assert "float32" in dict(exact.refusals)["toeplitz"]
    assert "refused    toeplitz" in str(small)


def test_explain_counts_what_the_definition_does() -> None:
    got = fv.explain_convolve(meta(2, 4, 5, dtype=torch.float32), meta(5, 3, dtype=torch.float32))
    assert got.flops == 2 * 2 * 5 * (3 + 4 + 3)
    assert got.bytes == 4 * (2 * 2 * 4 * 5 + 15)
    assert got.implementation == ("cpu",)
    assert [name for name, _ in got.refusals] == ["toeplitz", "triton"]
    several = fv.explain_convolve(meta(2, 4, 5), [meta(3, 3), meta(2, 1)])
    assert several.implementation == ("torch", "torch")
    assert several.as_dict()["flops"] == several.flops


BAD: dict[str, tuple[type[Exception], str, Any]] = {
    "rank": (fv.errors.ShapeError, "x", lambda x, f: fv.convolve(x[0, 0], f)),
    "no image": (fv.errors.ShapeError, "x", lambda x, f: fv.convolve(x[0, 0, 0], f)),
    "filter rank": (fv.errors.ShapeError, "filter", lambda x, f: fv.convolve(x, f[0])),
    "channels": (fv.errors.ShapeError, "filter", lambda x, f: fv.convolve(x, f[:3])),
    "samples": (
        fv.errors.ShapeError, "filter", lambda x, f: fv.convolve(x, f.expand(3, -1, -1, -1))
    ),
    "no taps": (fv.errors.ShapeError, "filter", lambda x, f: fv.convolve(x, f[:, :0])),
    "dtype": (fv.errors.DtypeError, "filter", lambda x, f: fv.convolve(x, f.double())),
    "integers": (fv.errors.DtypeError, "x", lambda x, f: fv.convolve(x.int(), f.int())),
    "device": (fv.errors.DeviceError, "filter", lambda x, f: fv.convolve(x, f.to("meta"))),
    "dilation": (fv.errors.ShapeError, "dilation", lambda x, f: fv.convolve(x, f, dilation=0)),
    "axes": (fv.errors.ShapeError, "dilation", lambda x, f: fv.convolve(x, f, dilation=(1, 1, 1))),
    "padding": (fv.errors.ShapeError, "padding", lambda x, f: fv.convolve(x, f, padding=-1)),
    "both": (
        fv.errors.ShapeError, "padding", lambda x, f: fv.convolve(x, f, padding=1, causal=True)
    ),
    "causal": (fv.errors.ShapeError, "causal", lambda x, f: fv.convolve(x, f, causal=(True,))),
    "nothing left": (fv.errors.ShapeError, "x", lambda x, f: fv.convolve(x[:, :2], f, padding=0)),
    "bias": (fv.errors.ShapeError, "bias", lambda x, f: fv.convolve(x, f, bias=f[:3, 0, 0])),
    "filters": (fv.errors.ShapeError, "filter", lambda x, f: fv.convolve(x, [f[:2], f[:1]])),
    "no filters": (fv.errors.ShapeError, "filter", lambda x, f: fv.convolve(x, [])),
    "name": (
        fv.errors.UnknownNameError, "implementation",
        lambda x, f: fv.convolve(x, f, implementation="cudnn"),
    ),
    "refused": (
        fv.errors.RefusedError, "CUDA", lambda x, f: fv.convolve(x, f, implementation="triton")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    kind, argument, call = BAD[name]
    with pytest.raises(kind, match=argument):
        call(torch.zeros(2, 5, 5, 4), torch.zeros(4, 3, 3))
