"""Neighborhood attention in two steps with the weights in the open, heads first, as NATTEN had it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._errors import ShapeError
from foveal._judged import need_dtype, need_shape
from foveal._kept import kept
from foveal.compat.natten.fused import Flags, Sizes, neighborhood
from foveal.engines.common.once import once_differentiable
from foveal.patterns import Neighborhood
from foveal.patterns.base import Extent

_LAYOUT = "[batch, heads, *grid, head_dim] with one to three axes is needed"

# Elements of gathered keys that are held at once.
_CHUNK = 1 << 24


def na_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_keys: Tensor | None = None,
    is_causal: Flags = False,
    rpb: Tensor | None = None,
    *,
    stride: Sizes = 1,
) -> Tensor:
    """attn[.., i, s] = q_i . k_j + rpb[h, offset of j from i], j the s-th key of the window of i.

    Keys are listed row by row, lowest coordinates first; a causal window that the border cuts has its
    keys first and -inf after them.  Nothing is scaled: scale the query.

    Shapes: query, key [batch, heads, *grid, D], one to three axes; additional_keys [batch, heads, n, D];
    rpb [heads, 2 kernel_size - 1 per axis]; returns [batch, heads, *grid, prod(kernel_size) + n], the
    additional keys last.
    Cost: memory of the result, and of one chunk of gathered keys; gradients of all four tensors.
    """
    grid = _grid(query, key)
    if rpb is not None and (rpb.dim() != 1 + len(grid) or len(rpb) != query.shape[1]):
        needed = f"[{query.shape[1]} heads, one size for each of {len(grid)} axes] is needed"
        raise ShapeError("rpb", list(rpb.shape), needed)
    if additional_keys is not None:
        sizes = (*query.shape[:2], -1, query.shape[-1])
        need_shape("additional_keys", additional_keys, sizes, like=query)
    window = neighborhood(len(grid), kernel_size, stride, dilation, is_causal)
    index, exists = _window(window, grid, query.device)
    q = query.flatten(2, -2)
    attn: Tensor = _Products.apply(q, key.flatten(2, -2), index)  # type: ignore[no-untyped-call]
    if rpb is not None:
        attn = attn + _table_entries(rpb, window, grid).to(attn.dtype)
    attn = attn.masked_fill(~exists, -torch.inf)
    if additional_keys is not None:
        attn = torch.cat([attn, q @ additional_keys.transpose(-2, -1)], dim=-1)
    weights: Tensor = attn.unflatten(2, grid)
    return weights


def na_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_values: Tensor | None = None,
    is_causal: Flags = False,
    *,
    stride: Sizes = 1,
) -> Tensor:
    """o_i = sum_s attn[.., i, s] v_j, j the s-th key of the window of i, then the additional values.

    Shapes: attn as `na_qk` returns it, after a softmax; value [batch, heads, *grid, D];
    additional_values [batch, heads, n, D]; returns [batch, heads, *grid, D].
    """
    need_tensors(attn=attn, value=value)
    if not 4 <= value.dim() <= 6:
        raise ShapeError("value", list(value.shape), _LAYOUT)
    grid = tuple(value.shape[2:-1])
    if additional_values is not None:
        sizes = (*value.shape[:2], -1, value.shape[-1])
        need_shape("additional_values", additional_values, sizes, like=value)
    window = neighborhood(len(grid), kernel_size, stride, dilation, is_causal)
    index, exists = _window(window, grid, value.device)
    slots = index.shape[1]
    beside = 0 if additional_values is None else additional_values.shape[-2]
    if attn.shape != (*value.shape[:-1], slots + beside):
        raise ShapeError(
            "attn", list(attn.shape), f"{list(value.shape[:-1])} and {slots} + {beside} weights"
        )
    weights = attn.to(value.dtype).flatten(2, -2)
    near = weights[..., :slots].masked_fill(~exists, 0.0)
    o: Tensor = _Mixture.apply(near, value.flatten(2, -2), index)  # type: ignore[no-untyped-call]
    if additional_values is not None:
        o = o + weights[..., slots:] @ additional_values
    on_grid: Tensor = o.unflatten(2, grid)
    return on_grid


def _grid(query: Tensor, key: Tensor) -> tuple[int, ...]:
    need_tensors(query=query, key=key)
    if not 4 <= query.dim() <= 6 or query.shape != key.shape:
        got = f"{list(query.shape)} and key {list(key.shape)}"
        raise ShapeError("query", got, f"{_LAYOUT} for both")
    need_dtype(query, key=key)
    return tuple(query.shape[2:-1])


def _window(
    window: Neighborhood, grid: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    window.validate(Extent(grid, grid))
    index, exists = _kept_window(window, grid)
    return index.to(device), exists.to(device)


@kept(8)
def _kept_window(window: Neighborhood, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return window.keys(grid)


def _table_entries(rpb: Tensor, window: Neighborhood, grid: tuple[int, ...]) -> Tensor:
    """rpb at the offset of every slot of every window.  [heads, L, slots]"""
    extent = Extent(grid, grid)
    index, exists = _kept_window(window, grid)
    steps = window.offsets(extent.q_positions()[:, None], index, extent)
    entry = torch.zeros((), dtype=torch.int64)
    for size, step in zip(rpb.shape[1:], steps, strict=True):
        reach = int(step[exists].abs().max())
        if size < 2 * reach + 1:
            raise ShapeError("rpb", list(rpb.shape), f"{2 * reach + 1} entries on each axis")
        entry = entry * size + (step + size // 2).clamp(0, size - 1)
    return rpb.flatten(1)[:, entry.to(rpb.device)]


def _chunks(index: Tensor, x: Tensor) -> list[slice]:
    """Queries whose gathered keys are held at once."""
    per_query = math.prod(x.shape[:2]) * index.shape[1] * x.shape[-1]
    count = max(1, _CHUNK // max(per_query, 1))
    return [slice(start, start + count) for start in range(0, len(index), count)]


def _dot(q: Tensor, k: Tensor, index: Tensor) -> Tensor:
    """out[b, h, i, s] = q[b, h, i] . k[b, h, index[i, s]]"""
    out = q.new_empty(*q.shape[:3], index.shape[1])
    for rows in _chunks(index, k):
        near = k[:, :, index[rows]]  # [B, H, rows, slots, D]
        out[:, :, rows] = (near @ q[:, :, rows, :, None]).squeeze(-1)
    return out


def _mix(weights: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """out[b, h, i] = sum_s weights[b, h, i, s] v[b, h, index[i, s]]"""
    out = v.new_empty(*weights.shape[:3], v.shape[-1])
    for rows in _chunks(index, v):
        out[:, :, rows] = (weights[:, :, rows, None] @ v[:, :, index[rows]]).squeeze(-2)
    return out


def _scatter(weights: Tensor, q: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """out[b, h, index[i, s]] += weights[b, h, i, s] q[b, h, i], summed in float32 at least."""
    wide = torch.promote_types(like.dtype, torch.float32)
    out = torch.zeros(like.shape, dtype=wide, device=like.device)
    for rows in _chunks(index, q):
        parts = weights[:, :, rows, :, None].to(wide) * q[:, :, rows, None].to(wide)
        out.index_add_(2, index[rows].flatten(), parts.flatten(2, 3))
    return out.to(like.dtype)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, index)
        return _dot(q, k, index)

    @staticmethod
    @once_differentiable("unfused", instead="fv.attend by 'reference' has")
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, index = ctx.saved_tensors
        return _mix(d, k, index), _scatter(d, q, index, k), None


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weights, v, index)
        return _mix(weights, v, index)

    @staticmethod
    @once_differentiable("unfused", instead="fv.attend by 'reference' has")
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, v, index = ctx.saved_tensors
        return _dot(d, v, index), _scatter(weights, d, index, v), None


def _ranked(
    operator: Callable[..., Tensor], axes: int, name: str, before: str | None = None
) -> Callable[..., Tensor]:
    """The operator for grids of `axes` axes, under the name that NATTEN gave it."""

    def ranked(first: Tensor, second: Tensor, *args: Any, **options: Any) -> Tensor:
        need_tensors(value=second)
        if second.dim() != axes + 3:
            raise ShapeError("value", list(second.shape), f"a grid of {axes} axes, heads first")
        return operator(first, second, *args, **options)

    ranked.__name__ = ranked.__qualname__ = name
    says = (
        f"`{operator.__name__}`" if before is None else f"`{before}` with its arguments until 0.14,"
    )
    ranked.__doc__ = f"{says} on a grid of {axes} axes."
    return ranked


na1d_qk = _ranked(na_qk, 1, "na1d_qk")
na2d_qk = _ranked(na_qk, 2, "na2d_qk")
na3d_qk = _ranked(na_qk, 3, "na3d_qk")
na1d_av = _ranked(na_av, 1, "na1d_av")
na2d_av = _ranked(na_av, 2, "na2d_av")
na3d_av = _ranked(na_av, 3, "na3d_av")


def _qk(query: Tensor, key: Tensor, kernel_size: Sizes, dilation: Sizes) -> Tensor:
    return na_qk(query, key, kernel_size, dilation)


def _qkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Sizes, dilation: Sizes
) -> Tensor:
    return na_qk(query, key, kernel_size, dilation, rpb=rpb)


def _av(attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes) -> Tensor:
    return na_av(attn, value, kernel_size, dilation)


natten1dqk = _ranked(_qk, 1, "natten1dqk", "na_qk")
natten2dqk = _ranked(_qk, 2, "natten2dqk", "na_qk")
natten3dqk = _ranked(_qk, 3, "natten3dqk", "na_qk")
natten1dqkrpb = _ranked(_qkrpb, 1, "natten1dqkrpb", "na_qk")
natten2dqkrpb = _ranked(_qkrpb, 2, "natten2dqkrpb", "na_qk")
natten3dqkrpb = _ranked(_qkrpb, 3, "natten3dqkrpb", "na_qk")
natten1dav = _ranked(_av, 1, "natten1dav", "na_av")
natten2dav = _ranked(_av, 2, "natten2dav", "na_av")
natten3dav = _ranked(_av, 3, "natten3dav", "na_av")
