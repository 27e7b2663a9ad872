"""Inputs that show what a candidate leaves out: several styles, fresh numbers every time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Style = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def _offset(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """A large common part: what is left after it cancels shows hidden low precision."""
    return _normal(shape, source) + 30.0


def _mixed(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Rows between a thousandth and a thousand times as large."""
    rows = (*shape[:-1], 1) if shape else ()
    powers = torch.rand(rows, generator=source, dtype=torch.float64) * 6 - 3
    return _normal(shape, source) * 10.0**powers


def _peaked(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """A few elements far larger than all others."""
    rare = torch.rand(shape, generator=source, dtype=torch.float64) < 0.02
    return _normal(shape, source) * torch.where(rare, 20.0, 1.0)


def _equal(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    return torch.full(shape, 0.5, dtype=torch.float64)


def _zeros(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _with_nan(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    return _with(torch.nan, shape, source)


def _with_infinity(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    return _with(torch.inf, shape, source)


def _with(value: float, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Normal numbers, one of which is something else."""
    x = _normal(shape, source)
    if x.numel():
        place = int(torch.randint(x.numel(), (), generator=source))
        x.view(-1)[place] = value
    return x


NORMAL = "normal"
STYLES: dict[str, Style] = {
    NORMAL: _normal,
    "peaked": _peaked,
    "offset": _offset,
    "mixed scales": _mixed,
}
"""Styles for numerics."""

EDGES: dict[str, Style] = {
    "all equal": _equal,
    "zeros": _zeros,
    "one NaN": _with_nan,
    "one infinity": _with_infinity,
}
"""Styles for edge values."""

IN_ONE_INPUT = ("one NaN", "one infinity")
"""Styles of one input, while the others are normal."""


def draw(style: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """A tensor of a style."""
    source = torch.Generator().manual_seed(seed)
    return {**STYLES, **EDGES}[style](shape, source).to(dtype)


def draw_many(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of the normal style in their own type: for timed runs, which need many of them."""
    source = torch.Generator().manual_seed(seed)
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return [torch.randn(shape, generator=source, dtype=wide).to(dtype) for shape in shapes]
