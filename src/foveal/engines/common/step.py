"""A call as one step of autograd, with gradients of its own, that torch.func reads too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from foveal._errors import RefusedError

Gradients = Sequence[Tensor | None]


class Step(Protocol):
    """A call without its tensors."""

    @property
    def name(self) -> str:
        """Of the implementation."""

    @property
    def forward(self) -> Callable[..., Tensor]:
        """The result of the tensors."""

    def backward(
        self, tensors: Sequence[Tensor], above: Tensor, needed: Sequence[bool]
    ) -> Gradients:
        """Gradients of the tensors, at least where `needed`, of that of the result."""


def recorded(step: Step, *tensors: Tensor) -> Tensor:
    """The result of a step, once differentiable."""
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(step, *tensors)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Recorded.apply(step, *tensors)  # type: ignore[no-any-return]
    return step.forward(*tensors)


def _backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
    step, tensors, needed = ctx.step, ctx.saved_tensors, tuple(ctx.needs_input_grad[1:])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = _Backward.apply(step, needed, above, *tensors)
    else:
        found = step.backward(tensors, above, needed)
    return None, *(d if n else None for d, n in zip(found, needed, strict=True))


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, *tensors: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*tensors)
        return step.forward(*tensors)

    backward = staticmethod(_backward)


class _Transformed(torch.autograd.Function):
    """The same for torch.func; a plain call would pay for what it asks."""

    @staticmethod
    def forward(step: Step, *tensors: Tensor) -> Tensor:
        return step.forward(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.step = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    backward = staticmethod(_backward)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], step: Step, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        each = _each(lambda *own: recorded(step, *own), info.batch_size, in_dims[1:], tensors)
        return torch.stack(each), 0


class _Backward(torch.autograd.Function):
    """The backward where its own graph is asked for: torch.func asks always, second derivatives do too."""

    @staticmethod
    def forward(
        step: Step, needed: tuple[bool, ...], above: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        found = step.backward(tensors, above, needed)
        return tuple(
            torch.zeros_like(x) if d is None else d for d, x in zip(found, tensors, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        raise RefusedError(ctx.name, "it has no second derivative; 'reference' has")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], step: Step, needed: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def apply(*own: Tensor) -> tuple[Tensor, ...]:
            return _Backward.apply(step, needed, *own)  # type: ignore[no-any-return]

        each = _each(apply, info.batch_size, in_dims[2:], tensors)
        results = tuple(torch.stack(found) for found in zip(*each, strict=True))
        return results, (0,) * len(results)


def _each(
    apply: Callable[..., Any],
    count: int,
    in_dims: tuple[int | None, ...],
    tensors: tuple[Tensor, ...],
) -> list[Any]:
    """What `apply` gives for each entry that tensors hold on the axes in_dims (None: one for all)."""
    axes = list(zip(tensors, in_dims, strict=True))
    return [
        apply(*(x if dim is None else x.select(dim, entry) for x, dim in axes))
        for entry in range(count)
    ]
