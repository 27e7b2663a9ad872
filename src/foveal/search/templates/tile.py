"""The portable tile kernels of the library, with their sizes as parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

from torch import Tensor

from foveal._attend import attend
from foveal.patterns import Causal, Dense, Neighborhood, Pattern, Sliding
from foveal.search.compiling import Launch
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


def launches(
    inputs: Sequence[Tensor],
    *,
    architecture: str,
    pattern: str,
    stage: str = tile.FORWARD,
    queries: int = 64,
    keys: int = 64,
    warps: int = 4,
    stages: int = 2,
) -> list[Launch]:
    """What `attend` launches for one stage on a class of devices; nothing runs."""
    config = Config(queries, keys, warps, stages)
    leaves = [x.requires_grad_(stage != tile.FORWARD) for x in inputs]
    with tile.forced(stage, config), _listed(architecture) as found:
        o = attend(leaves[0], leaves[1], leaves[2], PATTERNS[pattern], implementation="triton")
        if stage != tile.FORWARD:
            o.sum().backward()
    return [launch for launch in found if launch.kernel.__name__ == f"tile_attend_{stage}"]


@contextlib.contextmanager
def _listed(architecture: str) -> Iterator[list[Launch]]:
    """Launches are listed and not run; tensors of the CPU stand for those of a device."""
    from foveal.engines.tile import launches as engine
    from foveal.engines.tile import triton as edition

    found: list[Launch] = []

    def listen(launch: engine.Launch) -> None:
        found.append(Launch(launch.kernel, launch.arguments, launch.options))

    with (
        mock.patch.object(engine.Launch, "__call__", listen),
        mock.patch.object(edition, "_interpreted", return_value=True),
        mock.patch.object(tile, "architecture", return_value=architecture),
    ):
        yield found
