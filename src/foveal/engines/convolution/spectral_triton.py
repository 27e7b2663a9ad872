"""The GPU edition of the long convolution: causal sequences, real filters."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from foveal.engines.common.current import on
from foveal.engines.common.once import once_differentiable
from foveal.engines.convolution.spectral import Spectral
from foveal.engines.convolution.triton import refuses_device

_LONGEST = 2**20
_COMPARED = 2**16
_MOST_ELEMENTS = 2**31


def refuses(problem: Spectral) -> str | None:
    refusal = refuses_device(problem.device, problem.dtype)
    if refusal is not None:
        return refusal
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon; 3.6 or later is needed"
    if len(problem.grid) != 1:
        return f"it transforms sequences; the grid has {len(problem.grid)} axes"
    if not problem.causal:
        return "it computes causal convolutions, not circular ones"
    if problem.batch * problem.channels == 0:
        return "there is nothing to transform in an empty batch"
    (length,) = problem.grid
    if length > _LONGEST:
        return f"it transforms at most {_LONGEST:,} tokens; here are {length:,}"
    if 4 * length * problem.channels >= _MOST_ELEMENTS:
        return f"a spectrum of {length:,} tokens does not fit its 32-bit offsets"
    return None


def caveat(problem: Spectral) -> str | None:
    """Why the plan passes by this edition although it runs when it is named."""
    if problem.device == "cpu":
        return "on CPU tensors Triton's interpreter is for tests"
    if problem.dtype != torch.float32:
        return f"it was compared with float64 on a GPU in float32; this is {str(problem.dtype)[6:]}"
    if problem.grid[0] > _COMPARED:
        return f"it was compared with float64 on a GPU up to {_COMPARED:,} tokens"
    return None


def gated(
    problem: Spectral,
    x: Tensor,
    filter: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    skip: Tensor | None,
) -> Tensor:
    """post (filter * (pre x)) + skip x, [B, L, C] in the dtype of x."""
    taps = filter[..., : problem.grid[0]]
    y: Tensor = _Gated.apply(x, taps, pre, post, skip)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        filter: Tensor,
        pre: Tensor | None,
        post: Tensor | None,
        skip: Tensor | None,
    ) -> Tensor:
        from foveal.engines.convolution.launch_spectral import (
            Ends,
            launch_convolution,
        )

        x = x.contiguous()
        pre, post = (None if t is None else t.contiguous() for t in (pre, post))
        each = filter if filter.dim() == 3 else filter[None]
        y = torch.empty_like(x)
        plain = None
        if post is not None and ctx.needs_input_grad[3]:
            plain = torch.empty_like(x, dtype=torch.float32)
        with on(x.device):
            spectrum = launch_convolution(Ends(x, pre, y, post, plain, skip), each)
        ctx.save_for_backward(x, spectrum, pre, post, skip, plain)
        ctx.filter_shape, ctx.filter_dtype = filter.shape, filter.dtype
        return y

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from foveal.engines.convolution.launch_spectral import (
            Ends,
            filter_gradient,
            launch_filtered,
        )

        x, spectrum, pre, post, skip, plain = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = dfilter = dpre = dpost = dskip = None
        if needs[0] or needs[2]:
            before = torch.empty_like(x, dtype=torch.float32) if needs[2] else None
            dx = torch.empty_like(x)
            launch_filtered(Ends(dy, post, dx, pre, before, skip), spectrum, conjugate=True)
            dpre = None if before is None else (x * before).to(x.dtype)
        if needs[1]:
            count, each = ctx.filter_shape[-1], len(ctx.filter_shape) == 3
            found = filter_gradient(x, pre, dy, post, count, each)
            dfilter = found.view(ctx.filter_shape).to(ctx.filter_dtype)
        if plain is not None:
            dpost = (dy * plain).to(x.dtype)
        if needs[4]:
            dskip = (dy.float() * x).sum((0, 1)).to(x.dtype)
        return dx, dfilter, dpre, dpost, dskip
