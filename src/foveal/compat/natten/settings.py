"""NATTEN's process-wide switches, answered with how things are here: one of them means something."""

from __future__ import annotations

import warnings

import torch

from foveal.compat.natten.ignored import IgnoredArgumentWarning


def _say(name: str, reason: str) -> None:
    warnings.warn(
        f"{name} is accepted and changes nothing here: {reason}",
        IgnoredArgumentWarning,
        stacklevel=3,
    )


def use_deterministic_algorithms(mode: bool = True, *, warn_only: bool = False) -> None:
    """PyTorch's switch of that name: with it gradients repeat bit by bit, without it some do not."""
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def are_deterministic_algorithms_enabled() -> bool:
    """Whether PyTorch's switch of that name is on."""
    return torch.are_deterministic_algorithms_enabled()


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """How gradients are summed belongs to the kernels of the plan."""
    if mode:
        _say("use_kv_parallelism_in_fused_na(True)", "sums belong to the kernels of the plan")


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """False: it cannot be asked for."""
    return False


def set_memory_usage_preference(pref: str = "default") -> None:
    """Memory follows the tensors of the call, whatever is preferred."""
    if pref != "default":
        _say(f"set_memory_usage_preference({pref!r})", "memory follows the tensors of the call")


def get_memory_usage_preference() -> str:
    """The word "default", the only preference there is."""
    return "default"
