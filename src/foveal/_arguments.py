"""What every verb and every value asks of an argument before it looks inside."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal._errors import DeviceError, DtypeError


def need_tensors(**arguments: object) -> None:
    """Raises DtypeError for an argument that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise DtypeError(name, _kind(value), "a torch.Tensor is needed")


def tensors_or_none(**arguments: object) -> None:
    """The same of arguments that may be left out."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise DtypeError(name, _kind(value), "a torch.Tensor or None is needed")


def named_device(device: str | torch.device) -> str:
    """The kind of device that stands for tensors on the meta device: "cpu" or "cuda"."""
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise DeviceError("device", repr(device), "'cpu' or 'cuda' is needed")
    return kind


def finite(value: object) -> bool:
    """Whether it is one finite number, of Python or of numpy; tensors are none, as no gradient would flow."""
    if not isinstance(value, int | float):
        if isinstance(value, str | Tensor) or not hasattr(value, "__float__"):
            return False
        value = float(value)
    return math.isfinite(value)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" if value is not None else "None"
