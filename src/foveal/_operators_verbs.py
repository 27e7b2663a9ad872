"""Verbs other than `attend` as operators of PyTorch, for compilers: one node where a call would be unrolled.

An operator runs the verb's own way when the graph runs, with the sizes of that call: its plan, its loops over
chunks and its kernels are nothing that a compiler sees.  Its gradients are those of the call, made once more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal._operators import _LIBRARY, _built, _Call, _spelled

_CALL = "Tensor[] tensors, str text, SymInt[]? integers, float[]? floats"


class Body(NamedTuple):
    """What stands behind an operator: the results of a call's arguments, and what they look like.

    outline: tensors of the shapes and dtypes of the results, with anything inside.
    """

    run: Callable[..., Sequence[Tensor]]
    outline: Callable[..., Sequence[Tensor]]


_MODULES = {
    name: f"foveal._{name}" for name in ("convolve", "decode", "fftconv", "local_mix", "scan")
}
"""The module of each verb, which has its body under the name OPERATOR."""


def as_operator(verb: str, *arguments: Any) -> list[Tensor]:
    """The results of a verb's body as one node of the graph."""
    call = _spelled(arguments, None)
    found: list[Tensor] = getattr(torch.ops.foveal, verb)(*call[1:])
    return found


def _body(verb: str) -> Body:
    found: Body = importlib.import_module(_MODULES[verb]).OPERATOR
    return found


def _arguments(tensors: Sequence[Tensor], rest: Iterable[Any]) -> Any:
    return _built(_Call(None, tensors, *rest))


def _alone(found: Iterable[Tensor], inputs: Iterable[Tensor]) -> list[Tensor]:
    """Contiguous tensors each in memory of its own, as results of operators have to be."""
    taken = {x.untyped_storage()._cdata for x in inputs}
    results = []
    for x in found:
        own = x.contiguous()
        if own.untyped_storage()._cdata in taken:
            own = own.clone()
        taken.add(own.untyped_storage()._cdata)
        results.append(own)
    return results


def _leaves(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [x.detach().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]


def _define(verb: str) -> None:
    def forward(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        return _alone(_body(verb).run(*_arguments(tensors, rest)), tensors)

    def outline(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        return list(_body(verb).outline(*_arguments(tensors, rest)))

    def gradients(
        above: Sequence[Tensor], needed: Sequence[bool], tensors: Sequence[Tensor], *rest: Any
    ) -> list[Tensor]:
        """Of all tensors; an empty tensor where none is needed."""
        with torch.enable_grad():
            leaves = _leaves(tensors, needed)
            results = _body(verb).run(*_arguments(leaves, rest))
        pairs = [(y, d) for y, d in zip(results, above, strict=True) if y.requires_grad]
        wanted = [x for x in leaves if x.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], wanted, [d for _, d in pairs],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        own = iter(_alone(found, (*tensors, *above)))
        return [next(own) if n else x.new_empty(0) for x, n in zip(tensors, needed, strict=True)]

    def gradient_outline(
        above: Sequence[Tensor], needed: Sequence[bool], tensors: Sequence[Tensor], *rest: Any
    ) -> list[Tensor]:
        return [x.new_empty(x.shape if n else 0) for x, n in zip(tensors, needed, strict=True)]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        tensors, *ctx.rest = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, above: Sequence[Tensor]) -> tuple[Any, ...]:
        tensors = list(ctx.saved_tensors)
        needed = [x.requires_grad for x in tensors]
        found = getattr(torch.ops.foveal, verb + "_backward")(above, needed, tensors, *ctx.rest)
        return [d if n else None for d, n in zip(found, needed, strict=True)], None, None, None

    name, reverse = f"foveal::{verb}", f"foveal::{verb}_backward"
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(f"{verb}({_CALL}) -> Tensor[]", tags=tags)
    _LIBRARY.define(
        f"{verb}_backward(Tensor[] above, bool[] needed, {_CALL}) -> Tensor[]", tags=tags
    )
    _LIBRARY.impl(verb, forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(verb + "_backward", gradients, "CompositeExplicitAutograd")
    # Gradients are found by autograd where the operator runs.
    _LIBRARY.impl(verb + "_backward", torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(name, outline, lib=_LIBRARY)
    torch.library.register_fake(reverse, gradient_outline, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=keep, lib=_LIBRARY)


for _verb in _MODULES:
    _define(_verb)
