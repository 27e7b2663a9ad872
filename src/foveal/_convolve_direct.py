"""Calls of `convolve` that one of the CPU's implementations answers as they are.

On a CPU a small convolution takes a twentieth of a millisecond, and the way to it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from foveal._recent import Recent
from foveal.engines.convolution import cpu, library
from foveal.engines.convolution.problem import Convolution

DIRECT: Recent[Callable[..., Tensor] | Literal[False]] = Recent(512)
"""By what their plan depends on; False for calls that take the whole way."""
_PLAIN = Tensor, Parameter
_DIRECT: dict[str, Any] = {"torch": library, "cpu": cpu}


def direct_key(
    x: Any, filter: Any, bias: Any, options: tuple[Any, ...], implementation: str | None
) -> Hashable:
    """What the plan of a call with one filter on a CPU depends on; None where the options are unusual."""
    dilation, padding, causal, channels_first = options
    if type(x) not in _PLAIN or type(filter) not in _PLAIN or not (x.is_cpu and filter.is_cpu):
        return None
    if type(dilation) is not int or not (padding is None or type(padding) is int):
        return None
    if causal is not False or type(channels_first) is not bool:
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return None  # they read the calls that are made: the usual ones
    own = None
    if bias is not None:
        if type(bias) not in _PLAIN or not bias.is_cpu:
            return None
        own = bias.shape, bias.dtype
    grad = torch.is_grad_enabled() and (x.requires_grad or filter.requires_grad)
    kinds = x.dtype, filter.dtype, dilation, padding, channels_first, implementation, grad
    return x.shape, filter.shape, own, kinds


def keep_direct(key: Hashable, problem: Convolution, name: str, filter: torch.Size) -> None:
    """Keeps what answers all calls of this key: after one that ended well."""
    module = _DIRECT.get(name) if filter[0] == problem.channels and not problem.per_sample else None
    call = None if module is None else module.direct(problem)
    DIRECT.put(key, call or False)
