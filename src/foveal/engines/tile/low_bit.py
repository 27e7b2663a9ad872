"""Largest low-bit estimates of tiles of scores: on a GPU by one kernel, elsewhere by parts of the map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.engines.tile.rows import has_kernels

# Elements of the map that are held at once.
_AT_ONCE = 1 << 26
_SIDE = 128


def largest_estimates(
    q: Tensor, k: Tensor, level: Tensor, bits: int, local: int, q_block: int, kv_block: int
) -> Tensor:
    """max of s^_ij - level_i in every tile, s^ a causal score of which the varying parts have `bits`.

    s^_ij = rest_i . rest_j + mean_q . (k_j - mean_k) + q_i . mean_k, q scaled by 1 / sqrt(D), means over
    the sequence, rest_i and rest_j what is left of q_i and k_j, as whole numbers with one unit per token.
    Only tiles that lie further than `local` keys behind all their queries have a meaning.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], level float [B, Lq, Hq]; result float [B, Hq, tiles, blocks].
    """
    level = level.transpose(1, 2)
    if _fits(q, k, q_block, kv_block):
        return _by_kernel(q, k, level, bits, local, q_block, kv_block)
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, columns = _heads_first(q, k)
    rows, columns = rows.to(wide) * q.shape[-1] ** -0.5, columns.to(wide)[:, :, None]
    mean_q, mean_k = rows.mean(3, keepdim=True), columns.mean(3, keepdim=True)
    rest_q, q_unit = rounded(rows - mean_q, bits)
    rest_k, k_unit = rounded(columns - mean_k, bits)
    of_keys = mean_q @ (columns - mean_k).mT
    of_queries = rows @ mean_k.mT - level.unflatten(1, rows.shape[1:3])[..., None]
    at_once = max(1, _AT_ONCE // max(rows.shape[:3].numel() * k.shape[1] * q_block, 1)) * q_block
    found = []
    for at in range(0, q.shape[1], at_once):
        own = slice(at, at + at_once)
        s = rest_q[..., own, :] @ rest_k.mT * q_unit[..., own, :] * k_unit.mT
        s = s + of_keys + of_queries[..., own, :]
        s = F.pad(s, (0, -s.shape[-1] % kv_block, 0, -s.shape[-2] % q_block), value=-torch.inf)
        s = s.unflatten(-1, (-1, kv_block)).amax(-1).unflatten(-2, (-1, q_block)).amax(-2)
        found.append(s)
    return torch.cat(found, dim=3).flatten(1, 2)


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of at most 2^(bits - 1) - 1 and the unit per row: x is about numbers * unit."""
    most = 2 ** (bits - 1) - 1
    unit = x.abs().amax(-1, keepdim=True) / most
    return torch.round(x / torch.where(unit == 0, 1.0, unit)), unit


def _heads_first(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """[B, Hkv, G, Lq, D] and [B, Hkv, Lk, D]"""
    return q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4), k.transpose(1, 2)


def _fits(q: Tensor, k: Tensor, q_block: int, kv_block: int) -> bool:
    whole = all(_SIDE % side == 0 for side in (q_block, kv_block))
    half = q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype
    return whole and half and q.shape[-1] <= 256 and q.numel() > 0 and has_kernels(q)


def _by_kernel(
    q: Tensor, k: Tensor, level: Tensor, bits: int, local: int, q_block: int, kv_block: int
) -> Tensor:
    from foveal.engines.common.current import on
    from foveal.engines.tile.low_bit_kernels import low_bit_tiles

    B, Lq, heads, D = q.shape
    Lk, groups = k.shape[1], heads // k.shape[2]
    scale = D**-0.5
    mean_q = q.mean(1, dtype=torch.float32) * scale
    mean_k = k.mean(1, dtype=torch.float32)
    ahead = mean_q.unflatten(1, (k.shape[2], groups))
    of_keys = torch.einsum("bhgd,bjhd->bhgj", ahead, k.float() - mean_k[:, None])
    tiles, blocks = -(-Lq // q_block), -(-Lk // kv_block)
    found = q.new_full((B, heads, tiles, blocks), -torch.inf, dtype=torch.float32)
    with on(q.device):
        rest_q, q_unit, of_queries = _rows(q, mean_q, mean_k, groups, scale, bits)
        rest_k, k_unit, _ = _rows(k, mean_k, mean_k, 1, 1.0, bits)
        grid = (-(-Lq // _SIDE) * -(-Lk // _SIDE), B * heads)
        low_bit_tiles[grid](
            rest_q, q_unit, of_queries - level, rest_k, k_unit, of_keys.contiguous(), found,
            heads, groups, Lq, Lk, tiles, blocks, Lk - Lq, local,
            PAD=rest_q.shape[-1], ROWS=_SIDE, COLUMNS=_SIDE, Q_BLOCK=q_block, KV_BLOCK=kv_block,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    return found


def _rows(
    x: Tensor, mean: Tensor, other: Tensor, groups: int, scale: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers int8 [B, H, tokens, PAD] of x scale - mean, their units, and x scale . other."""
    from foveal.engines.tile.low_bit_kernels import low_bit_rows

    B, tokens, heads, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    pad, at_once = max(32, 1 << (D - 1).bit_length()), 16
    rows = torch.empty(B, heads, tokens, pad, dtype=torch.int8, device=x.device)
    unit, along = torch.empty(2, B, heads, tokens, dtype=torch.float32, device=x.device)
    low_bit_rows[(-(-tokens // at_once), B * heads)](
        x, mean.contiguous(), other.contiguous(), rows, unit, along, x.stride()[:3],
        heads, groups, tokens, scale, MOST=2 ** (bits - 1) - 1, D=D, PAD=pad, ROWS=at_once, num_warps=4,
    )  # fmt: skip
    return rows, unit, along
