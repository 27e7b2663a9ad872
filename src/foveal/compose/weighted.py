"""Keys that count more than once or less, at the price of a few columns of the keys."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal.patterns import Dense, Pattern
from foveal.scores import Softmax

EXTRA_COLUMNS = 8
"""That many more, where the head_dim is a multiple of it: 16 bytes, to which copies are aligned."""


@overload
def attend_weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor,
    pattern: Pattern = ...,
    *,
    square: bool = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def attend_weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor,
    pattern: Pattern = ...,
    *,
    square: bool = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attend_weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor,
    pattern: Pattern = Dense(),
    *,
    square: bool = False,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = sum_j w_j exp(s_ij) v_j / sum_j w_j exp(s_ij), s_ij = D^-0.5 q_i.k_j, log w in columns of k.

    q gets ones and k the columns a, b, c with a + b + c = D^0.5 log w, each rounded to the dtype of k in
    turn: together as exact as float32.  The product of q and k then holds log w, so that kernels
    which add no bias, or slowly, need not.

    Shapes: as `attend`; log_weights [Lk] in raster order, the same for all heads, finite or -inf; it
    gets no gradient.
    Options: square gives v as many columns as k has then, of zeros that are cut off again, for kernels
    whose gradients need D = Dv; the rest as `attend`.
    Equals: `attend` with KeyBias(log_weights).  Cost: eight columns of q and k, or as many as make
    D + 3 a multiple of eight.
    """
    grid, dim = k.shape[1:-2], k.shape[-1]
    if log_weights.shape != (grid.numel(),):
        raise ShapeError("log_weights", list(log_weights.shape), f"[{grid.numel()}] is needed")
    pieces = _pieces(log_weights.detach().double() * dim**0.5, _precision(k))
    count = pieces.shape[-1]
    width = count + -(dim + count) % EXTRA_COLUMNS
    ones = q.new_zeros(width)
    ones[:count] = 1
    columns = k.new_zeros(*grid, 1, width)
    columns[..., :count] = pieces.view(*grid, 1, count)
    wide_q = torch.cat([q, ones.expand(*q.shape[:-1], width)], dim=-1)
    wide_k = torch.cat([k, columns.expand(*k.shape[:-1], width)], dim=-1)
    more = wide_k.shape[-1] - v.shape[-1] if square else 0
    wide_v = torch.cat([v, v.new_zeros(*v.shape[:-1], more)], dim=-1) if more > 0 else v
    o, lse = attend(
        wide_q, wide_k, wide_v, pattern, Softmax(scale=dim**-0.5),
        return_lse=True, implementation=implementation,
    )  # fmt: skip
    o = o[..., : v.shape[-1]]
    return (o, lse) if return_lse else o


def _precision(k: Tensor) -> torch.dtype:
    """The dtype in which the columns arrive, as `attend` follows autocast."""
    if torch.is_autocast_enabled(k.device.type) and k.dtype != torch.float64:
        return torch.get_autocast_dtype(k.device.type)
    return k.dtype


def _pieces(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, float64, as a sum of numbers of a dtype: one where it is wide, else three.  [..., pieces]"""
    left = x
    pieces = []
    for _ in range(3 if torch.finfo(dtype).bits < 32 else 1):
        piece = left.to(dtype)
        pieces.append(piece)
        left = torch.where(piece.isinf(), 0.0, left - piece.double())
    return torch.stack(pieces, dim=-1)
