"""Products of gates inside a chunk that never overflow: pairs of tokens meet in the middle of a block.

A pair i > j lies in exactly one block of 2h tokens, aligned to multiples of 2h, whose right half
holds i and whose left half holds j.  The factor exp(g_{j+1} + ... + g_i) between them is the product
of exp(sum of g from the middle up to i) and exp(sum of g after j up to the middle), both exponents
at most 0, so that one product of matrices serves all pairs of a level h.  Every sum is formed from
the gates it covers and no others, so that a gate of -60 elsewhere costs it no digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 4
"""Sides of blocks up to which products are summed directly; matrix products start slowly."""


class Factors(NamedTuple):
    """Factors in (0, 1] of a chunk of C tokens, all [..., C, D].

    levels: for h = 1, 2, ..., C / 2, from the middle of the block of 2h tokens; since: from the start
    of the chunk up to the token, its own gate included; until: after the token up to the end.
    """

    levels: tuple[Tensor, ...]
    since: Tensor
    until: Tensor


def factors(log_decay: Tensor) -> Factors:
    """The factors of gates log_decay [..., C, D], C a power of two."""
    size = log_decay.shape[-2]
    upto = log_decay  # sums over the own half up to the token
    after = torch.zeros_like(log_decay)  # sums over the own half after the token
    found = []
    half = 1
    while half < size:
        left_upto, right_upto = halves(upto, half)
        left_after, right_after = halves(after, half)
        found.append(_whole(left_after, right_upto).exp())
        upto = _whole(left_upto, right_upto + left_upto[..., -1:, :])
        after = _whole(left_after + right_upto[..., -1:, :], right_after)
        half *= 2
    return Factors(tuple(found), upto.exp(), after.exp())


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Left and right halves [..., blocks, h, D] of the blocks of 2h rows of x [..., C, D]."""
    left, right = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return left, right


def _whole(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([left, right], dim=-3).flatten(-4, -2)


def decay_matrix(log_decay: Tensor) -> Tensor:
    """[..., C, C] of exp(g_{j+1} + ... + g_i), 1 on the diagonal, 0 above, of gates [..., C, 1]."""
    size = log_decay.shape[-2]
    sums = log_decay.expand(*log_decay.shape[:-1], size).tril(-1).cumsum(-2)
    return sums.exp().tril()


def pair_products(rows: Tensor, columns: Tensor, at: Factors) -> Tensor:
    """[..., C, C] of sum_d rows_id columns_jd exp(g_{j+1,d} + ... + g_{i,d}) at i >= j, 0 above.

    Shapes: rows and columns [..., C, D].
    """
    blocks = (rows * columns).sum(-1)[..., None, None]
    for factor in at.levels:
        half = blocks.shape[-1]
        left, right = halves(columns, half)[0], halves(rows, half)[1]
        left_factor, right_factor = halves(factor, half)
        left, right = left * left_factor, right * right_factor
        if half <= _TINY:
            cross = (right[..., :, None, :] * left[..., None, :, :]).sum(-1)
        else:
            cross = right @ left.mT
        blocks = _doubled(blocks, cross)
    return blocks.squeeze(-3)


def _doubled(blocks: Tensor, cross: Tensor) -> Tensor:
    """Blocks [..., n, h, h] and what is below them, as blocks [..., n / 2, 2h, 2h]."""
    first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    upper = F.pad(first, (0, first.shape[-1]))
    return torch.cat([upper, torch.cat([cross, second], dim=-1)], dim=-2)
