"""Results that are found once and kept for every later call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

_P = ParamSpec("_P")
_R = TypeVar("_R")
_FAKE = torch._C._TorchDispatchModeKey.FAKE


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Outside of torch.inference_mode, of a default device and of torch.func, whose tensors end with them."""
    with contextlib.ExitStack() as outside:
        outside.enter_context(torch.inference_mode(False))
        outside.enter_context(torch.device("cpu"))
        if torch._C._are_functorch_transforms_active():
            outside.enter_context(temporarily_clear_interpreter_stack())
        yield


def kept(maxsize: int) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Keeps results, with the tensors in them, for arguments seen before.

    They serve every later call, so none is of the mode of the first: they are made in `lasting`.  Where a
    compiler looks on (torch.compile, torch.export, FakeTensorMode), tensors are its own: nothing is kept
    then, and nothing kept is given.  What is made while a CUDA graph is captured holds nothing before the
    graph is replayed: it is the graph's, and not kept either.  Modes that only watch, like that which records
    launches, see what every later call sees: kept results.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.lru_cache(maxsize=maxsize)
        def made(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with lasting():
                result = function(*args, **kwargs)
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise _CapturedError(result)
            return result

        @functools.wraps(function)
        def found(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None:
                return function(*args, **kwargs)
            try:
                return made(*args, **kwargs)  # type: ignore[arg-type]
            except _CapturedError as own:
                result: _R = own.result
                return result

        return found

    return decorate


class _CapturedError(Exception):
    """Takes a result past the cache."""

    def __init__(self, result: Any) -> None:
        self.result = result
