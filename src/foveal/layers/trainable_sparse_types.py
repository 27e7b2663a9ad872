"""Keys that live for ever, until the next one that does, or for a window: types that are learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import SelectionError, ShapeError
from foveal._judged import judged, need_shape
from foveal.engines.common.once import once_differentiable
from foveal.layers.heads import Projections
from foveal.patterns import Causal, Pattern
from foveal.patterns.lifetimes import Lifetimes

GLOBAL, LOCAL, SLIDING = 0, 1, 2


def type_ends(types: Tensor, window: int) -> Tensor:
    """The last position that sees each key, for every type it might have.  int64 [B, H, 3, L]

    A global key is seen to the end, a local one up to the next global key after it (itself included), a
    sliding one for `window` tokens after it.
    Shapes: types [B, L, H, 3], of which the largest entry counts.
    """
    length = types.shape[1]
    place = torch.arange(length, device=types.device)
    is_global = (types.argmax(-1) == GLOBAL).transpose(1, 2)  # [B, H, L]
    at = torch.where(is_global, place, length)
    following = torch.nn.functional.pad(at[..., 1:], (0, 1), value=length)
    coming = following.flip(-1).cummin(-1).values.flip(-1)
    always = torch.full_like(coming, length)
    return torch.stack([always, coming, (place + window).expand_as(coming)], dim=2)


@judged
def nats_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    types: Tensor,
    *,
    window: int = 256,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention in which key j is seen by t as long as its type lets it live.

    M_tj = (j <= t) and (global_j or local_j and t <= e_j or sliding_j and t <= j + window), e_j the next
    global key after j.
    Shapes: q [B, L, Hq, D], k and v [B, L, Hkv, .], types [B, L, H, 3] (global, local, sliding; H is 1 or
    Hkv), of which the largest entry counts.
    Gradient of the types: that of the mask, dM_tj = P_tj (dP_tj - delta_t) with the weights P of plain causal
    attention, dP_tj = dO_t . v_j and delta_t = dO_t . o_t, summed over the t for which the type lets j live.
    Cost: the pairs that live; three backward passes over values for the gradient of the types.
    Equals: all global is causal attention, all sliding a window of window + 1 keys.
    Paper: Neural Attention Search (2502.13251).
    """
    if types.dim() != 4 or types.shape[2] not in (1, k.shape[2]):
        needed = f"[{k.shape[0]}, {k.shape[1]}, 1 or {k.shape[2]}, 3] is needed"
        raise ShapeError("types", list(types.shape), needed)
    need_shape("types", types, (k.shape[0], k.shape[1], types.shape[2], 3), like=k)
    if window < 0 or q.shape[1] != k.shape[1]:
        raise SelectionError("window", window, "at least 0, and as many queries as keys")
    ends = type_ends(types, window)
    chosen = types.argmax(-1).transpose(1, 2)[:, :, None]
    pattern = Lifetimes(ends.gather(2, chosen)[:, :, 0])
    o, lse = attend(q, k, v, pattern, return_lse=True, implementation=implementation)
    if not types.requires_grad:
        return o
    found: Tensor = _TypesOf.apply(o, types, q, k, v, lse, ends, implementation)  # type: ignore[no-untyped-call]
    return found


class _TypesOf(torch.autograd.Function):
    """o as it is, with the gradient of the types beside its own."""

    @staticmethod
    def forward(
        ctx: Any, o: Tensor, types: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
        ends: Tensor, implementation: str | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(o, q, k, v, ends)
        ctx.heads, ctx.implementation, ctx.dtype = types.shape[2], implementation, types.dtype
        return o.view_as(o)

    @staticmethod
    @once_differentiable("types", instead=None)
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        o, q, k, v, ends = ctx.saved_tensors
        run = ctx.implementation
        # P^T [dO, -delta] is the gradient of values with one more channel, of 1.
        one = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        sent = torch.cat([do, -(do * o).sum(-1, keepdim=True)], dim=-1)
        lse = attend(q, k, v, Causal(), return_lse=True, implementation=run)[1]
        parts = []
        for kind in (GLOBAL, LOCAL, SLIDING):
            pattern: Pattern = Causal() if kind == GLOBAL else Lifetimes(ends[:, :, kind])
            with torch.enable_grad():
                values = one.detach().requires_grad_()
                again, own = attend(q, k, values, pattern, return_lse=True, implementation=run)
                weight = torch.exp(own.detach() - lse)[..., None].to(sent.dtype)
                (got,) = torch.autograd.grad(again, values, sent * weight)
            parts.append((got * one).sum(-1))
        types = torch.stack(parts, dim=-1)  # [B, L, Hkv, 3]
        types = types if ctx.heads > 1 else types.sum(2, keepdim=True)
        return do, types.to(ctx.dtype), None, None, None, None, None, None


class NeuralAttentionSearch(Projections):
    """`nats_attention` between projections, with a type per token and head by a linear map of the input.

    In training the types are drawn by Gumbel noise at `temperature`, forward their largest entry, backward
    their softmax; otherwise the largest logit counts.
    Shapes: x and y [B, L, dim].
    """

    def __init__(
        self, dim: int, heads: int, *, window: int = 256, temperature: float = 1.0
    ) -> None:
        super().__init__(dim, heads)
        self.window, self.temperature = window, temperature
        self.types = nn.Linear(dim, 3 * heads)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.types(x).unflatten(-1, (self.heads, 3))
        if self.training:
            types = torch.nn.functional.gumbel_softmax(logits, self.temperature, hard=True)
        else:
            hard = torch.nn.functional.one_hot(logits.argmax(-1), 3).to(logits.dtype)
            soft = logits.softmax(-1)
            types = hard + soft - soft.detach()
        return self.join(nats_attention(*self.split(x), types, window=self.window))
