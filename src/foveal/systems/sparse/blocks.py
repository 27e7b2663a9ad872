"""Blocks that means of keys choose, and blocks that alone pass a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.layers.trainable_sparse_depth import (
    LessTokens,
    lemo_attention,
    representation_shift_tokens,
)
from foveal.layers.trainable_sparse_means import MeanBlockAttention, infllm_v2
from foveal.patterns import Causal
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.sparse.shapes import qkv_shapes


def _all_blocks(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(9, 20),), heads=4, kv_heads=2),
        lambda q, k, v: infllm_v2(
            q, k, v, blocks=5, block=4, local=2, length=4, stride=2, dense_length=0
        ),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _own_blocks(draw: Draw) -> Claim:
    """With the first and the own block alone nothing is left to choose."""
    count = draw.integer(3, 5)

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for n in range(count):
            keys = [*range(4 * (n > 0)), *range(4 * n, 4 * n + 4)]
            rows.append(attend(q[:, 4 * n : 4 * n + 4], k[:, keys], v[:, keys], Causal()))
        return torch.cat(rows, dim=1)

    return Claim(
        draw.qkv((4 * count,), heads=4, kv_heads=2),
        lambda q, k, v: infllm_v2(
            q, k, v, blocks=2, block=4, local=1, length=4, stride=2, dense_length=0
        ),
        right,
    )


INFLLM_V2 = System(
    name="infllm_v2",
    title="InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation",
    year=2025,
    paper="OpenBMB, Tsinghua; arXiv 2509.24663. The layer: the sparse one of MiniCPM-SALA",
    kind="operator",
    family="sparse",
    summary="Means of windows of keys choose blocks for every token and key head; below a length attention "
    "stays dense.",
    op=infllm_v2,
    layer=MeanBlockAttention,
    identities=(
        Identity("all_blocks", "All blocks are causal attention.", _all_blocks),
        Identity("own_blocks", "First and own block alone are those.", _own_blocks),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (16384,), "heads": 32, "kv_heads": 2, "head_dim": 128},),
)


def _scores_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return (*qkv_shapes(shape), (1, -(-shape["grid"][0] // 64)))


def _every_token(draw: Draw) -> Claim:
    length = draw.integer(5, 14)
    scores = draw.normal(2, -(-length // 4))
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: lemo_attention(q, k, v, scores, block=4, keep=1.0),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _halves(draw: Draw) -> Claim:
    """The kept blocks attend to each other as if the others were not there."""
    scores = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    tokens = [[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]]

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for n, own in enumerate(tokens):
            part = attend(q[n : n + 1, own], k[n : n + 1, own], v[n : n + 1, own], Causal())
            whole = torch.zeros(1, 16, *part.shape[2:], dtype=part.dtype)
            rows.append(whole.index_copy(1, torch.tensor(own), part))
        return torch.cat(rows)

    return Claim(
        draw.qkv((16,), heads=4, kv_heads=2),
        lambda q, k, v: lemo_attention(q, k, v, scores, block=4, keep=0.5),
        right,
    )


LEMO = System(
    name="lemo",
    title="LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning",
    year=2025,
    paper="Wang et al. (Tsinghua, HUST, Microsoft); arXiv 2501.09767",
    kind="operator",
    family="sparse",
    summary="Fine-tuning in which only the blocks of tokens that a small net finds informative pass a layer, "
    "forward and backward. How the paper eliminates inside a block and cuts segments is not established.",
    op=lemo_attention,
    layer=LessTokens,
    identities=(
        Identity("every_token", "All blocks are causal attention.", _every_token),
        Identity("halves", "Kept blocks attend among themselves, the others give 0.", _halves),
    ),
    operands=_scores_operands,
    reference_shapes=({"grid": (16384,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)


def _shift_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return ((1, *shape["grid"], shape["heads"] * shape["head_dim"]),) * 2


def _keep_all(draw: Draw) -> Claim:
    length = draw.integer(3, 12)
    inputs = draw.normal(2, length, 4), draw.normal(2, length, 4)
    return Claim(
        inputs,
        lambda before, after: representation_shift_tokens(before, after, keep=1.0),
        lambda before, after: after + 0.0 * before,
    )


def _rotation(draw: Draw) -> Claim:
    """Lengths do not change under rotations, and so does not the choice."""
    length, turn = draw.integer(3, 12), torch.linalg.qr(draw.normal(4, 4))[0]
    inputs = draw.normal(2, length, 4), draw.normal(2, length, 4)
    return Claim(
        inputs,
        lambda before, after: representation_shift_tokens(before @ turn, after @ turn, keep=0.4),
        lambda before, after: representation_shift_tokens(before, after, keep=0.4) @ turn,
    )


REPRESENTATION_SHIFT = System(
    name="representation_shift",
    title="Representation Shift: Unifying Token Compression with FlashAttention",
    year=2025,
    paper="Korea University; arXiv 2508.00367",
    kind="operator",
    family="sparse",
    summary="Drops between layers the tokens that a layer moved least; needs no attention map.",
    op=representation_shift_tokens,
    engine="torch",
    identities=(
        Identity("keep_all", "All tokens kept are the output of the layer.", _keep_all),
        Identity("rotation", "Rotations of the features do not change the choice.", _rotation),
    ),
    operands=_shift_operands,
    reference_shapes=({"grid": (4096,), "heads": 16, "kv_heads": 16, "head_dim": 64},),
)
