"""The portable tile kernels of the library, with their sizes as parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from foveal._attend import attend
from foveal.patterns import Causal, Dense, Neighborhood, Pattern, Sliding
from foveal.tuning import tile
from foveal.tuning.config import Config

PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "causal": Causal(),
    "sliding": Sliding(255),
    "neighborhood": Neighborhood((9, 9)),
}


def build(
    *,
    pattern: str,
    stage: str = tile.FORWARD,
    reference: bool = False,
    queries: int = 64,
    keys: int = 64,
    warps: int = 4,
    stages: int = 2,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attend` with a pattern: the reference, or the portable GPU edition with these sizes.

    On the CPU that edition runs in Triton's interpreter, where TRITON_INTERPRET=1 is set before Triton is
    imported.
    """
    seen = PATTERNS[pattern]
    if reference:
        return lambda q, k, v: attend(q, k, v, seen, implementation="reference")
    config = Config(queries, keys, warps, stages)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with tile.forced(stage, config):
            o: Tensor = attend(q, k, v, seen, implementation="triton")
        return o

    return run
