"""A dilated convolution as plain ones, of the tokens of each class of coordinates modulo the dilation."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from foveal.engines.convolution.problem import Convolution


def gathered(problem: Convolution, x: Tensor) -> tuple[Convolution, Tensor]:
    """The plain problem and its x [B * classes, C, *grid], of x [B, C, *grid], stored as the problem says.

    With before = d b - e, 0 <= e < d, and p + e = d i + r, tap o of token p meets token i + o - b of class r.
    """
    plain = _plain(problem)
    sizes = zip(problem.grid, plain.grid, problem.dilation, strict=True)
    behind = [zeros for n, own, d in reversed(list(sizes)) for zeros in (0, own * d - n)]
    return plain, _divided(plain, problem.dilation, x, behind)


def gathered_result(problem: Convolution, y: Tensor) -> Tensor:
    """The inverse of `scattered`: y [B * classes, C, *grid] of y [B, C, *out_grid]."""
    plain = _plain(problem)
    axes = zip(problem.out_grid, plain.out_grid, problem.dilation, _skipped(problem), strict=True)
    around = [zeros for n, own, d, e in reversed(list(axes)) for zeros in (e, own * d - e - n)]
    return _divided(plain, problem.dilation, y, around)


def _divided(plain: Convolution, dilation: tuple[int, ...], x: Tensor, zeros: list[int]) -> Tensor:
    """[B * classes, C, ...] of x [B, C, ...] with zeros around, as F.pad takes them."""
    x = F.pad(x, zeros) if any(zeros) else x
    axes = range(len(dilation))
    for axis in axes:
        x = x.unflatten(2 + 2 * axis, (-1, dilation[axis]))
    residues, places = [3 + 2 * axis for axis in axes], [2 + 2 * axis for axis in axes]
    sizes = [x.shape[place] for place in places]
    if plain.channels_first:
        x = x.permute(0, *residues, 1, *places)
        return x.reshape(plain.batch, plain.channels, *sizes)
    x = x.permute(0, *residues, *places, 1)
    return x.reshape(plain.batch, *sizes, plain.channels).movedim(-1, 1)


def scattered(problem: Convolution, y: Tensor) -> Tensor:
    """y [B, C, *out_grid] of the y [B * classes, C, *grid] of the plain problem."""
    axes, sizes = len(problem.grid), y.shape[2:]
    y = y.unflatten(0, (problem.batch, *problem.dilation))
    pairs = [axis for n in range(axes) for axis in (2 + axes + n, 1 + n)]
    y = y.permute(0, 1 + axes, *pairs)
    if not problem.channels_first:
        y = y.movedim(1, -1)
    whole = [n * d for n, d in zip(sizes, problem.dilation, strict=True)]
    if problem.channels_first:
        y = y.reshape(problem.batch, problem.channels, *whole)
    else:
        y = y.reshape(problem.batch, *whole, problem.channels).movedim(-1, 1)
    for axis, (e, size) in enumerate(zip(_skipped(problem), problem.out_grid, strict=True)):
        y = y.narrow(2 + axis, e, size)
    return (
        y.contiguous() if problem.channels_first else y.movedim(1, -1).contiguous().movedim(-1, 1)
    )


def _skipped(problem: Convolution) -> tuple[int, ...]:
    """e of each axis: places before the first token in the class of residue 0."""
    return tuple(-b % d for b, d in zip(problem.before, problem.dilation, strict=True))


def _plain(problem: Convolution) -> Convolution:
    def classes(tokens: int, d: int) -> int:
        return -(-tokens // d)

    axes = list(zip(problem.grid, problem.before, problem.after, problem.dilation, strict=True))
    return replace(
        problem,
        batch=problem.batch * math.prod(problem.dilation),
        grid=tuple(classes(size, d) for size, _, _, d in axes),
        before=tuple(classes(before, d) for _, before, _, d in axes),
        after=tuple(classes(size + after, d) - classes(size, d) for size, _, after, d in axes),
        dilation=(1,) * len(axes),
    )
