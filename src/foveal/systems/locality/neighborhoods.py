"""Neighborhood attention and its generalisations."""

from __future__ import annotations

from torch import Tensor

from foveal._attend import attend
from foveal.layers.heads import each
from foveal.layers.neighborhood import MedViTAttention, NeighborhoodAttention
from foveal.patterns import Causal, Dense, Neighborhood, Partition, Pattern
from foveal.scores import RelativeBias, Score, Softmax
from foveal.systems.base import Claim, Draw, Identity, System, attending


def _score(table: Tensor | None) -> Score:
    return Softmax() if table is None else Softmax() + RelativeBias(table)


def _neighborhood(
    grid: tuple[int, ...], *, window: int | tuple[int, ...] = 7, table: Tensor | None = None
) -> tuple[Pattern, Score]:
    return Neighborhood(window), _score(table)


def _whole_window(draw: Draw) -> Claim:
    side = draw.integer(2, 5)
    op = attending(_neighborhood)
    return Claim(draw.qkv((side, side)), lambda q, k, v: op(q, k, v, window=side), attend)


def _constant_table(draw: Draw) -> Claim:
    op = attending(_neighborhood)
    table = draw.normal(2, 1, 1).expand(2, 5, 5)
    return Claim(
        draw.qkv((5, 6)),
        lambda q, k, v: op(q, k, v, window=3, table=table),
        lambda q, k, v: op(q, k, v, window=3),
    )


_WHOLE_WINDOW = Identity(
    "whole_window", "A window as large as the grid is dense attention.", _whole_window
)

NEIGHBORHOOD_ATTENTION = System(
    name="neighborhood_attention",
    title="Neighborhood Attention Transformer",
    year=2022,
    paper="Hassani, Walton, Li, Li, Shi; arXiv 2204.07143",
    kind="operator",
    summary="Each token attends to its nearest window of tokens, shifted inward at the border, "
    "with a relative bias table [heads, 2 window - 1 per axis].",
    op=attending(_neighborhood),
    compose=_neighborhood,
    layer=NeighborhoodAttention,
    identities=(
        _WHOLE_WINDOW,
        Identity(
            "constant_table", "A table that is constant per head changes nothing.", _constant_table
        ),
    ),
    reference_shapes=(
        {"grid": (56, 56), "heads": 2, "kv_heads": 2, "head_dim": 32},
        {"grid": (28, 28), "heads": 4, "kv_heads": 4, "head_dim": 32},
    ),
)


def _fused(
    grid: tuple[int, ...],
    *,
    window: int | tuple[int, ...] = 7,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> tuple[Pattern, Score]:
    return Neighborhood(window, dilation=dilation, causal=causal), Softmax()


def _residues(draw: Draw) -> Claim:
    window, dilation = draw.integer(2, 4), draw.integer(2, 4)
    op = attending(_fused)

    def classes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_residue(dilation, Dense(), q, k, v)

    return Claim(
        draw.qkv((window * dilation,)),
        lambda q, k, v: op(q, k, v, window=window, dilation=dilation),
        classes,
    )


def by_residue(classes: int, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in each residue class of the positions, as the batch of a transposed sequence."""
    apart = each(
        lambda x: x.view(len(x), -1, classes, *x.shape[2:]).transpose(1, 2).flatten(0, 1), q, k, v
    )
    o = attend(*apart, pattern)
    return o.view(len(q), classes, *o.shape[1:]).transpose(1, 2).flatten(1, 2)


def _causal_line(draw: Draw) -> Claim:
    length = draw.integer(2, 9)
    op = attending(_fused)
    return Claim(
        draw.qkv((length,)),
        lambda q, k, v: op(q, k, v, window=length, causal=True),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


FUSED_NA = System(
    name="fused_na",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the "
    "Threadblock Level",
    year=2024,
    paper="Hassani, Hwu, Shi; arXiv 2403.04690",
    kind="operator",
    summary="Neighborhood attention with window, dilation and causality of every axis on its own, "
    "fused tile by tile.",
    op=attending(_fused),
    compose=_fused,
    layer=NeighborhoodAttention,
    identities=(
        Identity(
            "residue_classes",
            "window * dilation = length is dense attention inside each residue class.",
            _residues,
        ),
        Identity(
            "causal_line",
            "One causal axis with a window of its length is causal attention.",
            _causal_line,
        ),
    ),
    reference_shapes=(
        {
            "grid": (128, 128),
            "heads": 16,
            "kv_heads": 16,
            "head_dim": 128,
            "options": {"window": 25},
        },
        {
            "grid": (32768,),
            "heads": 16,
            "kv_heads": 16,
            "head_dim": 128,
            "options": {"window": 2048},
        },
    ),
)


def _generalized(
    grid: tuple[int, ...],
    *,
    window: int | tuple[int, ...] = 16,
    stride: int | tuple[int, ...] = 8,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> tuple[Pattern, Score]:
    return Neighborhood(window, stride, dilation, causal), Softmax()


def _blocked(draw: Draw) -> Claim:
    side, across = draw.integer(2, 3), draw.integer(1, 3)
    op = attending(_generalized)
    return Claim(
        draw.qkv((side * across, side * 2), heads=4, kv_heads=2),
        lambda q, k, v: op(q, k, v, window=side, stride=side),
        lambda q, k, v: attend(q, k, v, Partition(side)),
    )


def _causal_blocks(draw: Draw) -> Claim:
    side, count = draw.integer(2, 4), draw.integer(1, 4)
    op = attending(_generalized)
    return Claim(
        draw.qkv((side * count,)),
        lambda q, k, v: op(q, k, v, window=side, stride=side, causal=True),
        lambda q, k, v: attend(q, k, v, Partition(side) & Causal()),
    )


GNA = System(
    name="gna",
    title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of "
    "Light",
    year=2025,
    paper="Hassani et al.; arXiv 2504.16922",
    kind="operator",
    summary="Neighborhoods whose window moves by `stride` tokens: from sliding (1) to blocked (the "
    "window), so that tiles of the window's own grid need no mask.",
    op=attending(_generalized),
    compose=_generalized,
    layer=NeighborhoodAttention,
    identities=(
        Identity(
            "blocked",
            "stride = window dividing the grid is attention inside blocks.",
            _blocked,
        ),
        Identity(
            "causal_blocks",
            "On a causal axis, stride = window dividing it is causal attention inside blocks.",
            _causal_blocks,
        ),
        _WHOLE_WINDOW,
    ),
    reference_shapes=(
        {
            "grid": (256, 256),
            "heads": 24,
            "kv_heads": 24,
            "head_dim": 128,
            "options": {"window": 80, "stride": 16},
        },
        {
            "grid": (30, 48, 80),
            "heads": 24,
            "kv_heads": 24,
            "head_dim": 128,
            "options": {"window": (18, 24, 24), "stride": (16, 8, 8)},
        },
        {
            "grid": (32768,),
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 128,
            "options": {"window": 2048, "stride": 256},
        },
    ),
)


def _same_as_neighborhood(draw: Draw) -> Claim:
    window, table = draw.integer(2, 4), draw.normal(2, 9, 9)
    return Claim(
        draw.qkv((draw.integer(5, 7), 6)),
        lambda q, k, v: attending(_dilated)(q, k, v, window=window, table=table),
        lambda q, k, v: attending(_neighborhood)(q, k, v, window=window, table=table),
    )


def _dilated(
    grid: tuple[int, ...],
    *,
    window: int | tuple[int, ...] = 7,
    dilation: int | tuple[int, ...] = 1,
    table: Tensor | None = None,
) -> tuple[Pattern, Score]:
    return Neighborhood(window, dilation=dilation), _score(table)


MEDVIT_DINA = System(
    name="medvit_dina",
    title="Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood "
    "Attention",
    year=2025,
    paper="Nejati Manzari et al.; arXiv 2502.13693",
    kind="model",
    summary="Neighborhood attention with window 7 and a relative bias table in local blocks. The "
    "paper stresses dilation; the released code passes 1, the default here.",
    op=attending(_dilated),
    compose=_dilated,
    layer=MedViTAttention,
    identities=(
        Identity(
            "released_dilation",
            "With dilation 1 it is neighborhood attention.",
            _same_as_neighborhood,
        ),
    ),
    reference_shapes=({"grid": (56, 56), "heads": 2, "kv_heads": 2, "head_dim": 32},),
)

TCSR_NA = System(
    name="tcsr_na",
    title="Incorporating Transformer Designs into Convolutions for Lightweight Image "
    "Super-Resolution",
    year=2023,
    paper="Wu, Jiang, Bai, Liu; arXiv 2303.14324",
    kind="model",
    summary="Neighborhood attention on large images with few channels per head. Window and table "
    "of the paper are not established; both are options, the window 7 stands in.",
    op=attending(_neighborhood),
    compose=_neighborhood,
    layer=NeighborhoodAttention,
    identities=(_WHOLE_WINDOW,),
    reference_shapes=({"grid": (96, 96), "heads": 4, "kv_heads": 4, "head_dim": 16},),
)
