"""The verb of filters as long as the grid."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from foveal._arguments import need_tensors, tensors_or_none
from foveal._autocast import in_own_dtypes
from foveal._capture import any_open, as_one
from foveal._convolve_plan import SPECTRAL_IMPLEMENTATIONS, choose_convolution
from foveal._host import on_host
from foveal._operators_verbs import Body, as_operator
from foveal.engines.convolution.spectral import describe_spectral


@on_host
@in_own_dtypes
def fftconv(
    x: Tensor,
    filter: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """y = post_gate * (filter * (pre_gate x)) + skip x, a depthwise convolution by Fourier transforms.

    (filter * u)[p] = sum_s filter[s] u[p - s]; with `causal`, on every axis, u is 0 before the grid and
    taps beyond the grid count nothing; else the grid is a circle on every axis.
    Shapes: x and both gates [B, *grid, C], one to three grid axes; filter [C, *taps] or [B, C, *taps],
    at most the grid where it is a circle; or its spectrum, complex [C, *frequencies] or
    [B, C, *frequencies] as `torch.fft.rfftn` of the grid gives it (not causal); skip [C].
    Options: implementation names one of "triton", "torch", "reference", which then runs or raises
    RefusedError; None lets the plan choose.
    Gradients flow to all tensors; sums and spectra are in float32 at least.
    Cost: two transforms of 5 N log2 N FLOPs for each sample and channel, N the grid, or twice it per
    causal axis, rounded up to a product of 2, 3 and 5.
    Limits: any length.  Raises a subclass of foveal.errors.FovealError on bad input.
    Transforms: compilers and torch.func read through "torch"; where a compiler leaves sizes open, the call
    is one operator, whose backward runs the forward again.  Autocast stops here.
    Equals: the product with the Toeplitz (causal) or circulant matrix of the filter; a filter of one tap
    1 is x.
    Paper: long convolutions (2302.06646); FlashFFTConv (2311.05908).
    """
    need_tensors(x=x, filter=filter)
    tensors_or_none(pre_gate=pre_gate, post_gate=post_gate, skip=skip)
    run = partial(as_operator, "fftconv") if as_one(x) and any_open(x, filter) else _fftconv
    (y,) = run(x, filter, pre_gate, post_gate, skip, causal, implementation)
    return y


def _fftconv(
    x: Tensor,
    filter: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    skip: Tensor | None,
    causal: bool,
    implementation: str | None,
) -> tuple[Tensor]:
    problem = describe_spectral(x, filter, pre_gate, post_gate, skip, causal)
    plan = choose_convolution(problem, SPECTRAL_IMPLEMENTATIONS, implementation)
    module = SPECTRAL_IMPLEMENTATIONS[plan.implementation]
    return (module.gated(problem, x, filter, pre_gate, post_gate, skip),)


def _outline(x: Tensor, *others: object) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


OPERATOR = Body(_fftconv, _outline)
