"""Large filters that are the same for every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import ShapeError
from foveal._judged import judged_alone, need_dtype, need_shape
from foveal._local_mix import local_mix
from foveal.layers.convolution import InceptionConvolution, VANAttention
from foveal.layers.convolution_long import OversizeConvolution
from foveal.layers.convolution_merge import Branch, RepLKBlock, UniRepLKBlock, merge_parallel
from foveal.layers.convolution_orders import MultiorderMixer, two_orders
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.convolution.entries import described, entry, identity_tap, image, static


@judged_alone
def lka(
    x: Tensor,
    near: Tensor,
    far: Tensor,
    mixing: Tensor,
    *,
    dilation: int = 3,
    implementation: str | None = None,
) -> Tensor:
    """x * (mixing dw_far(dw_near(x))): x [B, *grid, C], two filters [C, *window], mixing [C, C]."""
    need_shape("mixing", mixing, (x.shape[-1], x.shape[-1]), like=x)
    need_dtype(x, mixing=mixing)
    gate = convolve(x, near, implementation=implementation)
    gate = convolve(gate, far, dilation=dilation, implementation=implementation)
    return x * F.linear(gate, mixing)


@judged_alone
def merged_branches(
    x: Tensor,
    filter: Tensor,
    *branches: Tensor,
    dilations: tuple[int, ...] = (1, 2, 3, 4, 5),
    implementation: str | None = None,
) -> Tensor:
    """dw(x) + sum_m dw_m(x) by one filter: x [B, *grid, C], filters [C, *window], dilated in turn."""
    if len(branches) != len(dilations):
        needed = f"one for each of the {len(branches)} branches is needed"
        raise ShapeError("dilations", dilations, needed)
    if min(dilations, default=1) < 1:
        raise ShapeError("dilations", dilations, "at least 1 each is needed")
    for branch in branches:
        need_shape("branch", branch, (len(filter), *(-1,) * (filter.dim() - 1)), like=filter)
    zero = filter.new_zeros(len(filter))
    parts = [Branch(filter, zero)]
    parts += [Branch(f, zero, r) for f, r in zip(branches, dilations, strict=True)]
    return convolve(x, merge_parallel(parts).filter, implementation=implementation)


@judged_alone
def replk(x: Tensor, filter: Tensor, small: Tensor, *, implementation: str | None = None) -> Tensor:
    """dw(x) + dw_small(x) by one filter: x [B, *grid, C], filters [C, *window]."""
    return merged_branches(x, filter, small, dilations=(1,), implementation=implementation)


@judged_alone
def inception(
    x: Tensor, square: Tensor, row: Tensor, column: Tensor, *, implementation: str | None = None
) -> Tensor:
    """The last channels by a square, a row and a column of taps [C_i, *window], the first as they are."""
    counts = [len(f) for f in (square, row, column)]
    if sum(counts) > x.shape[-1]:
        needed = f"filters for at most {x.shape[-1]} channels are needed"
        raise ShapeError("square", f"{counts} channels of square, row and column", needed)
    kept, mixed = x.split([x.shape[-1] - sum(counts), sum(counts)], dim=-1)
    found = convolve(mixed, (square, row, column), implementation=implementation)
    return torch.cat([kept, found], dim=-1)


@judged_alone
def oversize(
    x: Tensor, column: Tensor, row: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Every token meets every other of its axis: x [B, H, W, C], column [C, 2H - 1], row [C, 2W - 1]."""
    if x.dim() != 4:
        raise ShapeError("x", list(x.shape), "[B, H, W, C] is needed")
    for name, taps, size in (("column", column, x.shape[1]), ("row", row, x.shape[2])):
        need_shape(name, taps, (x.shape[-1], max(2 * size - 1, 0)), like=x)
    if not x.numel():
        return x
    found = convolve(x, column[:, :, None], implementation=implementation)
    return convolve(found, row[:, None], implementation=implementation)


@judged_alone
def lkca(v: Tensor, filter: Tensor, *, implementation: str | None = None) -> Tensor:
    """Attention whose weights are one filter per head: v [B, *grid, H, D], filter [H, *window]."""
    if v.dim() < 4 or len(filter) != v.shape[-2]:
        needed = f"[H, *window] is needed for v [B, *grid, H, D] {list(v.shape)}"
        raise ShapeError("filter", list(filter.shape), needed)
    y = convolve(v.flatten(-2), filter, implementation=implementation)
    found: Tensor = y.unflatten(-1, v.shape[-2:])
    return found


def _gates_itself(draw: Draw) -> Claim:
    def left(x: Tensor) -> Tensor:
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        return lka(x, identity_tap(x, (5, 5)), identity_tap(x, (7, 7)), eye)

    return Claim((image(draw),), left, lambda x: x * x)


def _one_large_filter(draw: Draw) -> Claim:
    def composed(x: Tensor, near: Tensor, far: Tensor, mixing: Tensor) -> Tensor:
        spread = F.pad(near, (9, 9, 9, 9))
        spaced = merge_parallel([Branch(far, far.new_zeros(len(far)), 3)]).filter
        whole = convolve(spread.movedim(0, -1)[None], spaced.flip((1, 2)))[0].movedim(-1, 0)
        return (x * F.linear(convolve(x, whole), mixing))[:, 11:-11, 11:-11]

    return Claim(
        (draw.normal(1, 25, 24, 2), draw.normal(2, 5, 5), draw.normal(2, 7, 7), draw.normal(2, 2)),
        lambda *tensors: lka(*tensors)[:, 11:-11, 11:-11],
        composed,
    )


def _sum_of_branches(draw: Draw) -> Claim:
    x = image(draw)
    shapes = ((13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
    filters = tuple(draw.normal(3, k, k) for k, _ in shapes)

    def apart(x: Tensor, *filters: Tensor) -> Tensor:
        parts = [convolve(x, f, dilation=r) for f, (_, r) in zip(filters, shapes, strict=True)]
        return torch.stack(parts).sum(0)

    return Claim((x, *filters), merged_branches, apart)


def _sum_of_two(draw: Draw) -> Claim:
    filters = draw.normal(3, 9, 9), draw.normal(3, 5, 5)
    return Claim((image(draw), *filters), replk, lambda x, f, g: convolve(x, f) + convolve(x, g))


def _untouched(draw: Draw) -> Claim:
    x = image(draw, 8)

    def left(x: Tensor) -> Tensor:
        taps = (identity_tap(x[..., :2], k) for k in ((3, 3), (1, 5), (5, 1)))
        return inception(x, *taps)

    return Claim((x,), left, lambda x: x)


def _two_matrices(draw: Draw) -> Claim:
    x = image(draw)
    height, width = x.shape[1:3]

    def matrix(filter: Tensor, size: int) -> Tensor:
        place = torch.arange(size)
        return filter[:, place[None] - place[:, None] + size - 1]

    return Claim(
        (x, draw.normal(3, 2 * height - 1), draw.normal(3, 2 * width - 1)),
        oversize,
        lambda x, a, b: torch.einsum("cij,bjkc,clk->bilc", matrix(a, height), x, matrix(b, width)),
    )


def _shared_weights(draw: Draw) -> Claim:
    v, filter = draw.normal(2, 7, 6, 2, 3), draw.normal(2, 5, 5)

    def mixed(v: Tensor, filter: Tensor) -> Tensor:
        weights = filter.flatten(1).expand(*v.shape[:-1], -1)
        return local_mix(weights, v, 5)

    return Claim((v, filter), lkca, mixed)


def _unchanged(draw: Draw) -> Claim:
    def left(x: Tensor) -> Tensor:
        taps = identity_tap(x, (3, 3))
        return two_orders(x, torch.zeros(x.shape[-1], dtype=x.dtype), taps, taps, taps)

    return Claim((image(draw),), left, lambda x: F.gelu(torch.cat([x, x], dim=-1)))


def _lka_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width = shape["heads"] * shape["head_dim"]
    return (*static((5, 5), (7, 7))(shape), (width, width))


def _inception_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width = shape["heads"] * shape["head_dim"]
    part = width // 8
    return ((1, *shape["grid"], width), (part, 3, 3), (part, 1, 11), (part, 11, 1))


def _oversize_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    height, width = shape["grid"]
    channels = shape["heads"] * shape["head_dim"]
    return ((1, height, width, channels), (channels, 2 * height - 1), (channels, 2 * width - 1))


def _lkca_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    heads = shape["heads"]
    return ((1, *shape["grid"], heads, shape["head_dim"]), (heads, 7, 7))


def _order_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width = shape["heads"] * shape["head_dim"]
    taps = (width, 3, 3)
    return ((1, *shape["grid"], width), (width,), taps, taps, taps)


SYSTEMS: tuple[System, ...] = (
    entry(
        "lka", "Visual Attention Network", 2022, "2202.09741",
        "A 5x5 filter, a 7x7 filter dilated by 3 and a linear map gate the input.",
        lka, _lka_shapes, described((56, 56), 1, 64),
        Identity("gates_itself", "with taps and a map of 1, y = x x", _gates_itself),
        Identity("one_large_filter", "11 tokens from the border, one 23x23 filter", _one_large_filter),
        layer=VANAttention,
    ),
    entry(
        "unireplk", "UniRepLKNet", 2023, "2311.15599",
        "A 13x13 filter with small dilated ones beside it, merged to one.",
        merged_branches, static((13, 13), (5, 5), (7, 7), (3, 3), (3, 3), (3, 3)),
        described((56, 56), 1, 96),
        Identity("sum_of_branches", "the merged filter is the sum of all branches", _sum_of_branches),
        kind="model", layer=UniRepLKBlock,
    ),
    entry(
        "replk", "RepLKNet", 2022, "2203.06717",
        "A 31x31 filter with a 5x5 one beside it, merged to one.",
        replk, static((31, 31), (5, 5)), described((56, 56), 1, 128),
        Identity("sum_of_branches", "the merged filter is the sum of both", _sum_of_two),
        kind="model", layer=RepLKBlock,
    ),
    entry(
        "inception_dwconv", "InceptionNeXt", 2023, "2303.16900",
        "Channels in four groups: untouched, a square, a row and a column of taps.",
        inception, _inception_shapes, described((56, 56), 1, 96),
        Identity("untouched", "with filters of one tap 1, y = x", _untouched),
        kind="model", layer=InceptionConvolution,
    ),
    entry(
        "parc_oversized", "ParCNetV2", 2022, "2211.07157",
        "A column and a row of taps nearly twice as long as the grid: position from the border.",
        oversize, _oversize_shapes, described((28, 28), 1, 128),
        Identity("two_matrices", "y = T_h x T_w^T with Toeplitz matrices", _two_matrices),
        kind="model", layer=OversizeConvolution,
    ),
    entry(
        "lkca", "LKCA", 2024, "2401.05738",
        "Attention whose weights are one large filter per head, the same for every token.",
        lkca, _lkca_shapes, described((14, 14), 3, 64),
        Identity("shared_weights", "the same weights given token by token", _shared_weights),
    ),
    entry(
        "spartan_multiorder", "SpaRTAN", 2025, "2507.10999",
        "A 3x3 filter beside two that see 9x9 tokens, on an image with its mean taken away in part.",
        two_orders, _order_shapes, described((56, 56), 1, 48),
        Identity("unchanged", "with taps of 1 and gamma 0, y = gelu([x, x])", _unchanged),
        kind="model", layer=MultiorderMixer,
    ),
)  # fmt: skip
