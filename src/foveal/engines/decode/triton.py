"""The GPU edition of the decode engine, written in Triton: NVIDIA sm_80 and later, AMD gfx942."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from foveal.caches.view import View
from foveal.engines.decode.problem import DecodeProblem, Terms
from foveal.engines.decode.row_kinds import misfit

_LARGEST_DIM = 512
_MOST_UNITS = 16384


def refuses(problem: DecodeProblem, terms: Terms) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if problem.device != "cuda" and not (problem.device == "cpu" and interpreted):
        return f"it runs on CUDA tensors; these are on {problem.device}"
    if not installed():
        return "the package triton is not installed"
    if problem.dtype == torch.float64:
        return "GPU matrix units have no float64 edition here; use float32 or less"
    if problem.dtype == torch.bfloat16 and problem.device == "cpu":
        return "Triton's interpreter computes bfloat16 products wrongly"
    if problem.needs_grad:
        return "it gives no gradient to q"
    if max(problem.head_dim, problem.value_dim) > _LARGEST_DIM and not problem.latent:
        return f"its tiles hold dimensions of at most {_LARGEST_DIM}"
    if not {"fp8", "int8", "int4"}.isdisjoint(problem.kinds):
        channels = 4 if "int4" in problem.kinds else 2
        if any(n % channels for n in problem.dims):
            return f"quantised rows are read in words of {channels} channels"
    if problem.units > _MOST_UNITS:
        return f"its plan holds {_MOST_UNITS} lengths; the cache has {problem.units}"
    if problem.gaps and terms.left is not None and problem.Lq > 1:
        return "a window over evicted tokens has its own edge for each of several queries"
    if "channels" in problem.kinds:
        reason = _refuses_channels(problem, terms)
        if reason is not None:
            return reason
    if problem.device == "cuda" and torch.version.hip is None:
        capability = _capability()
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or later; this device has {capability}"
    return None


def _refuses_channels(problem: DecodeProblem, terms: Terms) -> str | None:
    """Why parts whose entries name their channels, for which there is one kernel, are refused."""
    if problem.Lq > 1 and terms.left is not None:
        return "a window over entries with channels serves one query at a time"
    if terms.causal and problem.Lq > problem.behind + 1:
        return f"all queries must see all pruned tokens; {problem.Lq - 1} newer ones are needed"
    if problem.device != "cuda":
        return "entries with channels are decoded on NVIDIA GPUs"
    return misfit("channels", problem.dims, problem.dtype)


@functools.lru_cache(maxsize=1)
def installed() -> bool:
    """Whether there is a Triton to compile kernels with."""
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=1)
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def decode(view: View, terms: Terms, q: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] in the dtype of q and lse [B, Lq, Hq]."""
    from foveal.engines.decode.launch import decode_on_device

    return decode_on_device(view, terms, q)
