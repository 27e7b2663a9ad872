"""Who else looks at a call: a CUDA graph that is captured, a compiler, a transform of torch.func."""

from __future__ import annotations

import torch
from torch import Tensor

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
