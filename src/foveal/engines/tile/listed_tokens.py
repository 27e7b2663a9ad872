"""Attention whose tokens list their own key blocks: one step of autograd on every device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveal.engines.common.current import on
from foveal.engines.common.once import once_differentiable
from foveal.engines.tile import cpu_tokens
from foveal.engines.tile.token_lists import TokenLists

LN2 = math.log(2)


class ListedTokens(torch.autograd.Function):
    """o [B, Lq, Hq, Dv] and natural lse [B, Hq, Lq] of q [B, Lq, Hq, D], k and v [B, Lk, Hkv, .]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float
    ) -> tuple[Tensor, Tensor]:
        o, lse = _forward(q, k, v, lists, scale)
        ctx.lists, ctx.scale = lists, scale
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable("cpu")
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        if dlse is not None:
            dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
        return *_backward((q, k, v, o, lse), ctx.lists, ctx.scale, do, dlse), None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float
) -> tuple[Tensor, Tensor]:
    if _has_kernel(q, k, v, lists):
        from foveal.engines.tile import token_attend

        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        with on(q.device):
            o, lse = token_attend.forward(q, k, v, lists, scale)
        return o, lse * LN2
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o, lse = cpu_tokens.forward(q.to(wide), k.to(wide), v.to(wide), lists, scale)
    return o.to(q.dtype), lse


def _backward(
    tensors: tuple[Tensor, ...], lists: TokenLists, scale: float, do: Tensor, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    q, k, v, o, lse = tensors
    if _has_kernel(q, k, v, lists):
        from foveal.engines.tile import token_attend

        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return token_attend.backward((q, k, v, o, lse / LN2), lists, scale, do, dlse)
    wide = lse.dtype
    found = cpu_tokens.backward(
        (*(x.to(wide) for x in (q, k, v, o)), lse), lists, scale, do.to(wide), dlse
    )
    return tuple(d.to(x.dtype) for d, x in zip(found, (q, k, v), strict=True))


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, lists: TokenLists) -> bool:
    """What no kernel was checked for runs in plain PyTorch."""
    if not q.is_cuda:
        return False
    from foveal.engines.tile.token_attend import unchecked

    groups = q.shape[2] // k.shape[2]
    return unchecked(q.dtype, q.shape[3], v.shape[3], groups, lists.block) is None


def takes_gates(q: Tensor, k: Tensor, v: Tensor, lists: TokenLists) -> bool:
    """Whether `attend_gated` has a kernel."""
    if not _has_kernel(q, k, v, lists):
        return False
    from foveal.engines.tile import token_attend

    return token_attend.takes_gates(q, k, v, lists)


def attend_gated(
    q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float,
    gates: Tensor, others: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    """gates[..., 1] times o of `attend_lists` plus gates 0 and 2 times the others [B, Lq, Hq, Dv].

    One pass without gradients, where it `takes_gates`; gates [B, Lq, Hq or 1, 3].
    """
    from foveal.engines.tile import token_attend

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    gated = token_attend.Gated(gates.contiguous(), tuple(x.contiguous() for x in others))
    with on(q.device):
        return token_attend.forward_gated(q, k, v, lists, scale, gated)


def attend_lists(
    q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq]; softmax of scale q k over the keys that a token lists."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = ListedTokens.apply(q, k, v, lists, scale)  # type: ignore[no-untyped-call]
    return o, lse.transpose(1, 2)
