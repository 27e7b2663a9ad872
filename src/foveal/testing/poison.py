"""Memory that shows when it is read before it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic as _deterministic

# Its settings are properties of the module itself, which type checkers do not see.
_settings: Any = _deterministic


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fills every uninitialised allocation: NaN for floating dtypes, else the largest integer.

    Covers `torch.empty` and all its relatives (`new_empty`, `empty_like`, `empty_strided`, the new
    part of `resize_`), also inside PyTorch's own operators.  Turns on PyTorch's deterministic
    algorithms (warnings only) while it lasts and restores all settings afterwards.
    Limits: memory that foreign kernels allocate themselves is not seen.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    _settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _settings.fill_uninitialized_memory = filled
