"""What the solves of a call reached."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Solution:
    """Per tile of queries: iterations run, and the largest residual of its rows over its limit.

    Filled while a forward runs; a tile whose ratio is above 1 ended at max_iterations.
    """

    iterations: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def add(self, iterations: int, residual: Tensor, limit: Tensor) -> None:
        """One tile: residual norms and limits of its rows."""
        self.iterations.append(iterations)
        rows = residual.isfinite()
        ratio = (residual / limit.clamp(min=1e-300)).masked_fill(~rows | (residual == 0), 0.0)
        self.ratios.append(float(ratio.amax()) if ratio.numel() else 0.0)
