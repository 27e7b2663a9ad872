"""Linear attention over all keys: two products of matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal._errors import RuleError, ShapeError


def contract(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalised: bool = True,
    floor: float = 1e-6,
    key_mask: Tensor | None = None,
) -> Tensor:
    """o_i = q_i^T (sum_j k_j v_j^T) / max(q_i . sum_j k_j, floor), of features q and k.

    Shapes: q [B, Lq, H, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv] with Hkv dividing H; key_mask bool
    [B, Lk], False hides a key.  Returns [B, Lq, H, Dv] in the dtype of v, sums in float32 at least.
    Options: normalised=False leaves the division out.
    Cost: 4 (Lq + Lk) D Dv FLOPs per head, never Lq x Lk.
    Paper: Transformers are RNNs (2006.16236), without causality.
    """
    _need_rows(q, k, v)
    dtype = v.dtype
    q, k, v = (x.to(_wide(dtype)) for x in (q, k, v))
    if key_mask is not None:
        if key_mask.shape != k.shape[:2]:
            raise ShapeError("key_mask", list(key_mask.shape), f"{list(k.shape[:2])} is needed")
        k = k * key_mask[..., None, None]
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    state = torch.einsum("blhd,blhv->bhdv", k, v)
    o = torch.einsum("blhd,bhdv->blhv", q, state)
    if normalised:
        o = o / torch.einsum("blhd,bhd->blh", q, k.sum(1)).clamp(min=floor)[..., None]
    return o.to(dtype)


def _need_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ShapeError("q", list(q.shape), "[B, L, H, D] is needed, as for k")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        needed = f"the batch and D of q, {list(q.shape)}, are needed"
        raise ShapeError("k", list(k.shape), needed)
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ShapeError("k", list(k.shape), f"its heads must divide the {q.shape[2]} of q")
    if v.shape[:-1] != k.shape[:-1]:
        needed = f"the batch, tokens and heads of k, {list(k.shape)}, are needed"
        raise ShapeError("v", list(v.shape), needed)


def toeplitz_contract(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    causal: bool = False,
    floor: float = 1e-6,
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j w_ij v_j / max(sum_j w_ij, floor), w_ij = exp(bias_{j-i}) q_i . k_j of features q, k.

    Shapes: q and k [B, L, H, D], v [B, L, H, Dv], bias [H, 2 L - 1], entry j - i + L - 1.
    Options: implementation "fft" multiplies D (Dv + 1) columns per head with a Toeplitz matrix by
    Fourier transforms of length 2 L, in float32 at least; "pairs" forms all weights, a slice of rows
    at a time; None takes what costs less.
    Cost: "fft" about 20 D Dv L log2(2 L) FLOPs per head, "pairs" 2 (D + Dv) L^2.
    Paper: Kernelized Attention with Relative Positional Encoding (2106.12566).
    """
    length, heads = q.shape[1:3]
    distances = max(2 * length - 1, 0)
    if tuple(bias.shape) != (heads, distances):
        raise ShapeError("bias", list(bias.shape), f"{[heads, distances]} is needed")
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ShapeError("k", list(k.shape), f"the tokens and heads of q, {list(q.shape)}")
    chosen = cheaper(length, q.shape[-1], v.shape[-1]) if implementation is None else implementation
    if chosen not in ("fft", "pairs"):
        raise RuleError("implementation", chosen, '"fft" or "pairs" is needed')
    if not length:
        return v
    dtype = v.dtype
    q, k, v, bias = (x.to(_wide(dtype)) for x in (q, k, v, bias))
    weights = bias.exp()
    if causal:
        weights = weights * (torch.arange(2 * length - 1, device=q.device) < length)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    o = (_by_fft if chosen == "fft" else _by_pairs)(q, k, v, weights)
    return (o[..., :-1] / o[..., -1:].clamp(min=floor)).to(dtype)


def cheaper(length: int, head_dim: int, value_dim: int) -> str:
    """The form of `toeplitz_contract` with fewer FLOPs."""
    fft = 20 * head_dim * (value_dim + 1) * max(math.log2(max(2 * length, 1)), 1.0)
    return "fft" if fft < 2 * (head_dim + value_dim + 1) * length else "pairs"


_ELEMENTS = 2**22
"""Elements of a temporary tensor that are worked on at a time."""


def _by_fft(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    size = 2 * length
    # o_i = sum_j c_{j-i} x_j: a circular correlation of period 2 L, entry L unused.
    wrapped = torch.cat([weights[:, length - 1 :], weights[:, :1] * 0, weights[:, : length - 1]], 1)
    spectrum = torch.fft.rfft(wrapped).conj().mT[None, :, :, None, None]  # [1, f, H, 1, 1]
    at_once = max(_ELEMENTS // max(batch * size * heads * v.shape[-1], 1), 1)
    o = torch.zeros_like(v)
    for q_part, k_part in zip(q.split(at_once, -1), k.split(at_once, -1), strict=True):
        columns = k_part[..., :, None] * v[..., None, :]
        mixed = torch.fft.irfft(torch.fft.rfft(columns, n=size, dim=1) * spectrum, n=size, dim=1)
        o = o + (q_part[..., None] * mixed[:, :length]).sum(-2)
    return o


def _by_pairs(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    rows = max(_ELEMENTS // max(batch * heads * length, 1), 1)
    at = torch.arange(length, device=q.device)
    outputs = []
    for own, i in zip(q.split(rows, dim=1), at.split(rows), strict=True):
        between = weights[:, at - i[:, None] + length - 1]  # [H, rows, L]
        pairs = torch.einsum("bihd,bjhd->bhij", own, k) * between
        outputs.append(torch.einsum("bhij,bjhv->bihv", pairs, v))
    return torch.cat(outputs, dim=1) if outputs else v


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
