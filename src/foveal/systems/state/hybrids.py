"""Models that join linear attention with attention to chosen blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveal._attend import attend
from foveal._judged import judged_alone
from foveal.layers import HybridStack
from foveal.patterns import Blocks, Causal
from foveal.selectors import Compressed, Forced, TopK, select
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.state.recurrences import lightning


@judged_alone
def sala(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    sparse: bool = False,
    kept: int = 96,
    block: int = 64,
    tile: int = 64,
    local: int = 32,
    length: int = 32,
    stride: int = 16,
    implementation: str | None = None,
) -> Tensor:
    """o [B, L, H, Dv] of a linear layer, Lightning Attention with log_decay [H], or of a `sparse` one.

    A sparse layer attends to `kept` blocks of keys per tile of queries: the first, the `local` ones behind
    the tile, and those with the largest probabilities of compressed keys.
    Shapes: q [B, L, H, D]; k and v [B, L, Hkv, .], where only a sparse layer has Hkv < H.
    Options: length and stride as for `Compressed`.
    """
    if not sparse:
        return lightning(q, k, v, log_decay, implementation=implementation)
    selector = Compressed(length, stride, "max")
    budget = Forced(TopK(kept), sinks=1, locals=local)
    chosen = select(q, k, selector, budget, q_block=tile, kv_block=block)
    o: Tensor = attend(q, k, v, Blocks(chosen) & Causal(), implementation=implementation)
    return o


_SMALL: dict[str, Any] = {"block": 2, "tile": 3, "local": 1, "length": 2, "stride": 1}


def _linear(draw: Draw) -> Claim:
    q, k, v = draw.qkv((draw.integer(5, 12),), heads=4)
    decay = -draw.normal(4).abs()
    return Claim((q, k, v, decay), sala, lightning)


def _all_blocks(draw: Draw) -> Claim:
    length = draw.integer(5, 12)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: sala(q, k, v, sparse=True, kept=length, **_SMALL),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


SALA = System(
    name="sala",
    title="MiniCPM-SALA: Hybridizing Sparse and Linear Attention for Efficient Long-Context Modeling",
    year=2026,
    paper="OpenBMB; arXiv 2602.11761. The layer: as `sparse_linear_stack` makes it",
    kind="model",
    summary="Three layers of Lightning Attention for one that attends to chosen blocks of keys.",
    op=sala,
    layer=HybridStack,
    identities=(
        Identity("linear", "A linear layer is Lightning Attention.", _linear),
        Identity("all_blocks", "A sparse layer that keeps all blocks is causal.", _all_blocks),
    ),
    reference_shapes=({"grid": (32768,), "heads": 32, "kv_heads": 32, "head_dim": 128},),
    family="state",
    engine="state",
)
