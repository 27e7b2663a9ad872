"""Plans are made of small tensors in the memory of the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_host(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with the CPU as the default device, whatever torch.set_default_device says.

    Tensors that belong elsewhere name their device.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run
