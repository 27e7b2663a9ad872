"""Kernels are launched on the current device."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device of a call's tensors the current one where another GPU is."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
