"""The GPU edition of the local mix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveal.engines.common.current import on
from foveal.engines.common.once import once_differentiable
from foveal.engines.convolution.mix_problem import LocalMix
from foveal.engines.convolution.triton import interpreted, refuses_device

_LARGEST_DIM = 512
_MOST_ELEMENTS = 2**31


def refuses(problem: LocalMix) -> str | None:
    refusal = refuses_device(problem.device, problem.dtype)
    if refusal is not None:
        return refusal
    if problem.head_dim > _LARGEST_DIM:
        return f"its tiles hold a head_dim of at most {_LARGEST_DIM}; here is {problem.head_dim}"
    if problem.batch * problem.heads >= 2**16:
        return f"it launches at most 65,535 heads; here are {problem.batch * problem.heads:,}"
    sample = math.prod(problem.grid) * problem.heads * max(problem.head_dim, problem.taps)
    if sample >= _MOST_ELEMENTS:
        return f"a sample of {sample:,} elements does not fit its 32-bit offsets"
    return None


def caveat(problem: LocalMix) -> str | None:
    """Why the plan passes by this edition although it runs when it is named."""
    if problem.device == "cpu" and interpreted():
        return "on CPU tensors Triton's interpreter is for tests"
    return None


def mix(problem: LocalMix, weights: Tensor, v: Tensor) -> Tensor:
    """[B, *grid, H, D]"""
    o: Tensor = _Mix.apply(weights, v, problem)  # type: ignore[no-untyped-call]
    return o


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, problem: LocalMix) -> Tensor:
        from foveal.engines.convolution.launch_mix import launch_mix

        v = v if v.stride(-1) == 1 else v.contiguous()
        ctx.save_for_backward(weights, v)
        ctx.problem = problem
        with on(v.device):
            return launch_mix(problem, weights, v)

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from foveal.engines.convolution.launch_mix import launch_mix_values, launch_mix_weights

        weights, v = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        dweights = dv = None
        if ctx.needs_input_grad[0]:
            dweights = launch_mix_weights(ctx.problem, do, v)
        if ctx.needs_input_grad[1]:
            dv = launch_mix_values(ctx.problem, weights, do)
        return dweights, dv, None
