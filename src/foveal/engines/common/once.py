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
    name: str, instead: str | None = "'reference' has"
) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """For the backward of an autograd function of the implementation `name`: a second derivative raises.

    PyTorch's own mark of that name leaves the results without a path to the inputs: where gradients of some
    tensors are asked for (torch.autograd.grad), its error is passed by and a part is missing in silence.
    Here the results depend on all that was saved for the backward and on what came to it.
    instead: what has one, for the error; None where nothing has.
    """
    sentence = "it has no second derivative" + (f"; {instead}" if instead else "")

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def run(ctx: Any, *gradients: Tensor | None) -> Gradients:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            read = _Read(ctx)
            with torch.no_grad():
                found = backward(read, *gradients)
            seen = [x for x in (*read.saved_tensors, *gradients) if x is not None]
            results = [x for x in found if x is not None]
            marked = iter(_Marked.apply(name, sentence, len(results), *results, *seen))
            return tuple(None if x is None else next(marked) for x in found)

        return run

    return decorate


class _Read:
    """What a backward was given, with the tensors saved for it: a checkpoint gives them once."""

    def __init__(self, given: Any) -> None:
        self._given, self.saved_tensors = given, given.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)


class _Marked(torch.autograd.Function):
    """The first `count` tensors as they are, as a function of all of them that has no derivative."""

    @staticmethod
    def forward(
        ctx: Any, name: str, sentence: str, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.name, ctx.sentence = name, sentence
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        raise RefusedError(ctx.name, ctx.sentence)
