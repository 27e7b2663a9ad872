# mypy: ignore-errors
"""A kernel that starts before the one in front of it has ended (NVIDIA, compute capability 9.0 and later)."""

from __future__ import annotations

import importlib.util

import triton

if importlib.util.find_spec("triton.language.extra.cuda") is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:  # builds for AMD alone: never called there

    @triton.jit
    def gdc_launch_dependents():
        pass

    @triton.jit
    def gdc_wait():
        pass
