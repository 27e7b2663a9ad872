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

from foveal._capture import traced

_REACH = 16.0
"""Decay of a chunk, in its logarithm, that one factor may undo: it costs 3 of float32's 24 bits."""
NOTHING = -1e4
"""A logarithm whose exponential is 0 in every precision."""
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


class Faded(NamedTuple):
    """Queries and keys of chunks with their decays.

    Shapes: q_pairs and k_pairs [chunks, Hv, C, C], scale q_i k_j and k_i k_j with the decay from token
    j to token i: of i >= j, and of at least i > j (None for an additive rule); q_since, times the
    scale, k_since and k_until [chunks, Hv, C, Dk] with the decay from the start of the chunk and up
    to its end; kept [chunks, Hv, Dk or 1, 1], the decay of the chunk, None for 1.
    """

    q_pairs: Tensor
    k_pairs: Tensor | None
    q_since: Tensor
    k_since: Tensor
    k_until: Tensor
    kept: Tensor | None


def faded(q: Tensor, k: Tensor, log_decay: Tensor | None, scale: float, delta: bool) -> Faded:
    """q and k [chunks, Hv, C, Dk] with the decays log_decay [chunks or 1, Hv, C, Dk or 1]."""
    if log_decay is None:
        k_pairs = k @ k.mT if delta else None
        return Faded((q @ k.mT * scale).tril(), k_pairs, q * scale, k, k, None)
    sums = log_decay.cumsum(-2)
    looked_at = log_decay.device.type == "cpu" and not traced()
    if looked_at and bool((sums[..., -1, :] >= -_REACH).all()):
        return _faded_from_the_middle(q, k, sums, scale, delta)
    if log_decay.shape[-1] == 1:
        return _faded_by_token(q, k, log_decay, scale, delta)
    at = factors(log_decay)
    q = q * scale
    k_pairs = pair_products(k, k, at) if delta else None
    kept = at.since[..., -1, :, None]
    return Faded(pair_products(q, k, at), k_pairs, q * at.since, k * at.since, k * at.until, kept)


def _faded_by_token(q: Tensor, k: Tensor, log_decay: Tensor, scale: float, delta: bool) -> Faded:
    """Differences of sums in float64 keep all digits of float32 gates, which may be -inf."""
    size = log_decay.shape[-2]
    sums = log_decay.double().clamp(min=NOTHING).cumsum(-2)
    upper = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (sums - sums.mT).masked_fill(upper, -torch.inf).to(q.dtype).exp()
    since, until = sums.to(q.dtype).exp(), (sums[..., -1:, :] - sums).to(q.dtype).exp()
    k_pairs = k @ k.mT * between if delta else None
    kept = since[..., -1:, :].expand(len(q), -1, -1, -1)
    k_since = k * since if delta else k
    return Faded(
        q @ k.mT * (between * scale), k_pairs, q * (since * scale), k_since, k * until, kept
    )


def _faded_from_the_middle(q: Tensor, k: Tensor, sums: Tensor, scale: float, delta: bool) -> Faded:
    """One product for all pairs: both tokens decay from, or grow up to, the middle of the chunk."""
    middle = sums[..., sums.shape[-2] // 2, :].unsqueeze(-2)
    near = (sums - middle).exp()
    q_near, k_far = q * (near * scale), k * (middle - sums).exp()
    first, whole = middle.exp(), sums[..., -1:, :]
    k_pairs, k_since = None, k
    if delta:
        k_near = k * near
        k_pairs, k_since = k_near @ k_far.mT, k_near * first
    k_until = k_far * (whole - middle).exp()
    q_pairs = (q_near @ k_far.mT).tril()
    kept = whole.exp().mT.expand(len(q), -1, -1, -1)
    return Faded(q_pairs, k_pairs, q_near * first, k_since, k_until, kept)
