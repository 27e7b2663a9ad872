# mypy: ignore-errors
"""A kernel that starts before the one in front of it has ended (NVIDIA, compute capability 9.0 and later)."""

from __future__ import annotations

import functools
import importlib.util

import torch
import triton

__all__ = ["gdc_launch_dependents", "gdc_wait", "starts_early"]

if importlib.util.find_spec("triton.language.extra.cuda") is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:  # builds for AMD alone: never called there

    @triton.jit
    def gdc_launch_dependents():
        pass

    @triton.jit
    def gdc_wait():
        pass


@functools.lru_cache(maxsize=8)
def starts_early(device: torch.device) -> bool:
    """Whether a kernel can start before the one in front of it has ended (compute capability 9.0)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
