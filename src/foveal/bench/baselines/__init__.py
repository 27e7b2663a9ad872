"""Someone else's fast code, one adapter per peer, imported on use."""

from __future__ import annotations

from collections.abc import Sequence

from foveal._errors import UnknownNameError
from foveal.bench.baselines.base import Competitor, Prepared
from foveal.bench.baselines.flex import Flex
from foveal.bench.baselines.fused import Cudnn, Flash2
from foveal.bench.baselines.local_attention import LocalAttention
from foveal.bench.baselines.natten import Natten
from foveal.bench.baselines.packed import FlashAttention, FlashInfer, Varlen
from foveal.bench.baselines.sdpa import DenseSdpa, MaskedSdpa

BASELINES: tuple[Competitor, ...] = (
    MaskedSdpa(),
    DenseSdpa(),
    Cudnn(),
    Flash2(),
    Varlen(),
    Flex(),
    FlashAttention(),
    FlashInfer(),
    Natten(),
    LocalAttention(),
)

__all__ = ["BASELINES", "Competitor", "Prepared", "baselines"]


def baselines(names: Sequence[str]) -> tuple[Competitor, ...]:
    """The adapters of these names, in this order."""
    known = {each.name: each for each in BASELINES}
    for name in names:
        if name not in known:
            raise UnknownNameError("baseline", name, tuple(known))
    return tuple(known[name] for name in names)
