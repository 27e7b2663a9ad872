"""Operators with fewer, smaller or factored projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._attend import attend
from foveal._judged import judged, need_dtype, need_shape, need_square
from foveal.layers.compressed import CompressedConvolutionalAttention, mixed
from foveal.layers.low_rank import LowRankAttention, flash_svd
from foveal.layers.shared_projection import (
    HeadEmbeddingAttention,
    SlicedAttention,
    head_embeddings,
    super_attention,
)
from foveal.patterns import Causal, Dense
from foveal.systems.base import Claim, Draw, Identity, System

FAMILY = "cache"


@judged
def cca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    filter: Tensor,
    filter_bias: Tensor,
    maps: Tensor,
    maps_bias: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Causal attention of queries and keys that two convolutions of two tokens have mixed.

    Shapes: q [B, L, Hq, D], k and v [B, L, Hkv, D], as projected; filter [2, Hq + Hkv, D], filter_bias and
    maps_bias [Hq + Hkv, D], maps [2, Hq + Hkv, D, D], temperature [Hkv].  Without positions and value shift.
    """
    both, D = q.shape[2] + k.shape[2], q.shape[3]
    for name, x, sizes in (
        ("filter", filter, (2, both, D)),
        ("filter_bias", filter_bias, (both, D)),
        ("maps", maps, (2, both, D, D)),
        ("maps_bias", maps_bias, (both, D)),
        ("temperature", temperature, (k.shape[2],)),
    ):
        need_shape(name, x, sizes, like=q)
        need_dtype(q, **{name: x})
    need_square(q, k)
    groups = q.shape[2] // k.shape[2]
    z = torch.cat([q, k], dim=2)
    y = mixed(z, filter, filter_bias, maps, maps_bias, z.new_zeros(len(z), 2, *z.shape[2:]))
    mean = (q + k.repeat_interleave(groups, dim=2)) / 2
    heads = q.shape[2]
    queries = F.normalize(y[:, :, :heads] + mean, dim=-1) * D**0.5
    keys = y[:, :, heads:] + mean.unflatten(2, (-1, groups)).mean(3)
    keys = F.normalize(keys, dim=-1) * D**0.5 * temperature[:, None]
    return attend(queries, keys, v, Causal())


def _cca_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    L, H, K, D = shape["grid"][0], shape["heads"], shape["kv_heads"], shape["head_dim"]
    both = H + K
    return (
        *((1, L, heads, D) for heads in (H, K, K)),
        (2, both, D),
        (both, D),
        (2, both, D, D),
        (both, D),
        (K,),
    )


def _plain_heads(draw: Draw) -> Claim:
    """Filters that pass the token itself: attention of unit vectors."""
    q, k, v = draw.qkv((draw.integer(2, 9),), heads=4, kv_heads=2)
    both, D = 6, q.shape[-1]
    filter = torch.stack([torch.zeros(both, D), torch.ones(both, D)]).double()
    maps = torch.stack([torch.zeros(both, D, D), torch.eye(D).expand(both, D, D)]).double()
    blank = torch.zeros(both, D).double()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mean = (q + k.repeat_interleave(2, dim=2)) / 2
        queries, keys = q + mean, k + mean.unflatten(2, (2, 2)).mean(3)
        return attend(_unit(queries), _unit(keys), v, Causal())

    one = torch.ones(2, dtype=torch.float64)
    return Claim((q, k, v), lambda q, k, v: cca(q, k, v, filter, blank, maps, blank, one), plain)


def _unit(x: Tensor) -> Tensor:
    unit: Tensor = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
    return unit


def _temperature(draw: Draw) -> Claim:
    """Temperature 0: the mean of the values so far."""
    q, k, v = draw.qkv((draw.integer(2, 9),), heads=4, kv_heads=2)
    shape = {"grid": (1,), "heads": 4, "kv_heads": 2, "head_dim": 3}
    f, b, m, c = (draw.normal(*each) for each in _cca_operands(shape)[3:-1])
    blank = torch.zeros(2, dtype=torch.float64)

    def mean(v: Tensor) -> Tensor:
        count = torch.arange(1, v.shape[1] + 1)[:, None, None]
        return (v.cumsum(1) / count).repeat_interleave(2, dim=2)

    return Claim((v,), lambda v: cca(q, k, v, f, b, m, c, blank), mean)


def _embedded(draw: Draw) -> tuple[Tensor, ...]:
    length = draw.integer(2, 9)
    return (
        *(draw.normal(2, length, 1, 3) for _ in range(3)),
        *(draw.normal(4, 3) for _ in range(3)),
    )


def _expanded(draw: Draw) -> Claim:
    """Terms added to each head: every head with keys and values of its own."""

    def heads(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return attend(q + a, k + b, v + c, Causal())

    return Claim(_embedded(draw), head_embeddings, heads)


def _factors(draw: Draw) -> Claim:
    def heads(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return attend(q * (1 + a), k * (1 + b), v * (1 + c), Causal())

    return Claim(_embedded(draw), lambda *x: head_embeddings(*x, multiply=True), heads)


def _identity_mixing(draw: Draw) -> Claim:
    q, x, _ = draw.qkv((draw.integer(2, 9),))
    eye = torch.eye(q.shape[1], dtype=torch.float64)
    return Claim(
        (q, x),
        lambda q, x: super_attention(q, x, eye),
        lambda q, x: attend(q, x, x, Causal()),
    )


def _no_future(draw: Draw) -> Claim:
    """The upper triangle of the mixing plays no part."""
    q, x, _ = draw.qkv((draw.integer(2, 9),))
    mixing = draw.normal(q.shape[1], q.shape[1])
    return Claim(
        (q, x),
        lambda q, x: super_attention(q, x, mixing),
        lambda q, x: super_attention(q, x, mixing.tril()),
    )


def _products(causal: bool) -> Identity:
    def claim(draw: Draw) -> Claim:
        length, piece = draw.integer(2, 13), draw.integer(1, 5)
        factors = [draw.normal(2, length, 2, 2) for _ in range(3)]
        maps = [draw.normal(2, 2, 3) for _ in range(3)]

        def whole(a: Tensor, b: Tensor, c: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            q, k, v = (torch.einsum("blhr,hrd->blhd", f, m) for f, m in ((a, x), (b, y), (c, z)))
            return attend(q, k, v, Causal() if causal else Dense())

        return Claim((*factors, *maps), lambda *x: flash_svd(*x, causal=causal, piece=piece), whole)

    name = "causal" if causal else "products"
    return Identity(name, "Attention of the products, rebuilt whole.", claim)


def _embedding_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    L, H, D = shape["grid"][0], shape["heads"], shape["head_dim"]
    return (*((1, L, 1, D),) * 3, *((H, D),) * 3)


def _mixing_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    L, H, D = shape["grid"][0], shape["heads"], shape["head_dim"]
    return ((1, L, H, D), (1, L, H, D), (L, L))


def _factor_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    L, H, D = shape["grid"][0], shape["heads"], shape["head_dim"]
    return (*((1, L, H, D // 4),) * 3, *((H, D // 4, D),) * 3)


CCA = System(
    name="cca",
    title="Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
    year=2025,
    paper="Figliolia et al.; arXiv 2510.04476",
    kind="operator",
    summary="Attention inside a small latent, whose queries and keys two short convolutions mix first.",
    op=cca,
    identities=(
        Identity("plain", "Filters that pass the token: attention of unit vectors.", _plain_heads),
        Identity("cold", "Temperature 0: the mean of the values so far.", _temperature),
    ),
    reference_shapes=({"grid": (4096,), "heads": 8, "kv_heads": 2, "head_dim": 128},),
    layer=CompressedConvolutionalAttention,
    family=FAMILY,
    engine="torch",
    operands=_cca_operands,
)
HEAD_EMBEDDINGS = System(
    name="head_embeddings",
    title="Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient "
    "Multi-head Attention",
    year=2023,
    paper="Xue and Aletras; arXiv 2310.07911",
    kind="operator",
    summary="One projection for all heads, which differ by an embedding that is added or multiplied.",
    op=head_embeddings,
    identities=(
        Identity("expanded", "Every head with keys and values of its own.", _expanded),
        Identity("factors", "The same with factors.", _factors),
    ),
    reference_shapes=({"grid": (2048,), "heads": 8, "kv_heads": 1, "head_dim": 64},),
    layer=HeadEmbeddingAttention,
    family=FAMILY,
    engine="torch",
    operands=_embedding_operands,
)
SUPER_ATTENTION = System(
    name="super_attention",
    title="You Need to Pay Better Attention",
    year=2024,
    paper="Hosseini and Hosseini; arXiv 2403.01643",
    kind="operator",
    summary="Slices of the input are keys and, mixed along the tokens, values.",
    op=super_attention,
    identities=(
        Identity("efficient", "Identity mixing: keys and values are the input.", _identity_mixing),
        Identity("causal", "Later tokens play no part.", _no_future),
    ),
    reference_shapes=({"grid": (1024,), "heads": 8, "kv_heads": 8, "head_dim": 64},),
    layer=SlicedAttention,
    family=FAMILY,
    engine="torch",
    operands=_mixing_operands,
)
FLASH_SVD = System(
    name="flash_svd",
    title="FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank Models",
    year=2025,
    paper="Shao et al.; number not established",
    kind="operator",
    summary="Queries, keys and values of low rank are rebuilt piece by piece inside attention.",
    op=flash_svd,
    identities=(_products(False), _products(True)),
    reference_shapes=({"grid": (2048,), "heads": 8, "kv_heads": 8, "head_dim": 64},),
    layer=LowRankAttention,
    family=FAMILY,
    engine="torch",
    operands=_factor_operands,
)

PROJECTION_SYSTEMS = (CCA, HEAD_EMBEDDINGS, SUPER_ATTENTION, FLASH_SVD)
