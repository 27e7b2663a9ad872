"""The only validation of a convolution: tensors become a frozen `Convolution`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal._errors import DeviceError, DtypeError, ShapeError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Axes = int | Sequence[int]
Padding = int | Sequence[int | tuple[int, int]] | None
Flags = bool | Sequence[bool]


@dataclass(frozen=True)
class Convolution:
    """A depthwise convolution of x [batch, *grid, channels] with a filter of `window` taps.

    before and after count the zeros that stand around each axis; per_sample: a filter for each sample.
    """

    batch: int
    channels: int
    grid: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    per_sample: bool
    channels_first: bool
    dtype: torch.dtype
    device: str
    needs_grad: bool

    @property
    def out_grid(self) -> tuple[int, ...]:
        return _left(self.grid, self.before, self.after, self.reach)

    @property
    def reach(self) -> tuple[int, ...]:
        """Tokens between the first and the last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.window, strict=True))

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    @property
    def products(self) -> int:
        """Products of a tap and a token on the grid."""
        pairs = 1
        for axis in range(len(self.grid)):
            pairs *= sum(
                min(max(self.grid[axis] + self.before[axis] - tap * self.dilation[axis], 0),
                    self.out_grid[axis])
                - min(max(self.before[axis] - tap * self.dilation[axis], 0), self.out_grid[axis])
                for tap in range(self.window[axis])
            )  # fmt: skip
        return self.batch * self.channels * pairs


def describe(
    x: Tensor,
    weight: Tensor,
    dilation: Axes,
    padding: Padding,
    causal: Flags,
    channels_first: bool,
    channels: int,
) -> Convolution:
    """Checks the arguments of a convolution with one filter over `channels` channels of x."""
    check_tensors({"x": x, "filter": weight})
    if not 3 <= x.dim() <= 5:
        raise ShapeError(
            "x", list(x.shape), "a batch, one to three grid axes and channels are needed"
        )
    grid = tuple(x.shape[2:] if channels_first else x.shape[1:-1])
    axes = len(grid)
    if weight.dim() not in (axes + 1, axes + 2):
        needed = f"[channels, *window] or [batch, channels, *window] with {axes} axes is needed"
        raise ShapeError("filter", list(weight.shape), needed)
    per_sample = weight.dim() == axes + 2
    window = tuple(weight.shape[-axes:])
    if min(window) == 0:
        raise ShapeError("filter", list(weight.shape), "at least one tap per axis is needed")
    if per_sample and len(weight) != len(x):
        raise ShapeError("filter", list(weight.shape), f"one filter for each of {len(x)} samples")
    count = weight.shape[-axes - 1]
    if count == 0 or channels % count:
        raise ShapeError(
            "filter", list(weight.shape), f"a divisor of {channels} channels is needed"
        )
    steps = per_axis("dilation", dilation, axes, 1)
    before, after = _padding(window, steps, padding, causal, axes)
    problem = Convolution(
        batch=len(x),
        channels=channels,
        grid=grid,
        window=window,
        dilation=steps,
        before=before,
        after=after,
        per_sample=per_sample,
        channels_first=channels_first,
        dtype=x.dtype,
        device=x.device.type,
        needs_grad=torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad),
    )
    if min(problem.out_grid) < 1:
        needed = f"a padded grid of more than {list(problem.reach)} tokens is needed"
        raise ShapeError("x", list(x.shape), needed)
    return problem


def out_grid(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    dilation: Axes,
    padding: Padding,
    causal: Flags,
) -> tuple[int, ...]:
    """The grid of y, of the arguments of a convolution that passed the checks of `describe`."""
    steps = per_axis("dilation", dilation, len(grid), 1)
    before, after = _padding(window, steps, padding, causal, len(grid))
    reach = tuple(d * (k - 1) for d, k in zip(steps, window, strict=True))
    return _left(grid, before, after, reach)


def _left(
    grid: tuple[int, ...],
    before: tuple[int, ...],
    after: tuple[int, ...],
    reach: tuple[int, ...],
) -> tuple[int, ...]:
    axes = zip(grid, before, after, reach, strict=True)
    return tuple(size + b + a - r for size, b, a, r in axes)


def check_tensors(tensors: dict[str, Tensor]) -> None:
    """The same floating dtype and device for all of them."""
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise DtypeError(name, tensor.dtype, "float64, float32, bfloat16 or float16 is needed")
        if tensor.dtype != first.dtype:
            needed = f"the dtype of {first_name}, {first.dtype}, is needed"
            raise DtypeError(name, tensor.dtype, needed)
        if tensor.device != first.device:
            needed = f"the device of {first_name}, {first.device}, is needed"
            raise DeviceError(name, tensor.device, needed)


def per_axis(name: str, value: Axes, axes: int, least: int) -> tuple[int, ...]:
    """One number per axis; an integer means every axis."""
    values = (value,) * axes if not isinstance(value, Iterable) else tuple(value)
    if len(values) != axes or any(not isinstance(v, int) or v < least for v in values):
        needed = f"an integer, or one for each of {axes} axes, of at least {least} is needed"
        raise ShapeError(name, value, needed)
    return values


def flags(name: str, value: Flags, axes: int) -> tuple[bool, ...]:
    """One truth value per axis; a single one means every axis."""
    values = (value,) * axes if not isinstance(value, Iterable) else tuple(value)
    if len(values) != axes or any(not isinstance(v, bool) for v in values):
        raise ShapeError(name, value, f"True or False, or one for each of {axes} axes, is needed")
    return values


def _padding(
    window: tuple[int, ...], steps: tuple[int, ...], padding: Padding, causal: Flags, axes: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after each axis."""
    past = flags("causal", causal, axes)
    reach = [d * (k - 1) for d, k in zip(steps, window, strict=True)]
    if padding is None:
        before = tuple(r if p else r // 2 for r, p in zip(reach, past, strict=True))
        return before, tuple(r - b for r, b in zip(reach, before, strict=True))
    if any(past):
        raise ShapeError("padding", padding, "None is needed with causal, which sets it")
    each = (padding,) * axes if not isinstance(padding, Iterable) else tuple(padding)
    pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in each]
    if len(pairs) != axes or any(len(p) != 2 or min(p) < 0 for p in pairs):
        needed = f"an integer of at least 0, or one or a pair for each of {axes} axes, is needed"
        raise ShapeError("padding", padding, needed)
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


def turned(problem: Convolution) -> Convolution:
    """The convolution with the flipped filter that takes the gradient of y to that of x."""
    reach = problem.reach
    before = tuple(r - b for r, b in zip(reach, problem.before, strict=True))
    after = tuple(r - a for r, a in zip(reach, problem.after, strict=True))
    return replace(problem, grid=problem.out_grid, before=before, after=after)
