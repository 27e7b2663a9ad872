"""Backward passes without a derivative of their own say so wherever one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal._errors import RefusedError

Gradients = tuple[Tensor | None, ...]


def once_differentiable(
    name: str,
) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """For the backward of an autograd function of the implementation `name`: a second derivative raises.

    PyTorch's own mark of that name leaves the results without a path to the inputs: where gradients of some
    tensors are asked for (torch.autograd.grad), its error is passed by and a part is missing in silence.
    Here the results depend on all that was saved for the backward and on what came to it.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def run(ctx: Any, *gradients: Tensor | None) -> Gradients:
            with torch.no_grad():
                found = backward(ctx, *gradients)
            if not torch.is_grad_enabled():
                return found
            seen = [x for x in (*ctx.saved_tensors, *gradients) if x is not None]
            results = [x for x in found if x is not None]
            marked = iter(_Marked.apply(name, len(results), *results, *seen))
            return tuple(None if x is None else next(marked) for x in found)

        return run

    return decorate


class _Marked(torch.autograd.Function):
    """The first `count` tensors as they are, as a function of all of them that has no derivative."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        raise RefusedError(ctx.name, "it has no second derivative; 'reference' has")
