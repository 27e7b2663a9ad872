"""NATTEN's operators: neighborhood attention in one to three dimensions, plain attention, merging."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._attend import attend
from foveal._errors import PackingError, ShapeError, UnknownNameError
from foveal.compat.natten.ignored import ignore, implementation_of
from foveal.compose.context import attend_with_context
from foveal.compose.merge import merge
from foveal.patterns import Causal, Dense, Neighborhood
from foveal.scores import Softmax

Sizes = int | Sequence[int]
Flags = bool | Sequence[bool] | None
Operator = Callable[..., Any]


def _neighborhood(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if (additional_keys is None) != (additional_values is None):
        raise ShapeError("additional_keys", "one of two", "both keys and values, or none of them")
    ignore(
        {
            "q_tile_shape": q_tile_shape,
            "kv_tile_shape": kv_tile_shape,
            "backward_q_tile_shape": backward_q_tile_shape,
            "backward_kv_tile_shape": backward_kv_tile_shape,
            "backward_kv_splits": backward_kv_splits,
            "backward_use_pt_reduction": backward_use_pt_reduction,
            "run_persistent_kernel": run_persistent_kernel,
            "kernel_schedule": kernel_schedule,
            "torch_compile": torch_compile,
        }
    )
    for name in attention_kwargs or {}:
        if name not in _OF_ATTENTION:
            raise UnknownNameError("attention_kwargs", name, _OF_ATTENTION)
    implementation = implementation_of(backend)
    window = neighborhood(query.dim() - 3, kernel_size, stride, dilation, is_causal)
    score = Softmax(scale)
    options: dict[str, Any] = {"return_lse": return_lse, "implementation": implementation}
    found: Tensor | tuple[Tensor, Tensor]
    if additional_keys is None or additional_values is None:
        found = attend(query, key, value, window, score, **options)
    else:
        found = attend_with_context(
            query, key, value, additional_keys, additional_values, window, score, **options
        )
    return found


# What `attention_kwargs` may hold; all of it steers kernels.
_OF_ATTENTION = (
    "backend",
    "q_tile_size",
    "kv_tile_size",
    "backward_q_tile_size",
    "backward_kv_tile_size",
    "backward_kv_splits",
    "backward_use_pt_reduction",
    "run_persistent_kernel",
    "kernel_schedule",
    "torch_compile",
)


def neighborhood(
    axes: int, kernel_size: Sizes, stride: Sizes, dilation: Sizes, is_causal: Flags
) -> Neighborhood:
    """The pattern that NATTEN's arguments describe on a grid of `axes` axes."""
    given = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    window, step, gap = (_per_axis(axes, name, sizes) for name, sizes in given.items())
    causal = _per_axis(axes, "is_causal", False if is_causal is None else is_causal)
    return Neighborhood(window, step, gap, causal)


def _per_axis(axes: int, name: str, value: int | Sequence[int]) -> tuple[Any, ...]:
    if isinstance(value, int):
        return (value,) * axes
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != axes:
        raise ShapeError(name, repr(value), f"one number, or one for each of {axes} axes is needed")
    return tuple(value)


def _ranked(axes: int) -> Operator:
    """The operator for grids of `axes` axes."""
    grid = ("X", "X, Y", "X, Y, Z")[axes - 1]

    def operator(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        need_tensors(query=query, key=key, value=value)
        if query.dim() != axes + 3:
            raise ShapeError(
                "query", list(query.shape), f"[batch, {grid}, heads, head_dim] is needed"
            )
        return _neighborhood(query, key, value, *args, **options)

    operator.__name__ = operator.__qualname__ = f"na{axes}d"
    operator.__doc__ = f"""Neighborhood attention on a grid [{grid}], with NATTEN's arguments.

    na{axes}d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None,
    additional_keys=None, additional_values=None, ..., return_lse=False)

    Shapes: query [batch, {grid}, heads, head_dim], key and value [batch, {grid}, heads_kv, .] with
    heads_kv a divisor of heads; additional_keys and additional_values [batch, n, heads_kv, .], seen by
    every query.  Returns [batch, {grid}, heads, head_dim_v] and, with return_lse, the natural
    log-sum-exp [batch, {grid}, heads].
    Options: kernel_size, stride, dilation, is_causal as `Neighborhood` has window, stride, dilation
    and causal, with border "shift"; backend names an implementation of foveal.
    Limits: 1 <= stride <= kernel_size, kernel_size * dilation <= length, on every axis.
    """
    operator.__signature__ = inspect.signature(_neighborhood)  # type: ignore[attr-defined]
    return operator


na1d: Operator = _ranked(1)
na2d: Operator = _ranked(2)
na3d: Operator = _ranked(3)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to every key, or up to itself, or inside packed sequences.

    Shapes: query [batch, L, heads, D], key and value [batch, Lk, heads_kv, .]; packed sequences have
    batch 1 and are cut by seqlens_Q and seqlens_KV [sequences] or by their cumulative sums.
    Limits: packed queries and keys share their cuts, and causal attention has L = Lk; anything else
    raises.  The maximum lengths are accepted and not needed.
    """
    ignore(
        {
            "q_tile_size": q_tile_size,
            "kv_tile_size": kv_tile_size,
            "backward_q_tile_size": backward_q_tile_size,
            "backward_kv_tile_size": backward_kv_tile_size,
            "backward_kv_splits": backward_kv_splits,
            "backward_use_pt_reduction": backward_use_pt_reduction,
            "run_persistent_kernel": run_persistent_kernel,
            "kernel_schedule": kernel_schedule,
            "torch_compile": torch_compile,
        }
    )
    need_tensors(query=query, key=key, value=value)
    if query.dim() != 4:
        raise ShapeError("query", list(query.shape), "[batch, L, heads, head_dim] is needed")
    if is_causal and query.shape[1] != key.shape[1]:
        raise ShapeError("key", list(key.shape), f"causal attention needs {query.shape[1]} keys")
    cuts = _cuts(seqlens_Q, cumulative_seqlen_Q), _cuts(seqlens_KV, cumulative_seqlen_KV)
    if (cuts[0] is None) != (cuts[1] is None) or (
        cuts[0] is not None and cuts[1] is not None and not torch.equal(cuts[0], cuts[1])
    ):
        raise PackingError("seqlens_KV", "other sequences", "those of the queries are needed")
    o, lse = attend(
        query,
        key,
        value,
        Causal() if is_causal else Dense(),
        Softmax(scale),
        cu_seqlens=cuts[0],
        return_lse=True,
        implementation=implementation_of(backend),
    )
    return (o, lse) if return_lse else o


def _cuts(lengths: Tensor | None, cumulative: Tensor | None) -> Tensor | None:
    if lengths is None:
        return cumulative
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of the same queries over several key sets as if those had been one.

    Shapes: outputs [batch, L, heads, D] each, lse_tensors [batch, L, heads] each (or on a grid), at
    least two; returns the merged output and lse.
    Gradients flow through outputs and lses as they are, so both options mean nothing here.
    """
    if len(outputs) < 2:
        raise ShapeError("outputs", f"{len(outputs)} tensors", "at least two are needed")
    ignore({"use_autograd_fix": use_autograd_fix})
    return merge(outputs, lse_tensors)
