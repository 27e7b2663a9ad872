"""Fixed decays per head, as log_decay [H] for `scan`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> Tensor:
    """log_decay_h = -2^(-8 h / H), h = 1, ..., H, for H a power of two.

    For other H: those of the next lower power of two, then every second one of twice that many.
    Paper: Lightning Attention-2 (2401.04658), after ALiBi (2108.12409).
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / lower) for h in range(1, lower + 1)]
    slopes += [2 ** (-4 * h / lower) for h in range(1, 2 * lower + 1, 2)][: heads - lower]
    return -torch.tensor(slopes, device="cpu")


def linear_slopes(heads: int, layer: int, layers: int) -> Tensor:
    """log_decay_h = -(8 h / H) (1 - layer / layers), h = 0, ..., H - 1: slopes of a widely used port.

    They differ from `alibi_slopes`: a checkpoint needs those that it was trained with.
    """
    return (
        -(8 / heads) * (1 - layer / layers) * torch.arange(heads, dtype=torch.float32, device="cpu")
    )
