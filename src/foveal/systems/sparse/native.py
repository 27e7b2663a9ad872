"""Native sparse attention, under the names of its model and of its schedule by key blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.compose.native_sparse import SparseBranches, native_sparse
from foveal.layers.native_sparse import NativeSparseAttention
from foveal.patterns import Causal, Sliding
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.sparse.shapes import qkv_shapes


def _one_branch(draw: Draw, n: int, length: int) -> Tensor:
    gates = torch.zeros(2, length, 4, 3, dtype=torch.float64)
    gates[..., n] = 1.0
    return gates


def _all_blocks(draw: Draw) -> Claim:
    length = draw.integer(5, 12)
    gates = _one_branch(draw, 1, length)
    branches = SparseBranches(4, 2, 4, best=8, window=3)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: native_sparse(q, k, v, gates, branches=branches),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _single_tokens(draw: Draw) -> Claim:
    length = draw.integer(5, 12)
    branches = SparseBranches(1, 1, 1, best=16, window=length)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: native_sparse(q, k, v, branches=branches),
        lambda q, k, v: 3 * attend(q, k, v, Causal()),
    )


def _window_alone(draw: Draw) -> Claim:
    length, window = draw.integer(5, 12), draw.integer(1, 4)
    gates = _one_branch(draw, 2, length)
    branches = SparseBranches(4, 2, 4, best=3, window=window)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=4),
        lambda q, k, v: native_sparse(q, k, v, gates, branches=branches),
        lambda q, k, v: attend(q, k, v, Sliding(window - 1)),
    )


def _decode(draw: Draw) -> Claim:
    length = draw.integer(9, 20)
    branches = SparseBranches(4, 2, 4, best=3, window=3)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: native_sparse(q, k, v, branches=branches)[:, -1:],
        lambda q, k, v: native_sparse(q[:, -1:], k, v, branches=branches),
    )


def _documents(draw: Draw) -> Claim:
    first, second = draw.integer(1, 9), draw.integer(1, 9)
    cuts = torch.tensor([0, first, first + second])
    branches = SparseBranches(4, 2, 4, best=3, window=3)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (
            native_sparse(q[:, a:b], k[:, a:b], v[:, a:b], branches=branches)
            for a, b in ((0, first), (first, first + second))
        )
        return torch.cat(list(parts), dim=1)

    return Claim(
        draw.qkv((first + second,), heads=4, kv_heads=2),
        lambda q, k, v: native_sparse(q, k, v, branches=branches, cu_seqlens=cuts),
        alone,
    )


_IDENTITIES = (
    Identity("all_blocks", "The chosen branch with all blocks listed is causal.", _all_blocks),
    Identity(
        "single_tokens",
        "With windows and blocks of one token, all of them, each branch is causal attention.",
        _single_tokens,
    ),
    Identity("window_alone", "Gates (0, 0, 1) leave the sliding window.", _window_alone),
    Identity("decode", "The last query on its own gives the last row.", _decode),
    Identity("documents", "Packed documents are attended each on its own.", _documents),
)

NSA = System(
    name="nsa",
    title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
    year=2025,
    paper="Yuan et al. (DeepSeek-AI, PKU); arXiv 2502.11089",
    kind="operator",
    family="sparse",
    summary="Gated sum of attention to compressed keys, to the blocks that they score highest, and "
    "to a window; one list per token and key head, for every number of query heads per key head.",
    op=native_sparse,
    layer=NativeSparseAttention,
    identities=_IDENTITIES,
    operands=qkv_shapes,
    reference_shapes=(
        {"grid": (16384,), "heads": 64, "kv_heads": 4, "head_dim": 128},
        {"grid": (65536,), "heads": 16, "kv_heads": 8, "head_dim": 128},
    ),
)

FLASH_SPARSE_ATTENTION = System(
    name="flash_sparse_attention",
    title="Flash Sparse Attention: An Alternative Efficient Implementation of Native Sparse "
    "Attention Kernel",
    year=2025,
    paper="Yan, Jiang, Yuan (HKUST Relaxed-System-Lab); arXiv 2508.18224",
    kind="operator",
    family="sparse",
    summary="Native sparse attention for few query heads per key head: the loop over key blocks "
    "outside, tokens that list a block gathered, one partial result per listing.",
    op=native_sparse,
    layer=NativeSparseAttention,
    identities=_IDENTITIES,
    operands=qkv_shapes,
    reference_shapes=(
        {"grid": (65536,), "heads": 32, "kv_heads": 8, "head_dim": 128},
        {"grid": (32768,), "heads": 16, "kv_heads": 8, "head_dim": 128},
    ),
)
