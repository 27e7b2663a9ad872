"""The only validation of a call: tensors become a frozen `Problem`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import DeviceError, DtypeError, ShapeError
from foveal.patterns.base import Extent

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LAYOUT = "[B, *grid, H, D] with one to three grid axes is needed"


@dataclass(frozen=True)
class Problem:
    """Sizes, dtype, device class and wishes of one call of `attend`."""

    batch: int
    extent: Extent
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    return_lse: bool

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q_heads // self.kv_heads

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def describe(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Problem:
    """Checks q, k, v against each other and returns what they describe."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not 4 <= tensor.dim() <= 6:
            raise ShapeError(name, list(tensor.shape), _LAYOUT)
        if tensor.dtype not in _DTYPES:
            raise DtypeError(name, tensor.dtype, "float64, float32, bfloat16 or float16 is needed")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise DtypeError(name, tensor.dtype, f"the dtype of q, {q.dtype}, is needed")
        if tensor.device != q.device:
            raise DeviceError(name, tensor.device, f"the device of q, {q.device}, is needed")
    if k.dim() != q.dim():
        raise ShapeError("k", list(k.shape), f"as many axes as q, {list(q.shape)}, are needed")
    if k.shape[0] != q.shape[0]:
        raise ShapeError("k", list(k.shape), f"the batch of q, {q.shape[0]}, is needed")
    if k.shape[-1] != q.shape[-1] or q.shape[-1] == 0:
        raise ShapeError(
            "k", list(k.shape), f"the head_dim of q, {q.shape[-1]}, is needed, at least 1"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ShapeError(
            "v", list(v.shape), f"the batch, grid and heads of k, {list(k.shape)}, are needed"
        )
    q_heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise ShapeError("k", list(k.shape), f"its heads must divide the {q_heads} query heads")
    extent = Extent(tuple(q.shape[1:-2]), tuple(k.shape[1:-2]))
    return Problem(
        batch=q.shape[0],
        extent=extent,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        dtype=q.dtype,
        device=q.device.type,
        return_lse=return_lse,
    )


def element_bytes(problem: Problem) -> int:
    """Bytes of q, k, v and the output together: the least that any implementation moves."""
    q = math.prod((problem.extent.Lq, problem.q_heads, problem.head_dim + problem.value_dim))
    kv = math.prod((problem.extent.Lk, problem.kv_heads, problem.head_dim + problem.value_dim))
    return problem.batch * (q + kv) * problem.dtype.itemsize
