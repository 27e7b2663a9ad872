"""`convolve` on a CPU: every way to a gradient, calls that are kept, what the plan says."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveal as fv
from foveal._convolve_direct import DIRECT, direct_key
from foveal.engines.convolution import cpu_gradients
from tests.engines.convolution.problems import Shape, convolved, defined, draw, failures, results

WAYS: dict[str, Shape] = {
    "one column": Shape((2, 7, 6, 3), (3, 5, 1)),
    "three columns": Shape((2, 7, 6, 3), (3, 2, 3)),
    "four columns": Shape((2, 7, 9, 3), (3, 3, 4)),
    "four causal columns": Shape((2, 12, 3), (3, 4), {"causal": True}),
    "five columns": Shape((1, 7, 9, 5), (5, 5, 5)),
    "six columns, much padding": Shape((1, 3, 4, 2), (2, 2, 6), {"padding": ((4, 4), (5, 3))}),
    "seven columns": Shape((2, 6, 9, 2), (2, 7, 7)),
    "fourteen columns": Shape((2, 6, 20, 2), (2, 3, 14)),
    "wider than the grid": Shape((1, 5, 6, 3), (3, 21, 21)),
    "dilated": Shape((2, 11, 10, 3), (3, 5, 4), {"dilation": (3, 2)}),
    "dilated, padding of two kinds": Shape(
        (1, 9, 8, 2), (2, 3, 3), {"dilation": 4, "padding": ((3, 8), (0, 5))}
    ),
    "dilated, far": Shape((2, 9, 34, 3), (3, 3, 9), {"dilation": (1, 2)}),
    "a row of five": Shape((3, 7, 9, 3), (3, 1, 5)),
    "a row of fifteen": Shape((2, 4, 18, 3), (3, 1, 15)),
    "volume of many tokens": Shape((2, 7, 5, 6, 3), (3, 3, 2, 5)),
    "dilated volume": Shape((1, 5, 6, 7, 2), (2, 3, 2, 3), {"dilation": 2}),
    "dilated, a filter for each sample": Shape((2, 9, 8, 3), (2, 3, 3, 3), {"dilation": 2}),
}


@pytest.mark.parametrize("transforms", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_agrees_with_the_definition(
    name: str, transforms: bool, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transforms:
        monkeypatch.setattr(cpu_gradients, "_WORTH", 0)
        monkeypatch.setattr(cpu_gradients, "_HELD", 500)
    else:
        monkeypatch.setattr(cpu_gradients, "_SUMMED", 20)
        monkeypatch.setattr(cpu_gradients, "_CALLED", 130)
    for shape in (WAYS[name], WAYS[name].first()):
        tensors = draw(shape, source, torch.float64)
        exact = results(defined(shape), tensors)
        for what, got in results(convolved(shape, "cpu"), tensors).items():
            torch.testing.assert_close(got, exact[what], rtol=1e-10, atol=1e-10, msg=what)


def test_transforms_are_as_good_as_float32_allows(
    source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_gradients, "_WORTH", 0)
    shape = Shape((2, 18, 19, 2), (2, 17, 17))
    tensors = draw(shape, source, torch.float32)
    assert failures(convolved(shape, "cpu"), defined(shape), tensors, source) == []


@pytest.mark.parametrize("first", [False, True])
def test_y_lies_in_memory_as_x_does(first: bool, source: torch.Generator) -> None:
    for size, dilation in (((3, 3), 1), ((13, 13), 1), ((15, 15), 1), ((5, 9), 2)):
        x = torch.randn(2, 4, 21, 20, generator=source) if first else torch.randn(2, 21, 20, 4)
        filter = torch.randn(4, *size, generator=source)
        y = fv.convolve(x, filter, dilation=dilation, channels_first=first)
        assert y.shape == x.shape
        assert y.is_contiguous()


def test_a_kept_call_is_the_same_call(source: torch.Generator) -> None:
    x = torch.randn(1, 9, 8, 5, generator=source)
    filter = torch.randn(5, 3, 3, generator=source)
    bias = torch.randn(5, generator=source)
    for own in (None, bias):
        once = fv.convolve(x, filter, bias=own)
        assert callable(DIRECT.get(direct_key(x, filter, own, (1, None, False, False), None)))
        assert torch.equal(fv.convolve(x, filter, bias=own), once)
    first = x.movedim(-1, 1).contiguous()
    got = fv.convolve(first, filter, bias=bias, channels_first=True)
    torch.testing.assert_close(got.movedim(1, -1), once)
    assert not torch.equal(fv.convolve(x, filter, bias=bias, dilation=2), once)
    with pytest.raises(fv.errors.ShapeError, match="dilation"):
        fv.convolve(x, filter, bias=bias, dilation=0)
    with pytest.raises(fv.errors.DtypeError, match="filter"):
        fv.convolve(x, filter.double(), bias=bias)
    trained = torch.nn.Parameter(filter)
    assert fv.convolve(x, trained, bias=bias).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert fv.convolve(x, filter, bias=bias).dtype == torch.bfloat16


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("window", [(3, 3), (13, 13), (15, 15), (3, 12), (12, 3)])
def test_a_kept_call_gives_what_the_whole_way_gives(
    window: tuple[int, int], first: bool, source: torch.Generator
) -> None:
    shape = (2, 6, 19, 38) if first else (2, 19, 38, 6)
    x = torch.randn(shape, generator=source)[..., ::2]  # no tensor that is contiguous
    filter = torch.randn(x.shape[1 if first else -1], *window, generator=source)
    once = fv.convolve(x, filter, channels_first=first)
    for _ in range(2):
        again = fv.convolve(x, filter, channels_first=first)
        assert torch.equal(again, once)
        assert again.stride() == once.stride()
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # the public switch warns of another device
    try:
        other = fv.convolve(x, filter, channels_first=first)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    torch.testing.assert_close(other, once, rtol=1e-4, atol=1e-3)


def test_what_reads_the_calls_of_pytorch_finds_the_usual_ones(source: torch.Generator) -> None:
    x, filter = torch.randn(1, 9, 8, 4, generator=source), torch.randn(4, 3, 3, generator=source)
    fv.convolve(x, filter)
    with FlopCounterMode(display=False) as counter:
        fv.convolve(x, filter)
    assert counter.get_total_flops() > 0


def test_the_plan_on_a_cpu_follows_the_window() -> None:
    def runs(
        window: tuple[int, int], grad: bool = False, first: bool = False, size: int = 56
    ) -> str:
        x = torch.empty(8, 64, size, size) if first else torch.empty(8, size, size, 64)
        filter = torch.empty(64, *window, requires_grad=grad)
        return fv.explain_convolve(x, filter, channels_first=first).implementation[0]

    assert [runs((k, k)) for k in (3, 9, 13, 31)] == ["torch", "torch", "cpu", "cpu"]
    assert [runs((k, k), first=True) for k in (9, 13, 31)] == ["torch", "torch", "cpu"]
    assert [runs((k, k), grad=True) for k in (3, 5, 7, 31)] == ["torch", "torch", "cpu", "cpu"]
    assert [runs((5, 5), grad=True, first=first, size=22) for first in (False, True)] == ["cpu"] * 2
    assert [runs((k, k), size=8) for k in (9, 13, 15)] == ["torch", "torch", "cpu"]
    said = fv.explain_convolve(torch.empty(8, 56, 56, 64), torch.empty(64, 3, 3)).refusals
    assert "the same routine" in dict(said)["cpu"]
