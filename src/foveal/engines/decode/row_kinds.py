"""What the kernel of rows.cu can decode: rows of one length, 32 tokens in every warp."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from foveal.caches.view import View
from foveal.engines.common import nvrtc
from foveal.engines.decode.problem import Terms

KINDS = {"int4": 0, "channels": 1}
"""Kinds of rows, by their numbers in the source."""

# Dimensions are multiples of the first number up to the second.
_DIMS = {"int4": (128, 256), "channels": (16, 256)}
# More queries x query heads of a key head go through larger products in the Triton edition.
_MOST_ROWS = 16


def misfit(kind: str, dims: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why rows of a kind with these dimensions are not for the kernel here, or None."""
    step, most = _DIMS[kind]
    if any(n % step or n > most for n in dims):
        return f"rows that are {kind} have dimensions of multiples of {step} up to {most} here"
    if dtype != torch.bfloat16 and (kind == "int4" or dtype != torch.float16):
        return f"rows that are {kind} are not decoded in {dtype} here"
    if not _nvidia():
        return f"rows that are {kind} need an NVIDIA GPU of compute capability 8.0 or later"
    return nvrtc.missing()


def serves(view: View, terms: Terms, q: Tensor) -> bool:
    """Whether the kernel decodes a view: it alone takes rows with channels, and int4 where it can."""
    kind, Lq = view.keys.codec.kind, q.shape[1]
    if kind == "channels":
        return True
    if kind not in KINDS or not q.is_cuda or view.values is None:
        return False
    alike = view.lengths.shape[1] == view.page_table.shape[1] == 1
    bare = view.positions is None and view.bias is None and terms.key_bias is None
    walked = view.page_size % 16 == 0 or view.page_table.shape[2] == 1
    walked = walked and view.steps[2] == 1
    together = Lq == 1 or (terms.left is None and not (terms.causal and Lq - 1 > view.behind))
    few = Lq * q.shape[2] // view.kv_heads <= _MOST_ROWS
    dims = q.shape[3], view.value_dim
    fits = alike and bare and walked and together and few
    return fits and misfit(kind, dims, q.dtype) is None


@functools.lru_cache(maxsize=1)
def _nvidia() -> bool:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)
