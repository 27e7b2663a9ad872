"""What a device can do at best, measured in place: a large product and a large copy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FEWEST, _MOST, _SECONDS = 6, 40, 0.2
"""Runs of each kind, and how long they may take on the CPU after the fewest."""


@dataclass(frozen=True)
class Ceilings:
    """flops_per_second of a square matrix product, bytes_per_second of a copy (read plus written)."""

    flops_per_second: float
    bytes_per_second: float


@functools.lru_cache(maxsize=16)
def ceilings(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Ceilings:
    """Measures this device once per process; about half a second.

    The best of several runs, with the current number of threads; of more on the CPU, where others may
    be at work.  Lower precisions on the CPU are
    measured in float32, the precision in which the tiled edition computes.
    """
    cuda = device.startswith("cuda")
    if not cuda and dtype != torch.float64:
        dtype = torch.float32
    size = 8192 if cuda else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.empty(1 << (30 if cuda else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _best_seconds(lambda: torch.mm(a, a), cuda)
    copy = _best_seconds(lambda: target.copy_(source), cuda)
    return Ceilings(2 * size**3 / product, 2 * source.numel() / copy)


def _best_seconds(work: Callable[[], object], cuda: bool) -> float:
    best, begun = float("inf"), time.perf_counter()
    for run in range(_MOST):
        if run >= _FEWEST and (cuda or time.perf_counter() - begun > _SECONDS):
            break
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
