"""Operators whose arguments are judged before anything is computed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from foveal._arguments import need_tensors, tensors_or_none
from foveal._errors import DeviceError, DtypeError, ShapeError
from foveal._options import check_values
from foveal._problem import describe

P = ParamSpec("P")
R = TypeVar("R")

_ANY = -1


def judged(call: Callable[P, R], fit: bool = True) -> Callable[P, R]:
    """An operator that raises for arguments which its annotations do not allow.

    Tensors are tensors; q, k and v, where it has them, are [B, L, H, D] and fit each other; options are what
    `check_values` allows.  What only the operator knows, it says itself.
    """
    signature = inspect.signature(call)
    tensors = _annotated(signature, "Tensor")
    optional = _annotated(signature, "Tensor | None")
    options = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    attends = fit and {"q", "k", "v"} <= set(tensors)

    @functools.wraps(call)
    def operator(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            given = signature.bind(*args, **kwargs).arguments
            need_tensors(**{name: given[name] for name in tensors if name in given})
            tensors_or_none(**{name: given[name] for name in optional if name in given})
            if attends and not _autocast(given["q"]):  # there a verb brings them to one dtype
                _fit(given["q"], given["k"], given["v"])
            if not fit:
                _need_floats({name: given[name] for name in _OPERANDS & given.keys()})
            check_values(call, {name: given[name] for name in given if name in options})
        return call(*args, **kwargs)

    return operator


def judged_alone(call: Callable[P, R]) -> Callable[P, R]:
    """`judged` for an operator whose q, k and v fit each other by rules of its own."""
    return judged(call, fit=False)


def need_shape(name: str, x: Tensor, sizes: tuple[int, ...], like: Tensor) -> None:
    """Raises unless x is floating, on the device of `like`, and of these sizes (-1: any)."""
    fits = len(x.shape) == len(sizes) and all(
        wanted in (_ANY, size) for size, wanted in zip(x.shape, sizes, strict=True)
    )
    if not fits:
        needed = ", ".join("any" if size == _ANY else str(size) for size in sizes)
        raise ShapeError(name, list(x.shape), f"[{needed}] is needed")
    if not x.is_floating_point():
        raise DtypeError(name, x.dtype, "a floating dtype is needed")
    if x.device != like.device:
        raise DeviceError(name, x.device, f"the device of the others, {like.device}, is needed")


def need_dtype(like: Tensor, **others: Tensor | None) -> None:
    """Raises for a tensor of another dtype than `like`, where they are multiplied."""
    for name, x in others.items():
        if x is not None and x.dtype != like.dtype and not _autocast(like):
            raise DtypeError(name, x.dtype, f"the dtype of the others, {like.dtype}, is needed")


def need_square(q: Tensor, k: Tensor) -> None:
    """Raises unless there are as many queries as keys."""
    if q.shape[1] != k.shape[1]:
        raise ShapeError("q", list(q.shape), f"as many queries as keys, {k.shape[1]}, are needed")


def _fit(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4:
        raise ShapeError("q", list(q.shape), "[B, L, H, D] is needed")
    describe(q, k, v, False)


_OPERANDS = {"q", "k", "v", "x"}


def _need_floats(operands: dict[str, Any]) -> None:
    for name, x in operands.items():
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise DtypeError(name, x.dtype, "a floating dtype is needed")


def _autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _annotated(signature: inspect.Signature, hint: str) -> tuple[str, ...]:
    return tuple(
        p.name
        for p in signature.parameters.values()
        if _text(p.annotation) == hint and p.kind is not p.VAR_POSITIONAL
    )


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
