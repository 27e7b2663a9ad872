"""Convolutions as long as the grid: the problem, its definition, and products of spectra."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import DeviceError, DtypeError, ShapeError
from foveal.engines.convolution.problem import check_tensors


@dataclass(frozen=True)
class Spectral:
    """A convolution of x [batch, *grid, channels] with `taps` values per axis, or with a spectrum."""

    batch: int
    channels: int
    grid: tuple[int, ...]
    taps: tuple[int, ...]
    causal: bool
    spectrum: bool
    dtype: torch.dtype
    device: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the transforms."""
        if not self.causal:
            return self.grid
        reach = zip(self.grid, self.taps, strict=True)
        return tuple(smooth(size + min(size, taps) - 1) for size, taps in reach)

    @property
    def flops(self) -> int:
        """5 N log2 N for each of two transforms of x, and the products."""
        points = math.prod(self.sizes)
        steps = max(math.ceil(math.log2(points)), 1) if points > 1 else 1
        return self.batch * self.channels * points * (5 * steps + 3)


def smooth(size: int) -> int:
    """The least product of 2, 3 and 5 that is not below `size`."""
    best = 1 << max(size - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-size // three)
            best = min(best, three << max(rest - 1, 0).bit_length())
            three *= 3
        five *= 5
    return best


def describe_spectral(
    x: Tensor,
    filter: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    skip: Tensor | None,
    causal: bool,
) -> Spectral:
    """Checks the arguments of a long convolution against each other and returns what they describe."""
    if not 3 <= x.dim() <= 5:
        raise ShapeError("x", list(x.shape), "[B, *grid, C] with one to three axes is needed")
    grid, channels = tuple(x.shape[1:-1]), x.shape[-1]
    if not isinstance(causal, bool):
        raise ShapeError("causal", causal, "True or False, for all axes, is needed")
    spectrum = filter.is_complex()
    others = {"x": x, "pre_gate": pre_gate, "post_gate": post_gate, "skip": skip}
    if not spectrum:
        others["filter"] = filter
    check_tensors({name: t for name, t in others.items() if t is not None})
    if filter.device != x.device:
        raise DeviceError("filter", filter.device, f"the device of x, {x.device}, is needed")
    axes = len(grid)
    leading = [[channels], [len(x), channels]]
    if filter.dim() not in (axes + 1, axes + 2) or list(filter.shape[:-axes]) not in leading:
        needed = f"{[channels]} or {[len(x), channels]} and {axes} axes are needed"
        raise ShapeError("filter", list(filter.shape), needed)
    taps = tuple(filter.shape[-axes:])
    if spectrum:
        if causal:
            raise DtypeError("filter", filter.dtype, "a real one is needed where causal is True")
        if taps != (*grid[:-1], grid[-1] // 2 + 1):
            needed = f"{[*grid[:-1], grid[-1] // 2 + 1]} frequencies are needed"
            raise ShapeError("filter", list(filter.shape), needed)
    elif not causal and any(t > size for t, size in zip(taps, grid, strict=True)):
        raise ShapeError("filter", list(filter.shape), f"at most the circle {list(grid)} is needed")
    if min(taps) == 0 or min(grid) == 0:
        raise ShapeError("filter", list(filter.shape), "a tap and a token per axis are needed")
    for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if gate is not None and gate.shape != x.shape:
            raise ShapeError(name, list(gate.shape), f"the shape of x, {list(x.shape)}, is needed")
    if skip is not None and skip.shape != (channels,):
        raise ShapeError("skip", list(skip.shape), f"[{channels}] is needed")
    return Spectral(len(x), channels, grid, taps, causal, spectrum, x.dtype, x.device.type)


def refuses(problem: Spectral) -> str | None:
    if problem.batch * problem.channels == 0:
        return "PyTorch transforms no empty batch"
    return None


def caveat(problem: Spectral) -> str | None:
    return None


def gated(
    problem: Spectral,
    x: Tensor,
    filter: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    skip: Tensor | None,
) -> Tensor:
    """post (filter * (pre x)) + skip x, [B, *grid, C] in the dtype of x."""
    return composed(filtered, problem, x, filter, pre, post, skip)


def composed(
    filtered: Callable[[Spectral, Tensor, Tensor], Tensor],
    problem: Spectral,
    x: Tensor,
    filter: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    skip: Tensor | None,
) -> Tensor:
    """A convolution between its gates, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = filtered(problem, x.to(wide) if pre is None else pre.to(wide) * x, filter)
    if post is not None:
        y = post * y
    if skip is not None:
        y = y + skip * x
    return y.to(x.dtype)


def filtered(problem: Spectral, x: Tensor, filter: Tensor) -> Tensor:
    """The convolution alone, [B, *grid, C] in float32 at least, by PyTorch's Fourier transforms."""
    axes = tuple(range(-len(problem.grid), 0))
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = problem.sizes
    seen = torch.fft.rfftn(x.movedim(-1, 1).to(wide), sizes, axes)
    spectrum = filter
    if not problem.spectrum:
        spectrum = torch.fft.rfftn(_first(filter, problem.grid).to(wide), sizes, axes)
    kept = torch.is_grad_enabled() and (seen.requires_grad or spectrum.requires_grad)
    wider = spectrum.dim() < seen.dim() or spectrum.shape == seen.shape
    if not kept and wider and spectrum.dtype == seen.dtype:
        seen *= spectrum
    else:
        seen = seen * spectrum
    y = torch.fft.irfftn(seen, sizes, axes)
    return _first(y, problem.grid).movedim(1, -1)


def _first(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The first elements along the last axes."""
    for axis, size in zip(range(-len(sizes), 0), sizes, strict=True):
        x = x.narrow(axis, 0, min(size, x.shape[axis]))
    return x
