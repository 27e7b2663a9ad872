"""Sliding windows, partitions of the grid, lines and boxes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import PatternError
from foveal._judged import judged
from foveal.layers.groups import BoxAttention, attend_boxes
from foveal.layers.heads import each
from foveal.layers.sequence import ChunkedEncoder
from foveal.layers.windows import (
    AxialAttention,
    DilatedWindowAttention,
    SwinWindowAttention,
    dilated_window,
)
from foveal.patterns import (
    Axial,
    Causal,
    Neighborhood,
    Partition,
    Pattern,
    Sliding,
)
from foveal.scores import RelativeBias, Score, Softmax
from foveal.systems.base import Claim, Draw, Identity, System, attending, naming


def _sliding(
    grid: tuple[int, ...],
    *,
    left: int = 511,
    right: int = 0,
    sink_tokens: int = 0,
    sink: Tensor | None = None,
) -> tuple[Pattern, Score]:
    return Sliding(left, right, sink_tokens), Softmax(sink=sink)


def _wide_window(draw: Draw) -> Claim:
    op, length = attending(_sliding), draw.integer(3, 9)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: op(q, k, v, left=length),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _sink_shrinks(draw: Draw) -> Claim:
    op = attending(_sliding)

    def shrunk(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        o, lse = op(q, k, v, left=3, return_lse=True)
        smaller: Tensor = o * torch.sigmoid(lse - sink)[..., None]
        return smaller

    return Claim(
        (*draw.qkv((9,)), draw.normal(2)),
        lambda q, k, v, sink: op(q, k, v, left=3, sink=sink),
        shrunk,
    )


SLIDING_WINDOW = System(
    name="sliding_window",
    title="Longformer: The Long-Document Transformer",
    year=2020,
    paper="Beltagy, Peters, Cohan; arXiv 2004.05150. Sink tokens: Xiao et al.; arXiv 2309.17453",
    kind="operator",
    summary="Each token sees `left` tokens before and `right` after it, and the first sink_tokens; "
    "a sink logit per head may take mass without a value.",
    op=attending(_sliding),
    compose=_sliding,
    identities=(
        Identity("wide_window", "A window that reaches the first token is causal.", _wide_window),
        Identity(
            "sink_shrinks",
            "A sink logit multiplies the output by sigmoid(lse - sink).",
            _sink_shrinks,
        ),
    ),
    reference_shapes=(
        {"grid": (16384,), "heads": 16, "kv_heads": 16, "head_dim": 64},
        {"grid": (2048,), "heads": 4, "kv_heads": 1, "head_dim": 256},
    ),
)


def _around(
    grid: tuple[int, ...],
    *,
    window: int = 128,
    look_backward: int = 1,
    look_forward: int = 0,
    causal: bool = True,
    exact: bool = False,
) -> tuple[Pattern, Score]:
    with naming(size="window"):
        pattern: Pattern = Partition(window)
    for name, count in (("look_backward", look_backward), ("look_forward", look_forward)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise PatternError(name, count, "an integer of at least 0 is needed")
    pattern = Partition(window, before=window * look_backward, after=window * look_forward)
    if causal:
        pattern = pattern & Causal()
    if exact:
        reach = window * look_backward
        pattern = pattern & Sliding(reach, 0 if causal else reach)
    return pattern, Softmax()


def _all_windows(draw: Draw) -> Claim:
    op, window = attending(_around), draw.integer(2, 4)
    return Claim(
        draw.qkv((11,)),
        lambda q, k, v: op(q, k, v, window=window, look_backward=10),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _exact_is_sliding(draw: Draw) -> Claim:
    op, window = attending(_around), draw.integer(2, 4)
    return Claim(
        draw.qkv((13,)),
        lambda q, k, v: op(q, k, v, window=window, exact=True),
        lambda q, k, v: attend(q, k, v, Sliding(window)),
    )


LOCAL_WINDOW = System(
    name="local_window",
    title="Efficient Content-Based Sparse Attention with Routing Transformers (its local heads)",
    year=2020,
    paper="Roy, Saffar, Vaswani, Grangier; arXiv 2003.05997. Form of the package local-attention",
    kind="operator",
    summary="A token sees its own window and look_backward windows before, look_forward after; "
    "`exact` keeps |i - j| <= window * look_backward.",
    op=attending(_around),
    compose=_around,
    identities=(
        Identity("all_windows", "Looking back over all windows is causal.", _all_windows),
        Identity(
            "exact_is_sliding",
            "Exact look-back over one window is a sliding window.",
            _exact_is_sliding,
        ),
    ),
    reference_shapes=({"grid": (8192,), "heads": 8, "kv_heads": 8, "head_dim": 64},),
)


def _swin(
    grid: tuple[int, ...],
    *,
    window: int | tuple[int, ...] = 7,
    shift: int | tuple[int, ...] = 0,
    table: Tensor | None = None,
) -> tuple[Pattern, Score]:
    score = Softmax() if table is None else Softmax() + RelativeBias(table)
    with naming(size="window"):
        return Partition(window, shift), score


def _strided_neighborhood(draw: Draw) -> Claim:
    op, side = attending(_swin), draw.integer(2, 3)
    table = draw.normal(2, 2 * side - 1, 2 * side - 1)
    return Claim(
        draw.qkv((2 * side, 3 * side)),
        lambda q, k, v: op(q, k, v, window=side, table=table),
        lambda q, k, v: attend(
            q, k, v, Neighborhood(side, stride=side), Softmax() + RelativeBias(table)
        ),
    )


def _shift_cuts(draw: Draw) -> Claim:
    op, side = attending(_swin), draw.integer(3, 4)
    shift = draw.integer(1, side - 1)
    inner = slice(shift, shift + side)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*each(lambda x: x[:, inner, inner], q, k, v))

    return Claim(
        draw.qkv((2 * side, 2 * side)),
        lambda q, k, v: op(q, k, v, window=side, shift=shift)[:, inner, inner],
        alone,
    )


SWIN_WINDOWS = System(
    name="swin_windows",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    year=2021,
    paper="Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo; arXiv 2103.14030",
    kind="operator",
    summary="Attention inside square windows, moved by `shift` in every second block, with a "
    "relative bias table; windows cut by the border stay smaller, nothing is rolled or masked.",
    op=attending(_swin),
    compose=_swin,
    layer=SwinWindowAttention,
    identities=(
        Identity(
            "strided_neighborhood",
            "Without shift it is a neighborhood with stride = window, when the window divides the "
            "grid.",
            _strided_neighborhood,
        ),
        Identity(
            "shift_cuts",
            "A window inside the shifted grid attends as if it were alone.",
            _shift_cuts,
        ),
    ),
    reference_shapes=(
        {"grid": (56, 56), "heads": 3, "kv_heads": 3, "head_dim": 32},
        {"grid": (28, 28), "heads": 6, "kv_heads": 6, "head_dim": 32},
    ),
)


def _axial(grid: tuple[int, ...], *, axis: int = 0, causal: bool = False) -> tuple[Pattern, Score]:
    return Axial(axis, causal), Softmax()


def _fold_rows(draw: Draw) -> Claim:
    op = attending(_axial)
    grid = (draw.integer(1, 4), draw.integer(2, 5))

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*each(lambda x: x.flatten(0, 1), q, k, v), Causal()).view_as(v)

    return Claim(draw.qkv(grid), lambda q, k, v: op(q, k, v, axis=-1, causal=True), folded)


AXIAL_ATTENTION = System(
    name="axial_attention",
    title="Axial Attention in Multidimensional Transformers",
    year=2019,
    paper="Ho, Kalchbrenner, Weissenborn, Salimans; arXiv 1912.12180",
    kind="operator",
    summary="Full or causal attention along one axis of the grid, the other axes apart.",
    op=attending(_axial),
    compose=_axial,
    layer=AxialAttention,
    identities=(
        Identity("fold_rows", "The last axis is attention with the rows as batch.", _fold_rows),
    ),
    reference_shapes=({"grid": (64, 64), "heads": 8, "kv_heads": 8, "head_dim": 64},),
)


def _dilated_window(
    grid: tuple[int, ...],
    *,
    group: tuple[int, ...] = (2, 7, 7),
    scope: Literal["local", "global"] = "local",
) -> tuple[Pattern, Score]:
    return dilated_window(grid, group, scope), Softmax()


def _local_groups(draw: Draw) -> Claim:
    op, group = attending(_dilated_window), (2, draw.integer(1, 2), 3)
    grid = (4, group[1] * 2, 3)
    return Claim(
        draw.qkv(grid),
        lambda q, k, v: op(q, k, v, group=group),
        lambda q, k, v: attend(q, k, v, Neighborhood(group, stride=group)),
    )


def _combs_are_groups(draw: Draw) -> Claim:
    op, group = attending(_dilated_window), (2, draw.integer(1, 3), 1)
    gaps = (draw.integer(1, 2), 2, 3)
    grid = tuple(size * gap for size, gap in zip(group, gaps, strict=True))

    def reorder(x: Tensor) -> Tensor:
        for axis, (size, gap) in enumerate(zip(group, gaps, strict=True), start=1):
            x = x.unflatten(axis, (size, gap)).transpose(axis, axis + 1).flatten(axis, axis + 1)
        return x

    def groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = op(*(reorder(x) for x in (q, k, v)), group=group)
        return o

    return Claim(
        draw.qkv(grid), lambda q, k, v: reorder(op(q, k, v, group=group, scope="global")), groups
    )


DILATED_WINDOW_3D = System(
    name="dilated_window_3d",
    title="D-Former: A U-shaped Dilated Transformer for 3D Medical Image Segmentation",
    year=2022,
    paper="Wu et al.; arXiv 2201.00462",
    kind="model",
    summary="On volumes, attention inside groups of neighbours (scope local) or inside combs of as "
    "many tokens spread evenly over every axis (scope global).",
    op=attending(_dilated_window),
    compose=_dilated_window,
    layer=DilatedWindowAttention,
    identities=(
        Identity(
            "local_groups", "Local groups are a neighborhood with stride = window.", _local_groups
        ),
        Identity(
            "combs_are_groups",
            "Global groups are local groups after each axis is transposed as [group, gap].",
            _combs_are_groups,
        ),
    ),
    reference_shapes=({"grid": (16, 56, 56), "heads": 3, "kv_heads": 3, "head_dim": 32},),
)


def _chunks(grid: tuple[int, ...], *, chunk: int = 40, overlap: int = 5) -> tuple[Pattern, Score]:
    with naming(size="chunk", before="overlap"):
        return Partition(chunk, before=overlap, after=overlap), Softmax()


def _unfolded(draw: Draw) -> Claim:
    op, chunk, overlap = attending(_chunks), draw.integer(2, 4), draw.integer(0, 3)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, outputs = q.shape[1], []
        for start in range(0, length, chunk):
            keys = slice(max(start - overlap, 0), start + chunk + overlap)
            outputs.append(attend(q[:, start : start + chunk], k[:, keys], v[:, keys]))
        return torch.cat(outputs, dim=1)

    return Claim(
        draw.qkv((draw.integer(7, 13),)),
        lambda q, k, v: op(q, k, v, chunk=chunk, overlap=overlap),
        one_by_one,
    )


TKL_LOCAL_ATTENTION = System(
    name="tkl_local_attention",
    title="Local Self-Attention over Long Text for Efficient Document Retrieval",
    year=2020,
    paper="Hofstaetter, Zamani, Mitra, Craswell, Hanbury; arXiv 2005.04908",
    kind="model",
    summary="Chunks of 40 tokens see themselves and 5 tokens on both sides. The layer recomputes "
    "the overlap per chunk, so that two of its layers are not two of these operators.",
    op=attending(_chunks),
    compose=_chunks,
    layer=ChunkedEncoder,
    identities=(
        Identity("unfolded", "Each chunk attends on its own to itself and its margins.", _unfolded),
    ),
    reference_shapes=({"grid": (2000,), "heads": 10, "kv_heads": 10, "head_dim": 30},),
)


@judged
def box_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coordinates: Tensor,
    *,
    box: int | tuple[int, ...] = 6,
    implementation: str | None = None,
) -> Tensor:
    """Attention among the voxels of each box, boxes of any number of voxels packed in one sequence.

    Shapes: q, k, v [1, N, H, D]; coordinates int64 [N, 1 + axes]: sample, then the place in the
    grid.
    Options: box, the side in voxels, one for all axes or one per axis.
    """
    return attend_boxes(q, k, v, coordinates, box, implementation)


def _boxes(grid: tuple[int, ...], *, box: int | tuple[int, ...] = 6) -> tuple[Pattern, Score]:
    """The case in which every voxel of the grid is active."""
    return Partition(box), Softmax()


def _all_active(draw: Draw) -> Claim:
    grid, side = (draw.integer(2, 4), 4, 3), draw.integer(1, 3)
    axes = (torch.arange(n) for n in (1, *grid))
    coordinates = torch.cartesian_prod(*axes)

    def voxels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        listed = each(lambda x: x.flatten(1, 3), q, k, v)
        return box_attention(*listed, coordinates, box=side).view_as(v)

    return Claim(
        each(lambda x: x[:1], *draw.qkv(grid)),
        voxels,
        lambda q, k, v: attend(q, k, v, Partition(side)),
    )


def _one_box(draw: Draw) -> Claim:
    count = draw.integer(1, 9)
    places = torch.stack([draw.permutation(10)[:count] for _ in range(3)], dim=1)
    coordinates = torch.cat([torch.zeros(count, 1, dtype=torch.int64), places], dim=1)
    return Claim(
        each(lambda x: x[:1], *draw.qkv((count,))),
        lambda q, k, v: box_attention(q, k, v, coordinates, box=10),
        attend,
    )


BOX_ATTENTION = System(
    name="box_attention",
    title="VoxelKP: A Voxel-based Network Architecture for Human Keypoint Estimation in LiDAR Data",
    year=2023,
    paper="Shi, Wonka; arXiv 2312.08871",
    kind="model",
    summary="Active voxels attend to the active voxels of their own box of 6 x 6 x 6, sorted by "
    "box and packed without padding.",
    op=box_attention,
    compose=_boxes,
    layer=BoxAttention,
    identities=(
        Identity("all_active", "On a full grid it is attention inside windows.", _all_active),
        Identity("one_box", "Voxels of one box attend densely.", _one_box),
    ),
    reference_shapes=({"grid": (12, 96, 96), "heads": 4, "kv_heads": 4, "head_dim": 16},),
)
