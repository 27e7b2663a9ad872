"""Whether a CUDA graph is being captured: nothing may wait for the device then, and memory is the graph's."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing(x: Tensor) -> bool:
    """Whether the current stream of the device of x is captured."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
