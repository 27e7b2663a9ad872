"""Keys with a lifetime of their own, and cells of a predicted map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.layers.trainable_sparse_maps import SparseLinearMapAttention, sea_attention
from foveal.layers.trainable_sparse_types import NeuralAttentionSearch, nats_attention
from foveal.patterns import Causal, Sliding
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.sparse.shapes import qkv_shapes


def _types(length: int, kind: int) -> Tensor:
    types = torch.zeros(2, length, 1, 3, dtype=torch.float64)
    types[..., kind] = 1.0
    return types


def _all_global(draw: Draw) -> Claim:
    length = draw.integer(4, 12)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: nats_attention(q, k, v, _types(length, 0), window=2),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _all_sliding(draw: Draw) -> Claim:
    length = draw.integer(4, 12)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: nats_attention(q, k, v, _types(length, 2), window=2),
        lambda q, k, v: attend(q, k, v, Sliding(2)),
    )


def _all_local(draw: Draw) -> Claim:
    """Without a global key after them local ones live to the end."""
    length = draw.integer(4, 12)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: nats_attention(q, k, v, _types(length, 1), window=2),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _typed(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    q, k, v = qkv_shapes(shape)
    return q, k, v, (1, k[1], k[2], 3)


NATS = System(
    name="nats",
    title="Neural Attention Search",
    year=2025,
    paper="Deng, Hutter et al. (Freiburg); arXiv 2502.13251",
    kind="operator",
    family="sparse",
    summary="Every key is global, local up to the next global one, or sliding; the types are learned with "
    "the weights of plain attention.",
    op=nats_attention,
    layer=NeuralAttentionSearch,
    identities=(
        Identity("all_global", "Global keys are causal attention.", _all_global),
        Identity("all_sliding", "Sliding keys are a window.", _all_sliding),
        Identity("all_local", "Local keys alone are causal attention.", _all_local),
    ),
    operands=_typed,
    reference_shapes=({"grid": (4096,), "heads": 8, "kv_heads": 8, "head_dim": 64},),
)


def _every_key(draw: Draw) -> Claim:
    length, causal = draw.integer(4, 12), bool(draw.integer(0, 1))
    shares = torch.softmax(draw.normal(2, 4, length, 3), -1)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, Causal()) if causal else attend(q, k, v)

    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: sea_attention(q, k, v, shares, keys=length, causal=causal),
        plain,
    )


def _mean_alone(draw: Draw) -> Claim:
    length = draw.integer(4, 12)
    shares = torch.softmax(draw.normal(2, 2, length, 3), -1)
    none = torch.zeros(2, length, 2, dtype=torch.float64)

    def mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.cumsum(1) / torch.arange(1, length + 1)[:, None, None]

    return Claim(
        draw.qkv((length,)),
        lambda q, k, v: sea_attention(q, k, v, shares, none, none, keys=2),
        mean,
    )


def _mapped(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    q, k, v = qkv_shapes(shape)
    return q, k, v, (1, q[2], q[1], 128)


SEA = System(
    name="sea",
    title="SEA: Sparse Linear Attention with Estimated Attention Mask",
    year=2024,
    paper="Lee et al. (KAIST, DeepAuto), ICLR 2024; arXiv 2310.01777",
    kind="operator",
    family="sparse",
    summary="A small map, predicted by linear attention and a convolution, names the keys of every query, "
    "over all heads together; the running mean of the values stands beside them.",
    op=sea_attention,
    layer=SparseLinearMapAttention,
    identities=(
        Identity("every_key", "All cells are dense or causal attention.", _every_key),
        Identity("mean_alone", "beta = 0 is the running mean of the values.", _mean_alone),
    ),
    operands=_mapped,
    reference_shapes=({"grid": (4096,), "heads": 8, "kv_heads": 8, "head_dim": 64},),
)
