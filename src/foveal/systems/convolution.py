"""Large, dynamic and long convolutions as attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._fftconv import fftconv
from foveal._local_mix import local_mix
from foveal.layers.convolution import InceptionConvolution, VANAttention
from foveal.layers.convolution_dynamic import (
    ContextMixing,
    DynamicConvolution,
    LightweightConvolution,
)
from foveal.layers.convolution_long import (
    FrequencyFilter,
    LongConvolution,
    OversizeConvolution,
    frequency_filter,
)
from foveal.layers.convolution_merge import Branch, RepLKBlock, UniRepLKBlock, merge_parallel
from foveal.systems.base import Claim, Draw, Identity, System

Shapes = Callable[[Mapping[str, Any]], tuple[tuple[int, ...], ...]]


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
    gate = convolve(x, near, implementation=implementation)
    gate = convolve(gate, far, dilation=dilation, implementation=implementation)
    return x * F.linear(gate, mixing)


def merged_branches(
    x: Tensor,
    filter: Tensor,
    *branches: Tensor,
    dilations: tuple[int, ...] = (1, 2, 3, 4, 5),
    implementation: str | None = None,
) -> Tensor:
    """dw(x) + sum_m dw_m(x) by one filter: x [B, *grid, C], filters [C, *window], dilated in turn."""
    zero = filter.new_zeros(len(filter))
    parts = [Branch(filter, zero)]
    parts += [Branch(f, zero, r) for f, r in zip(branches, dilations, strict=True)]
    return convolve(x, merge_parallel(parts).filter, implementation=implementation)


def replk(x: Tensor, filter: Tensor, small: Tensor, *, implementation: str | None = None) -> Tensor:
    """dw(x) + dw_small(x) by one filter: x [B, *grid, C], filters [C, *window]."""
    return merged_branches(x, filter, small, dilations=(1,), implementation=implementation)


def inception(
    x: Tensor, square: Tensor, row: Tensor, column: Tensor, *, implementation: str | None = None
) -> Tensor:
    """The last channels by a square, a row and a column of taps [C_i, *window], the first as they are."""
    counts = [len(f) for f in (square, row, column)]
    kept, mixed = x.split([x.shape[-1] - sum(counts), sum(counts)], dim=-1)
    found = convolve(mixed, (square, row, column), implementation=implementation)
    return torch.cat([kept, found], dim=-1)


def oversize(
    x: Tensor, column: Tensor, row: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Every token meets every other of its axis: x [B, H, W, C], column [C, 2H - 1], row [C, 2W - 1]."""
    found = convolve(x, column[:, :, None], implementation=implementation)
    return convolve(found, row[:, None], implementation=implementation)


def lkca(v: Tensor, filter: Tensor, *, implementation: str | None = None) -> Tensor:
    """Attention whose weights are one filter per head: v [B, *grid, H, D], filter [H, *window]."""
    y = convolve(v.flatten(-2), filter, implementation=implementation)
    found: Tensor = y.unflatten(-1, v.shape[-2:])
    return found


def contmix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    to_taps: Tensor,
    bias: Tensor,
    *,
    window: int = 7,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Filters from affinities: softmax(to_taps (scale q . k) + bias) over a window shifted into the grid.

    q [B, X, Y, H, D]; k [B, R, H, D], one for each of R regions; v [B, X, Y, H, Dv];
    to_taps [window^2, R]; bias [H, window^2].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    affinity = torch.einsum("bxyhd,brhd->bxyhr", q * scale, k)
    weights = torch.softmax(F.linear(affinity, to_taps) + bias, dim=-1)
    return local_mix(weights, v, window, border="shift", implementation=implementation)


def dynamic(
    x: Tensor, logits: Tensor, *, causal: bool = True, implementation: str | None = None
) -> Tensor:
    """Softmax filters for each token and head: x [B, L, H, D], logits [B, L, H, K]."""
    weights = torch.softmax(logits, dim=-1)
    return local_mix(weights, x, logits.shape[-1], causal=causal, implementation=implementation)


def light(
    x: Tensor, logits: Tensor, *, causal: bool = True, implementation: str | None = None
) -> Tensor:
    """One softmax filter for each head: x [B, L, H, D], logits [H, K]."""
    weights = torch.softmax(logits, dim=-1)
    y = convolve(x.flatten(-2), weights, causal=causal, implementation=implementation)
    found: Tensor = y.unflatten(-1, x.shape[-2:])
    return found


def long_convolution(
    x: Tensor,
    filter: Tensor,
    skip: Tensor,
    *,
    squash: float = 0.1,
    implementation: str | None = None,
) -> Tensor:
    """Causal, with taps shrunk towards 0 by `squash`: x [B, L, C], filter [C, K], skip [C]."""
    return fftconv(x, F.softshrink(filter, squash), skip=skip, implementation=implementation)


def fourier_mixer(x: Tensor, weight: Tensor, *, implementation: str | None = None) -> Tensor:
    """irfftn(W rfftn(x)): x [B, *grid, C], weight [C, *frequencies, 2] of real and imaginary parts."""
    spectrum = torch.view_as_complex(weight.contiguous())
    return fftconv(x, spectrum, causal=False, implementation=implementation)


def _identity_tap(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """[C, *window] with a 1 in the middle"""
    place = 0
    for k in window:
        place = place * k + k // 2
    tap = x.new_zeros(x.shape[-1], math.prod(window))
    tap[:, place] = 1.0
    return tap.view(-1, *window)


def _image(draw: Draw, channels: int = 3) -> Tensor:
    return draw.normal(2, draw.integer(3, 9), draw.integer(3, 9), channels)


def _gates_itself(draw: Draw) -> Claim:
    def left(x: Tensor) -> Tensor:
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        return lka(x, _identity_tap(x, (5, 5)), _identity_tap(x, (7, 7)), eye)

    return Claim((_image(draw),), left, lambda x: x * x)


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
    x = _image(draw)
    shapes = ((13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
    filters = tuple(draw.normal(3, k, k) for k, _ in shapes)

    def apart(x: Tensor, *filters: Tensor) -> Tensor:
        parts = [convolve(x, f, dilation=r) for f, (_, r) in zip(filters, shapes, strict=True)]
        return torch.stack(parts).sum(0)

    return Claim((x, *filters), merged_branches, apart)


def _sum_of_two(draw: Draw) -> Claim:
    filters = draw.normal(3, 9, 9), draw.normal(3, 5, 5)
    return Claim((_image(draw), *filters), replk, lambda x, f, g: convolve(x, f) + convolve(x, g))


def _untouched(draw: Draw) -> Claim:
    x = _image(draw, 8)

    def left(x: Tensor) -> Tensor:
        taps = (_identity_tap(x[..., :2], k) for k in ((3, 3), (1, 5), (5, 1)))
        return inception(x, *taps)

    return Claim((x,), left, lambda x: x)


def _two_matrices(draw: Draw) -> Claim:
    x = _image(draw)
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


def _mean_of_window(draw: Draw) -> Claim:
    q, v = draw.normal(1, 9, 8, 2, 3), draw.normal(1, 9, 8, 2, 4)
    k, maps = draw.normal(1, 5, 2, 3), torch.zeros(49, 5, dtype=torch.float64)

    def left(v: Tensor) -> Tensor:
        return contmix(q, k, v, maps, torch.zeros(2, 49, dtype=torch.float64))

    def right(v: Tensor) -> Tensor:
        return local_mix(torch.full((1, 9, 8, 2, 49), 1 / 49, dtype=v.dtype), v, 7, border="shift")

    return Claim((v,), left, right)


def _same_for_all(draw: Draw) -> Claim:
    length = draw.integer(1, 20)
    return Claim(
        (draw.normal(2, length, 2, 3), draw.normal(2, 4)),
        lambda x, logits: dynamic(x, logits.expand(2, length, 2, 4)),
        light,
    )


def _moving_average(draw: Draw) -> Claim:
    x = draw.normal(2, draw.integer(1, 20), 2, 3)

    def average(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, 2, 0))
        return padded.unfold(1, 3, 1).sum(-1) / 3

    return Claim((x,), lambda x: light(x, torch.zeros(2, 3, dtype=x.dtype)), average)


def _one_tap(draw: Draw) -> Claim:
    x = draw.normal(2, draw.integer(1, 20), 2, 3)
    return Claim((x,), lambda x: dynamic(x, torch.zeros_like(x[..., :1])), lambda x: x)


def _delay(draw: Draw) -> Claim:
    x = draw.normal(2, draw.integer(4, 20), 3)

    def left(x: Tensor) -> Tensor:
        filter = torch.zeros(3, x.shape[1], dtype=x.dtype)
        filter[:, 2] = 1.1
        return long_convolution(x, filter, torch.zeros(3, dtype=x.dtype))

    return Claim((x,), left, lambda x: F.pad(x, (0, 0, 2, 0))[:, : x.shape[1]])


def _short_filter(draw: Draw) -> Claim:
    return Claim(
        (draw.normal(2, draw.integer(5, 20), 3), draw.normal(3, 4), draw.normal(3)),
        lambda x, f, d: long_convolution(x, f, d, squash=0.0),
        lambda x, f, d: convolve(x, f.flip(1), causal=True) + d * x,
    )


def _without_mask(draw: Draw) -> Claim:
    zero = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    return Claim(
        (_image(draw, 6),),
        lambda x: frequency_filter(x, zero, zero[..., 0], zero, zero[..., 0]),
        lambda x: x,
    )


def _constant_mask(draw: Draw) -> Claim:
    zero = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    mask = zero[..., 0].clone()
    mask[0] = 1.01
    return Claim(
        (_image(draw, 6),),
        lambda x: frequency_filter(x, zero, zero[..., 0], zero, mask),
        lambda x: 2 * x,
    )


def _flat_spectrum(draw: Draw) -> Claim:
    x = draw.normal(1, 3, 4, draw.integer(3, 6), 2)

    def left(x: Tensor) -> Tensor:
        ones = torch.ones(2, *x.shape[1:3], x.shape[3] // 2 + 1, dtype=x.dtype)
        return fourier_mixer(x, torch.stack([ones, torch.zeros_like(ones)], -1))

    return Claim((x,), left, lambda x: x)


def _static(*windows: tuple[int, ...]) -> Shapes:
    """x and a filter of each window."""

    def shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
        width = shape["heads"] * shape["head_dim"]
        return ((1, *shape["grid"], width), *((width, *window) for window in windows))

    return shapes


def _lka_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width = shape["heads"] * shape["head_dim"]
    return (*_static((5, 5), (7, 7))(shape), (width, width))


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


def _contmix_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    heads, dim = shape["heads"], shape["head_dim"]
    tokens = (1, *shape["grid"], heads, dim)
    return (tokens, (1, 49, heads, dim), tokens, (49, 49), (heads, 49))


def _dynamic_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    tokens = (1, *shape["grid"], shape["heads"])
    return ((*tokens, shape["head_dim"]), (*tokens, 31))


def _light_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    heads = shape["heads"]
    return ((1, *shape["grid"], heads, shape["head_dim"]), (heads, 31))


def _long_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width, (length,) = shape["heads"] * shape["head_dim"], shape["grid"]
    return ((1, length, width), (width, length), (width,))


def _frequency_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width = shape["heads"] * shape["head_dim"]
    maps = (2, 8, width // 8, width // 8)
    return ((1, *shape["grid"], width), maps, maps[:-1], maps, maps[:-1])


def _mixer_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width, grid = shape["heads"] * shape["head_dim"], tuple(shape["grid"])
    return ((1, *grid, width), (width, *grid[:-1], grid[-1] // 2 + 1, 2))


def _shape(grid: tuple[int, ...], heads: int, head_dim: int) -> Mapping[str, Any]:
    return {"grid": grid, "heads": heads, "kv_heads": heads, "head_dim": head_dim}


def _entry(
    name: str,
    title: str,
    year: int,
    paper: str,
    summary: str,
    op: Callable[..., Tensor],
    operands: Shapes,
    shape: Mapping[str, Any],
    *identities: Identity,
    kind: str = "operator",
    layer: type[torch.nn.Module] | None = None,
) -> System:
    return System(
        name=name,
        title=title,
        year=year,
        paper=paper,
        kind=kind,
        summary=summary,
        op=op,
        identities=identities,
        reference_shapes=(shape,),
        layer=layer,
        family="convolution",
        engine="convolution",
        operands=operands,
    )


SYSTEMS: tuple[System, ...] = (
    _entry(
        "lka", "Visual Attention Network", 2022, "2202.09741",
        "A 5x5 filter, a 7x7 filter dilated by 3 and a linear map gate the input.",
        lka, _lka_shapes, _shape((56, 56), 1, 64),
        Identity("gates_itself", "with taps and a map of 1, y = x x", _gates_itself),
        Identity("one_large_filter", "11 tokens from the border, one 23x23 filter", _one_large_filter),
        layer=VANAttention,
    ),
    _entry(
        "unireplk", "UniRepLKNet", 2023, "2311.15599",
        "A 13x13 filter with small dilated ones beside it, merged to one.",
        merged_branches, _static((13, 13), (5, 5), (7, 7), (3, 3), (3, 3), (3, 3)),
        _shape((56, 56), 1, 96),
        Identity("sum_of_branches", "the merged filter is the sum of all branches", _sum_of_branches),
        kind="model", layer=UniRepLKBlock,
    ),
    _entry(
        "replk", "RepLKNet", 2022, "2203.06717",
        "A 31x31 filter with a 5x5 one beside it, merged to one.",
        replk, _static((31, 31), (5, 5)), _shape((56, 56), 1, 128),
        Identity("sum_of_branches", "the merged filter is the sum of both", _sum_of_two),
        kind="model", layer=RepLKBlock,
    ),
    _entry(
        "inception_dwconv", "InceptionNeXt", 2023, "2303.16900",
        "Channels in four groups: untouched, a square, a row and a column of taps.",
        inception, _inception_shapes, _shape((56, 56), 1, 96),
        Identity("untouched", "with filters of one tap 1, y = x", _untouched),
        kind="model", layer=InceptionConvolution,
    ),
    _entry(
        "parc_oversized", "ParCNetV2", 2022, "2211.07157",
        "A column and a row of taps nearly twice as long as the grid: position from the border.",
        oversize, _oversize_shapes, _shape((28, 28), 1, 128),
        Identity("two_matrices", "y = T_h x T_w^T with Toeplitz matrices", _two_matrices),
        kind="model", layer=OversizeConvolution,
    ),
    _entry(
        "lkca", "LKCA", 2024, "2401.05738",
        "Attention whose weights are one large filter per head, the same for every token.",
        lkca, _lkca_shapes, _shape((14, 14), 3, 64),
        Identity("shared_weights", "the same weights given token by token", _shared_weights),
    ),
    _entry(
        "contmix", "OverLoCK", 2025, "2502.20087",
        "Filters for every token from its affinities to regions of a context.",
        contmix, _contmix_shapes, _shape((28, 28), 4, 32),
        Identity("mean_of_window", "a map of zeros averages the window", _mean_of_window),
        kind="model", layer=ContextMixing,
    ),
    _entry(
        "dynamic_conv", "Dynamic convolutions", 2019, "1901.10430",
        "A softmax filter for every token and head, from the token itself.",
        dynamic, _dynamic_shapes, _shape((1024,), 16, 64),
        Identity("same_for_all", "the same logits for all tokens are a light convolution", _same_for_all),
        Identity("one_tap", "a filter of one tap is the identity", _one_tap),
        layer=DynamicConvolution,
    ),
    _entry(
        "light_conv", "Lightweight convolutions", 2019, "1901.10430",
        "One softmax filter per head.",
        light, _light_shapes, _shape((1024,), 16, 64),
        Identity("moving_average", "equal logits average the last tokens", _moving_average),
        layer=LightweightConvolution,
    ),
    _entry(
        "flash_butterfly", "Simple hardware-efficient long convolutions", 2023, "2302.06646",
        "A causal filter as long as the sequence, its taps shrunk towards 0.",
        long_convolution, _long_shapes, _shape((1024,), 1, 768),
        Identity("delay", "one tap of 1 at lag 2 is a delay by 2", _delay),
        Identity("short_filter", "a short filter is the direct convolution", _short_filter),
        layer=LongConvolution,
    ),
    _entry(
        "aff", "Adaptive frequency filters", 2023, "2307.14008",
        "A mask for every frequency, predicted from the spectrum it multiplies.",
        frequency_filter, _frequency_shapes, _shape((28, 28), 1, 96),
        Identity("without_mask", "maps of zeros leave x", _without_mask),
        Identity("constant_mask", "a mask of 1 adds x once more", _constant_mask),
        layer=FrequencyFilter,
    ),
    _entry(
        "fourier_mixer_3d", "Frequency domain learning in 3-D vessel segmentation", 2024, "arXiv not known",
        "A learned weight for every frequency of a volume.",
        fourier_mixer, _mixer_shapes, _shape((32, 32, 32), 1, 16),
        Identity("flat_spectrum", "weights of 1 leave x", _flat_spectrum),
    ),
)  # fmt: skip
