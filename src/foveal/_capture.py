"""Who else looks at a call: a CUDA graph that is captured, a compiler, a transform of torch.func."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_FAKE = torch._C._TorchDispatchModeKey.FAKE


def capturing(x: Tensor) -> bool:
    """Whether the current stream of the device of x is captured: nothing may wait for the device then, and
    memory is the graph's."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def traced() -> bool:
    """Whether a compiler or torch.func reads the call: no branch may depend on values then, and results
    cannot be written into memory made before."""
    if torch.compiler.is_compiling():
        return True
    functional: bool = torch._C._are_functorch_transforms_active()
    return functional or torch._C._get_dispatch_mode(_FAKE) is not None


def as_one(x: Tensor) -> bool:
    """Whether a compiler reads a call with x, for which one operator can stand in its graph.

    torch.func, inside of the graph, would not know that operator.
    """
    if not (torch.compiler.is_compiling() or isinstance(x, FakeTensor)):
        return False
    return not torch._C._are_functorch_transforms_active()


def any_open(*tensors: Tensor | None) -> bool:
    """Whether the compiler that reads a call has left a size of its tensors open."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    sizes = [size for x in tensors if x is not None for size in x.shape]
    return not all(has_static_value(size) for size in sizes)
