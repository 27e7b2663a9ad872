"""A long convolution by its definition: every token times every tap, or a Fourier sum written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.engines.convolution.spectral import Spectral, composed


def refuses(problem: Spectral) -> str | None:
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


def filtered(problem: Spectral, x: Tensor, filter: Tensor) -> Tensor:
    """The convolution alone, [B, *grid, C] in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first = x.movedim(-1, 1).to(wide)
    taps = impulse_response(problem, filter) if problem.spectrum else filter.to(wide)
    if taps.dim() == len(problem.grid) + 1:
        taps = taps[None]
    matrices = _matrices(problem, taps)  # [B or 1, C, L, L]
    y = (matrices @ first.flatten(2)[..., None]).squeeze(-1)
    found: Tensor = y.unflatten(-1, problem.grid).movedim(1, -1)
    return found


def _matrices(problem: Spectral, taps: Tensor) -> Tensor:
    """[..., p, q]: the tap that takes token q to token p, 0 where there is none."""
    coordinates = torch.cartesian_prod(*(torch.arange(n) for n in problem.grid))
    coordinates = coordinates.view(-1, len(problem.grid)).to(taps.device)
    index = torch.zeros(1, 1, dtype=torch.int64, device=taps.device)
    exists = torch.ones(1, 1, dtype=torch.bool, device=taps.device)
    for axis, (size, count) in enumerate(zip(problem.grid, taps.shape[2:], strict=True)):
        lag = coordinates[:, None, axis] - coordinates[None, :, axis]
        lag = lag if problem.causal else lag % size
        exists = exists & (lag >= 0) & (lag < count)
        index = index * count + lag.clamp(0, count - 1)
    return torch.where(exists, taps.flatten(2)[:, :, index], 0.0)


def impulse_response(problem: Spectral, spectrum: Tensor) -> Tensor:
    """The real taps [.., C, *grid] whose half spectrum this is: the sum over all frequencies."""
    axes = len(problem.grid)
    taps = spectrum
    for axis, size in enumerate(problem.grid[:-1]):
        taps = (taps.movedim(axis - axes, -1) @ _waves(size, size, taps)).movedim(-1, axis - axes)
    size, frequencies = problem.grid[-1], spectrum.shape[-1]
    counts = torch.full((frequencies,), 2.0, device=spectrum.device)
    counts[0] = 1.0
    if size % 2 == 0:
        counts[-1] = 1.0
    return ((taps * counts) @ _waves(frequencies, size, taps)).real


def _waves(frequencies: int, size: int, like: Tensor) -> Tensor:
    """exp(2 pi i f p / size) / size"""
    real = like.real.dtype
    turns = torch.outer(torch.arange(frequencies), torch.arange(size)) % size
    angle = turns.to(device=like.device, dtype=real) * (2 * math.pi / size)
    return torch.polar(torch.full_like(angle, 1 / size), angle)
