"""The verb of the convolution engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from foveal._arguments import need_tensors, tensors_or_none
from foveal._capture import any_open, as_one
from foveal._convolve_direct import DIRECT, direct_key, keep_direct
from foveal._convolve_plan import (
    CONVOLUTION_IMPLEMENTATIONS,
    STRIP_IMPLEMENTATIONS,
    choose_convolution,
)
from foveal._errors import ShapeError
from foveal._host import on_host
from foveal._operators_verbs import Body, as_operator
from foveal.engines.convolution.problem import (
    Axes,
    Convolution,
    Flags,
    Padding,
    describe,
    out_grid,
)
from foveal.engines.convolution.strips_problem import Strips

Filters = Tensor | Sequence[Tensor] | Strips


@on_host
def convolve(
    x: Tensor,
    filter: Filters,
    *,
    bias: Tensor | None = None,
    dilation: Axes = 1,
    padding: Padding = None,
    causal: Flags = False,
    channels_first: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """y[b, p, c] = bias[c] + sum_o filter[c, o] x[b, p + dilation o - before, c], zero outside.

    A depthwise cross-correlation, as in PyTorch, on one to three axes.
    Shapes: x [B, *grid, C], or [B, C, *grid] with `channels_first`; filter [F, *window], each of
    which serves C / F channels in a row, or [B, F, *window] with one for each sample; bias [C].
    Several filters [F_i, *window_i], of any sizes, serve F_1, F_2, ... channels, one each; they sum to C.
    `Strips(row, column)` is a filter of images in two strips, one behind the other.
    Returns y like x, with the axes of the grid as the padding leaves them.
    Options: dilation, an integer or one per axis, >= 1; padding, the zeros around each axis (an integer,
    or per axis one or a pair before and after), None keeps the grid: dilation (window - 1) zeros
    in all, the odd one behind; causal, one truth value or one per axis, puts all of them in front, so that
    the last tap meets the token itself; implementation names one of "toeplitz", "triton", "cpu",
    "torch", "reference", of strips one of "triton", "in turn", "reference", which then runs or raises
    RefusedError; None lets the plan choose.
    Gradients flow to x, filter and bias; sums are in float32 at least.
    Cost: two FLOPs per tap, channel and token; x and y moved once.
    Limits: stride 1; the filter is no longer than the padded grid.  Raises a subclass of
    foveal.errors.FovealError on bad input.
    Transforms: on a CPU compilers read through the call; where they leave sizes open, it is one operator,
    whose backward runs the forward again.  torch.func maps and differentiates it, "cpu" once.
    Equals: a filter of one tap 1 is x; the product with the dense Toeplitz matrix.
    """
    options = (dilation, padding, causal, channels_first)
    key = direct_key(x, filter, bias, options, implementation)
    call = DIRECT.get(key)
    if call:
        return call(x, filter, bias)
    check_operands(x, filter, bias)
    x, filter, bias = _cast(x, filter, bias)
    if as_one(x) and any_open(x, bias, *_tensors(filter)):
        return as_operator("convolve", x, filter, bias, *options, implementation)[0]
    (y,) = _every(x, filter, bias, *options, implementation)
    if key is not None and call is None and isinstance(filter, Tensor):
        keep_direct(key, *_prepared(x, filter, bias, options, implementation), filter.shape)
    return y


def _every(
    x: Tensor,
    filter: Filters,
    bias: Tensor | None,
    dilation: Axes,
    padding: Padding,
    causal: Flags,
    channels_first: bool,
    implementation: str | None,
) -> tuple[Tensor]:
    """y by one filter or several."""
    options = (dilation, padding, causal, channels_first)
    if isinstance(filter, Tensor | Strips):
        return (_convolve(x, filter, bias, *options, implementation),)
    parts = split_channels(x, filter, channels_first)
    biases = [None] * len(parts) if bias is None else bias.split([len(each) for each in filter])
    found = [
        _convolve(part, each, own, *options, implementation)
        for part, each, own in zip(parts, filter, biases, strict=True)
    ]
    return (torch.cat(found, dim=1 if channels_first else -1),)


def _outline(
    x: Tensor,
    filter: Filters,
    bias: Tensor | None,
    dilation: Axes,
    padding: Padding,
    causal: Flags,
    channels_first: bool,
    *options: object,
) -> tuple[Tensor]:
    first = filter if isinstance(filter, Tensor | Strips) else filter[0]
    outline = first.outline() if isinstance(first, Strips) else first
    grid = tuple(x.shape[2:] if channels_first else x.shape[1:-1])
    window = tuple(outline.shape[-len(grid) :])
    out = out_grid(grid, window, dilation, padding, causal)
    if channels_first:
        return (x.new_empty((*x.shape[:2], *out)),)
    return (x.new_empty((x.shape[0], *out, x.shape[-1])),)


OPERATOR = Body(_every, _outline)


def _tensors(filter: Filters) -> tuple[Tensor, ...]:
    if isinstance(filter, Strips):
        return filter.row, filter.column
    return (filter,) if isinstance(filter, Tensor) else tuple(filter)


def check_operands(x: Tensor, filter: Filters, bias: Tensor | None) -> None:
    """Raises DtypeError for what is no tensor, nor strips, nor several tensors."""
    need_tensors(x=x)
    tensors_or_none(bias=bias)
    if isinstance(filter, Sequence) and not isinstance(filter, str):
        for one in filter:
            need_tensors(filter=one)
    elif not isinstance(filter, Strips):
        need_tensors(filter=filter)


def _convolve(
    x: Tensor,
    weight: Tensor | Strips,
    bias: Tensor | None,
    dilation: Axes,
    padding: Padding,
    causal: Flags,
    channels_first: bool,
    implementation: str | None,
) -> Tensor:
    options = (dilation, padding, causal, channels_first)
    problem, name = _prepared(x, weight, bias, options, implementation)
    axis = -len(problem.grid) - 1
    if isinstance(weight, Strips):
        weight = weight.for_channels(problem.channels)
    elif weight.shape[axis] != problem.channels:
        weight = weight.repeat_interleave(problem.channels // weight.shape[axis], dim=axis)
    module = implementations_of(weight)[name]
    if channels_first and hasattr(module, "planes"):
        planes: Tensor = module.planes(problem, x, weight, bias)
        return planes
    last = x.movedim(1, -1) if channels_first else x
    y: Tensor = module.depthwise(problem, last, weight, bias)
    return y.movedim(-1, 1) if channels_first else y


_KEPT: dict[object, tuple[Convolution, str]] = {}
_MOST_KEPT = 512
"""Problems whose plan is kept: finding one takes a tenth of a millisecond."""


def implementations_of(weight: Tensor | Strips) -> dict[str, ModuleType]:
    return STRIP_IMPLEMENTATIONS if isinstance(weight, Strips) else CONVOLUTION_IMPLEMENTATIONS


def _prepared(
    x: Tensor,
    weight: Tensor | Strips,
    bias: Tensor | None,
    options: tuple[Axes, Padding, Flags, bool],
    implementation: str | None,
) -> tuple[Convolution, str]:
    """The checked problem and the implementation that runs it."""
    in_turn = isinstance(weight, Strips)
    shown = weight.outline() if isinstance(weight, Strips) else weight
    tensors = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in (x, shown, bias))
    trained = weight.needs_grad if isinstance(weight, Strips) else weight.requires_grad
    grad = torch.is_grad_enabled() and (x.requires_grad or trained)
    key = (tensors, in_turn, repr(options), implementation, grad)
    found = _KEPT.get(key)
    if found is None:
        problem = described(x, weight, bias, *options)
        plan = choose_convolution(problem, implementations_of(weight), implementation)
        if len(_KEPT) >= _MOST_KEPT:
            _KEPT.clear()
        found = _KEPT[key] = problem, plan.implementation
    return found


def described(
    x: Tensor,
    weight: Tensor | Strips,
    bias: Tensor | None,
    dilation: Axes,
    padding: Padding,
    causal: Flags,
    channels_first: bool,
) -> Convolution:
    """The checked problem of one filter over all channels of x."""
    channels = 0
    if x.dim() > 1:
        channels = x.shape[1 if channels_first else -1]
    if isinstance(weight, Strips):
        weight = weight.outline()
        if x.dim() != 4:
            needed = "a batch, two grid axes and channels are needed for strips"
            raise ShapeError("x", list(x.shape), needed)
    problem = describe(x, weight, dilation, padding, causal, channels_first, channels)
    if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype):
        got = f"{list(bias.shape)} of {bias.dtype}"
        raise ShapeError("bias", got, f"[{channels}] of {x.dtype} is needed")
    if bias is not None and bias.device != x.device:
        raise ShapeError("bias", bias.device, f"the device of x, {x.device}, is needed")
    return problem


def split_channels(x: Tensor, filters: Sequence[Tensor], channels_first: bool) -> list[Tensor]:
    """The channels of x that each filter serves."""
    axis = 1 if channels_first else -1
    counts = [len(each) for each in filters]
    if x.dim() < 3 or sum(counts) != x.shape[axis] or not counts:
        needed = f"filters for all channels of x {list(x.shape)} are needed"
        raise ShapeError("filter", f"filters for {counts} channels", needed)
    return list(x.split(counts, dim=axis))


def _cast(x: Tensor, filter: Filters, bias: Tensor | None) -> tuple[Tensor, Filters, Tensor | None]:
    """Under autocast, as PyTorch casts the arguments of its own convolution."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, filter, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    filters: Filters
    if isinstance(filter, Strips):
        filters = filter if filter.row.dtype == torch.float64 else filter.to(dtype)
    else:
        filters = cast(filter) if isinstance(filter, Tensor) else [cast(each) for each in filter]
    return cast(x), filters, None if bias is None else cast(bias)
