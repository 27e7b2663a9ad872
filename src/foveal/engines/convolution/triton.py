"""The GPU edition of the convolution engine, written in Triton: NVIDIA sm_80 and later, AMD gfx942."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Protocol

import torch
from torch import Tensor

from foveal.engines.common.current import on
from foveal.engines.common.once import once_differentiable
from foveal.engines.convolution.problem import Convolution, turned

_MOST_ELEMENTS = 2**31


def refuses(problem: Convolution) -> str | None:
    refusal = refuses_device(problem.device, problem.dtype)
    if refusal is not None:
        return refusal
    sample = problem.channels * max(_product(problem.grid), _product(problem.out_grid))
    if sample >= _MOST_ELEMENTS:
        return f"a sample of {sample:,} elements does not fit its 32-bit offsets"
    return None


def refuses_device(device: str, dtype: torch.dtype) -> str | None:
    """Why no kernel of this engine runs on such tensors."""
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"it runs on CUDA tensors; these are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype == torch.float64:
        return "its sums are in float32; float64 is left to the others"
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or later; this device has {capability}"
    return None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def caveat(problem: Convolution) -> str | None:
    """Why the plan passes by this edition although it runs when it is named."""
    return caveat_of_device(problem)


def caveat_of_device(problem: Convolution) -> str | None:
    if problem.device == "cpu":
        return "on CPU tensors Triton's interpreter is for tests"
    return None


def depthwise(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C], stored as x is: channels last or first."""
    return recorded(problem, x, weight, bias, Direct())


class Machine(Protocol):
    """Kernels that compute a convolution and the gradient of its filter."""

    def ready(self, x: Tensor) -> Tensor:
        """x [B, *grid, C] in the layout that the kernels read."""
        ...

    def forward(
        self, problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """y [B, *out_grid, C] in any layout, of an x that is ready."""
        ...

    def filter_gradient(self, problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
        """The gradient of the filter in float32, shaped as it, of x and dy that are ready."""
        ...


class Direct:
    """Forward and gradient of the filter by sums of single products."""

    def ready(self, x: Tensor) -> Tensor:
        return last(x)

    def forward(
        self, problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        from foveal.engines.convolution.launch import launch_direct

        return launch_direct(problem, x, weight, bias)

    def filter_gradient(self, problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
        from foveal.engines.convolution.launch import launch_direct_filter

        return launch_direct_filter(problem, x, dy)


def recorded(
    problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, machine: Machine
) -> Tensor:
    """The convolution by `machine` as a node of the graph."""
    y: Tensor = _Depthwise.apply(x, weight, bias, problem, machine)  # type: ignore[no-untyped-call]
    return y


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Convolution,
        machine: Machine,
    ) -> Tensor:
        ctx.problem, ctx.machine = problem, machine
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        with on(x.device):
            return stored_as(problem, machine.forward(problem, machine.ready(x), weight, bias))

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        problem, machine = ctx.problem, ctx.machine
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(tuple(range(dy.dim() - 1)), dtype=torch.float32).to(ctx.bias_dtype)
        dy = machine.ready(dy)
        if ctx.needs_input_grad[0]:
            axes = len(problem.grid)
            flipped = weight.flip(tuple(range(-axes, 0)))
            dx = stored_as(problem, machine.forward(turned(problem), dy, flipped, None))
        if ctx.needs_input_grad[1]:
            found = machine.filter_gradient(problem, machine.ready(x), dy)
            dweight = found.reshape(weight.shape).to(weight.dtype)
        return dx, dweight, dbias, None, None


def last(x: Tensor) -> Tensor:
    """x [B, *grid, C] with unit stride along C."""
    if x.stride(-1) == 1 and 0 not in x.stride():
        return x
    from foveal.engines.convolution.launch_layout import swapped

    first = x.movedim(-1, 1)
    if first.is_contiguous() and first.dim() > 2:
        rows = first.flatten(2)  # its tokens are the channels of the change back
        return swapped(rows).view(len(x), *x.shape[1:-1], x.shape[-1])
    return x.contiguous()


def stored_as(problem: Convolution, y: Tensor) -> Tensor:
    """y [B, *grid, C] in the layout of the problem."""
    if not problem.channels_first:
        return last(y)
    first = y.movedim(-1, 1)
    if first.is_contiguous():
        return y
    from foveal.engines.convolution.launch_layout import swapped

    return swapped(y).movedim(1, -1)
