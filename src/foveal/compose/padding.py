"""Grids of different sizes in one batch, padded to a common one."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._errors import ShapeError
from foveal.scores import KeyBias


def padding_bias(sizes: Tensor, grid: tuple[int, ...]) -> KeyBias:
    """0 on the tokens of each sample and -inf on its padding: to be added to a score.

    Shapes: sizes [B, axes] (or [B] for one axis), the real grid of every sample, at its lower corner;
    grid, the padded one.  Returns a KeyBias of [B, 1, prod(grid)].
    Limits: windows are placed on the padded grid, so a query near the end of its sample sees fewer
    keys, as with border "clip"; a query that sees padding only gives o = 0.  Padded queries see real
    keys too: leave their outputs out.
    """
    sizes = sizes[:, None] if sizes.dim() == 1 else sizes
    if sizes.dim() != 2 or sizes.shape[1] != len(grid) or sizes.is_floating_point():
        raise ShapeError("sizes", list(sizes.shape), f"integers [B, {len(grid)}] are needed")
    inside = torch.ones(len(sizes), *grid, dtype=torch.bool, device=sizes.device)
    for axis, length in enumerate(grid):
        place = torch.arange(length, device=sizes.device)
        line = place < sizes[:, axis, None]
        inside &= line.view(-1, *(length if a == axis else 1 for a in range(len(grid))))
    hidden = torch.where(inside.flatten(1), 0.0, -torch.inf)
    return KeyBias(hidden[:, None])
