"""Memory that shows when it is read before it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fills every uninitialised allocation: NaN for floating dtypes, the largest integer for others.

    Covers `torch.empty` and all its relatives (`new_empty`, `empty_like`, `empty_strided`, the new
    part of `resize_`), also inside PyTorch's own operators.  Turns on PyTorch's deterministic
    algorithms (warnings only) while it lasts and restores all settings afterwards.
    Limits: memory that foreign kernels allocate themselves is not seen.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = filled
