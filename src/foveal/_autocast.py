"""Autocast stops at a verb."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_own_dtypes(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function without autocast, which would round the float32 sums between its steps.

    What autocast made of the arguments stays: the function computes in their dtypes.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # A compiled operator runs without autocast.
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(_device(args, kwargs)):
            return function(*args, **kwargs)
        with torch.autocast(_device(args, kwargs), enabled=False):
            return function(*args, **kwargs)

    return run


def _device(args: tuple[object, ...], kwargs: dict[str, object]) -> str:
    """The kind of device of the first tensor; a kind without autocast counts as the CPU."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return "cpu" if value.is_meta else value.device.type
    return "cpu"
