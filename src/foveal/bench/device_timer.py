"""Times a tile kernel with given sizes on a device, after comparing its results with the definition."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from foveal._attend import attend
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Causal
from foveal.patterns.neighborhood import Neighborhood
from foveal.testing.agreement import check_attend
from foveal.tuning import tile
from foveal.tuning.config import Config
from foveal.tuning.search import Kernel

_HEADS = 16
_SAMPLES = 5
_PROBLEMS: tuple[tuple[Pattern, tuple[int, ...], tuple[int, ...]], ...] = (
    (Causal(), (4096,), (512,)),
    (Neighborhood((17, 17)), (96, 96), (24, 24)),
)
"""Patterns, the grids on which they are timed, and those on which they are checked."""


class DeviceTimer:
    """Measures kernels on one CUDA device: geometric mean over a causal and a local problem."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(64 << 20, dtype=torch.uint8, device=device)
        self.failures: dict[tuple[str, Config], str] = {}
        """Why a kernel does not run with some sizes."""

    def __call__(self, kernel: Kernel, config: Config) -> float:
        """Seconds, of forward or backward as a whole; inf where these sizes fail or disagree."""
        try:
            with tile.forced(kernel.stage, config), torch.cuda.device(self.device):
                times = [self._problem(kernel, *problem) for problem in _PROBLEMS]
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise what they like for sizes that do not fit
            self.failures[kernel.name, config] = f"{type(error).__name__}: {error}"[:300]
            return float("inf")
        return statistics.geometric_mean(times)

    def _problem(
        self, kernel: Kernel, pattern: Pattern, grid: tuple[int, ...], small: tuple[int, ...]
    ) -> float:
        q, k, v = self._inputs(kernel, small)
        check_attend(q, k, v, pattern, implementation="triton")
        q, k, v = (x.requires_grad_() for x in self._inputs(kernel, grid))
        o = attend(q, k, v, pattern, implementation="triton")
        do = torch.randn_like(o)

        def call() -> None:
            if kernel.stage == tile.FORWARD:
                attend(q.detach(), k.detach(), v.detach(), pattern, implementation="triton")
            else:
                torch.autograd.grad(o, (q, k, v), do, retain_graph=True)

        call()
        return statistics.median(self._sample(call) for _ in range(_SAMPLES))

    def _inputs(self, kernel: Kernel, grid: tuple[int, ...]) -> list[torch.Tensor]:
        source = torch.Generator(self.device).manual_seed(0)
        shape = (1, *grid, _HEADS, kernel.dim)
        return [
            torch.randn(shape, device=self.device, generator=source).to(kernel.dtype) for _ in "qkv"
        ]

    def _sample(self, call: Callable[[], None]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
