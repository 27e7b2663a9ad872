"""The verb of dynamic filters: weights that are given, token by token."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from foveal._arguments import need_tensors
from foveal._autocast import in_own_dtypes
from foveal._capture import as_one
from foveal._convolve_plan import MIX_IMPLEMENTATIONS, choose_convolution
from foveal._host import on_host
from foveal._operators_verbs import Body, as_operator
from foveal.engines.convolution.mix_problem import Border, describe_mix
from foveal.engines.convolution.problem import Axes, Flags


@on_host
@in_own_dtypes
def local_mix(
    weights: Tensor,
    v: Tensor,
    window: Axes,
    *,
    dilation: Axes = 1,
    border: Border = "zero",
    causal: Flags = False,
    implementation: str | None = None,
) -> Tensor:
    """o[b, p, h] = sum_t weights[b, p, h, t] v[b, first(p) + dilation t, h], a filter for each token.

    The unfused half of neighborhood attention, and the filter of dynamic convolutions: the weights come
    from anywhere and are used as they are.
    Shapes: weights [B, *grid, H, prod(window)], taps row by row; v [B, *grid, H, D], one to three grid
    axes; returns o like v.
    Options: window and dilation, an integer or one per axis, >= 1; border "zero": the window is centred
    on its token and v is zero outside the grid; "shift": it is moved inside the grid, so that every
    token has all its neighbours, and window * dilation fits the axis; causal, a truth value or one per axis:
    the window ends at its token and v is zero before the grid; implementation names one of "triton",
    "taps", "torch", "reference", which then runs or raises RefusedError; None lets the plan choose.
    Gradients flow to the weights and v.
    Cost: two FLOPs per tap and channel; weights, v and o moved once.
    Limits: weights of places outside the grid count nothing and have gradient 0.  Raises a subclass of
    foveal.errors.FovealError on bad input.
    Transforms: one operator under torch.compile, under torch.export and for fake tensors, for sizes that
    stay open; its backward runs the forward again.  On a CPU torch.func maps it and differentiates it once,
    "reference" any number of times.  Autocast stops here.
    Equals: `convolve` where the weights are the same for every token; attention over a
    `Neighborhood` with its softmax as the weights ("shift").
    Paper: dynamic convolutions (1901.10430); neighborhood attention (2204.07143).
    """
    need_tensors(weights=weights, v=v)
    run = partial(as_operator, "local_mix") if as_one(v) else _local_mix
    (o,) = run(weights, v, window, dilation, border, causal, implementation)
    return o


def _local_mix(
    weights: Tensor,
    v: Tensor,
    window: Axes,
    dilation: Axes,
    border: Border,
    causal: Flags,
    implementation: str | None,
) -> tuple[Tensor]:
    problem = describe_mix(weights, v, window, dilation, border, causal)
    plan = choose_convolution(problem, MIX_IMPLEMENTATIONS, implementation)
    return (MIX_IMPLEMENTATIONS[plan.implementation].mix(problem, weights, v),)


def _outline(weights: Tensor, v: Tensor, *options: object) -> tuple[Tensor]:
    return (v.new_empty(v.shape),)


OPERATOR = Body(_local_mix, _outline)
