"""`fftconv`: both implementations against direct sums, and what its options mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from tests.engines.convolution.problems import results

D, C = torch.float64, torch.complex128
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]] = {
    "causal": ((2, 13, 3), (3, 13), D, True),
    "longer than the sequence": ((2, 13, 3), (3, 20), D, True),
    "a short filter for each sample": ((2, 13, 3), (2, 3, 5), D, True),
    "circle": ((2, 12, 3), (3, 12), D, False),
    "torus": ((2, 5, 6, 3), (3, 5, 4), D, False),
    "causal image": ((2, 5, 6, 3), (3, 4, 6), D, True),
    "causal volume": ((2, 3, 4, 5, 3), (3, 3, 2, 5), D, True),
    "spectrum": ((2, 5, 7, 3), (3, 5, 4), C, False),
    "a spectrum for each sample": ((2, 6, 3), (2, 3, 4), C, False),
    "one token": ((1, 1, 3), (3, 1), D, True),
}


@pytest.mark.parametrize("name", CASES)
def test_both_implementations_agree(name: str, source: torch.Generator) -> None:
    size, taps, dtype, causal = CASES[name]
    draws = [torch.randn(n, generator=source, dtype=D) for n in (size, size, size, (size[-1],))]
    filter = torch.randn(taps, generator=source, dtype=dtype)

    def call(implementation: str | None) -> Any:
        def run(x: Tensor, f: Tensor, pre: Tensor, post: Tensor, skip: Tensor) -> Tensor:
            return fv.fftconv(
                x, f, pre_gate=pre, post_gate=post, skip=skip, causal=causal,
                implementation=implementation,
            )  # fmt: skip

        return run

    tensors = [draws[0], filter, *draws[1:]]
    exact = results(call("reference"), tensors)
    for implementation in ("torch", None):
        for what, got in results(call(implementation), tensors).items():
            torch.testing.assert_close(got, exact[what], rtol=1e-10, atol=1e-10, msg=what)


def test_equals_a_direct_causal_convolution(source: torch.Generator) -> None:
    x = torch.randn(2, 17, 3, generator=source, dtype=D)
    filter = torch.randn(3, 6, generator=source, dtype=D)
    got = fv.fftconv(x, filter, implementation="reference")
    torch.testing.assert_close(got, fv.convolve(x, filter.flip(1), causal=True))


def test_a_circle_wraps(source: torch.Generator) -> None:
    x = torch.randn(1, 7, 2, generator=source)
    filter = torch.zeros(2, 7)
    filter[:, 3] = 1.0
    torch.testing.assert_close(fv.fftconv(x, filter, causal=False), x.roll(3, 1))


def test_half_precision_is_summed_in_float32(source: torch.Generator) -> None:
    x = torch.randn(1, 300, 2, generator=source).bfloat16()
    filter = torch.randn(2, 300, generator=source).bfloat16()
    got = fv.fftconv(x, filter)
    exact = fv.fftconv(x.double(), filter.double())
    assert got.dtype == torch.bfloat16
    assert float((got - exact).abs().max()) <= float(exact.abs().max()) * 2**-8


def test_no_samples_give_none() -> None:
    x, filter = torch.zeros(0, 4, 3), torch.zeros(3, 4)
    assert fv.fftconv(x, filter).shape == x.shape
    assert fv.explain_fftconv(x, filter).implementation == ("reference",)


def test_explains_itself() -> None:
    x = torch.empty(4, 1000, 8, device="meta")
    got = fv.explain_fftconv(x, torch.empty(8, 1000, device="meta"), post_gate=x)
    assert got.implementation == ("torch",)
    assert "2000" in got.problem
    assert got.bytes == 4 * (3 * 4 * 1000 * 8 + 8 * 1000)


BAD: dict[str, tuple[type[Exception], str, Any]] = {
    "rank": (fv.errors.ShapeError, "x", lambda x, f: fv.fftconv(x[0], f)),
    "channels": (fv.errors.ShapeError, "filter", lambda x, f: fv.fftconv(x, f[:2])),
    "gate": (fv.errors.ShapeError, "post_gate", lambda x, f: fv.fftconv(x, f, post_gate=x[:1])),
    "skip": (fv.errors.ShapeError, "skip", lambda x, f: fv.fftconv(x, f, skip=f[0])),
    "dtype": (fv.errors.DtypeError, "filter", lambda x, f: fv.fftconv(x, f.double())),
    "circle": (
        fv.errors.ShapeError, "filter", lambda x, f: fv.fftconv(x[:, :3], f, causal=False)
    ),
    "spectrum": (fv.errors.DtypeError, "filter", lambda x, f: fv.fftconv(x, f.to(C))),
    "frequencies": (
        fv.errors.ShapeError, "filter", lambda x, f: fv.fftconv(x, f.to(C), causal=False)
    ),
    "device": (fv.errors.DeviceError, "filter", lambda x, f: fv.fftconv(x, f.to("meta"))),
    "name": (
        fv.errors.UnknownNameError, "implementation",
        lambda x, f: fv.fftconv(x, f, implementation="cpu"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    kind, argument, call = BAD[name]
    with pytest.raises(kind, match=argument):
        call(torch.zeros(2, 6, 3), torch.zeros(3, 6))
