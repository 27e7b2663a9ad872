"""Re-parameterisation: several small filters and norms as one filter, exact at the borders too.

Branches of zero-padded convolutions that read the same input add up to one filter, because each of them sees
the same zeros.  Strips along different axes in a row multiply to one.  Filters along the same axis in a
row do not merge: the second one sees zeros where the merged one would see what the first has
spread beyond the border.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import ShapeError
from foveal.layers.convolution import (
    ChannelNorm,
    DepthwiseConvolution,
    PointwiseConvolution,
    ResponseNorm,
    SqueezeExcitation,
)


class Branch(NamedTuple):
    """A filter [C, *window] with its bias [C] and the dilation of every axis."""

    filter: Tensor
    bias: Tensor
    dilation: int = 1


def fold_norm(branch: Branch, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Branch:
    """The branch with the running statistics of a batch norm behind it:
    filter gamma / sqrt(var + eps), beta + (bias - mean) gamma / sqrt(var + eps)."""
    if norm.running_var is None or norm.running_mean is None:
        raise ShapeError("norm", "no running statistics", "a norm that tracks them is needed")
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = (branch.bias - norm.running_mean) * factor
    if norm.bias is not None:
        bias = bias + norm.bias
    wide = factor.view(-1, *(1,) * (branch.filter.dim() - 1))
    return Branch(branch.filter * wide, bias, branch.dilation)


def undilated(filter: Tensor, dilation: int) -> Tensor:
    """The filter [C, *window] with the zeros of its dilation between the taps."""
    window = [dilation * (k - 1) + 1 for k in filter.shape[1:]]
    out = filter.new_zeros(len(filter), *window)
    out[(slice(None), *(slice(None, None, dilation),) * len(window))] = filter
    return out


def merge_parallel(branches: Sequence[Branch], window: Sequence[int] | None = None) -> Branch:
    """One filter that does what the sum of the branches does; `window`, by default the largest of them.

    Raises ShapeError where a branch is larger than the window or of another parity: its centre
    would lie between two taps.
    """
    filters = [undilated(branch.filter, branch.dilation) for branch in branches]
    sizes = tuple(max(f.shape[axis] for f in filters) for axis in range(1, filters[0].dim()))
    sizes = sizes if window is None else tuple(window)
    total = filters[0].new_zeros(len(filters[0]), *sizes)
    for each in filters:
        margins = [size - k for size, k in zip(sizes, each.shape[1:], strict=True)]
        if any(m < 0 or m % 2 for m in margins):
            needed = f"at most {list(sizes)} taps, and of the same parity, are needed"
            raise ShapeError("branches", list(each.shape[1:]), needed)
        total = total + F.pad(each, [m // 2 for m in reversed(margins) for _ in range(2)])
    return Branch(total, torch.stack([branch.bias for branch in branches]).sum(0))


def merge_strips(branches: Sequence[Branch]) -> Branch:
    """One filter that does what strips one behind the other do, each along axes of its own.

    Raises ShapeError where two of them run along one axis, or one that is not the last has a
    bias: neither merges exactly at the border.
    """
    filters = [undilated(branch.filter, branch.dilation) for branch in branches]
    total = filters[0]
    for before, each in zip(branches, filters[1:], strict=False):
        shared = [a for a in range(1, total.dim()) if total.shape[a] > 1 and each.shape[a] > 1]
        if shared:
            needed = "strips along different axes are needed: others differ at the border"
            raise ShapeError("branches", list(each.shape[1:]), needed)
        if bool(before.bias.detach().any()):
            needed = "zeros before the last strip are needed: others differ at the border"
            raise ShapeError("bias", "a bias between strips", needed)
        total = total * each
    return Branch(total, branches[-1].bias)


@runtime_checkable
class Mergeable(Protocol):
    """A module that knows one convolution that does the same in evaluation."""

    def merged(self) -> DepthwiseConvolution: ...


def convolution_of(branch: Branch) -> DepthwiseConvolution:
    """A module that computes the branch."""
    found = DepthwiseConvolution(
        len(branch.filter), tuple(branch.filter.shape[1:]), branch.dilation
    ).to(branch.filter)
    assert found.bias is not None
    with torch.no_grad():
        found.weight.copy_(branch.filter.unsqueeze(1))
        found.bias.copy_(branch.bias)
    return found


def merge(model: nn.Module) -> nn.Module:
    """A copy of the model, for evaluation, in which every `Mergeable` module is one convolution.

    Each of them is tried on random input in float64, on a grid smaller and one larger than its window; raises
    ArithmeticError where it does not do the same to rounding.
    """
    if isinstance(model, Mergeable):
        return _proved(model)
    found = copy.deepcopy(model).eval()
    for name, module in list(found.named_modules()):
        if isinstance(module, Mergeable):
            parent, _, own = name.rpartition(".")
            setattr(found.get_submodule(parent), own, _proved(module))
    return found


def _proved(module: Mergeable) -> DepthwiseConvolution:
    assert isinstance(module, nn.Module)
    exact = copy.deepcopy(module).double().eval()
    one = exact.merged()
    source = torch.Generator().manual_seed(0)
    window = tuple(one.weight.shape[2:])
    for grid in (tuple(max(k // 2, 1) for k in window), tuple(k + 3 for k in window)):
        x = torch.randn(1, *grid, len(one.weight), generator=source, dtype=torch.float64)
        x = x.to(one.weight.device)
        with torch.no_grad():
            wanted, got = exact(x), one(x)
        distance, size = float((got - wanted).abs().max()), float(wanted.abs().max())
        if not distance <= 1e-10 * max(size, 1.0):
            raise ArithmeticError(
                f"the merged convolution differs by {distance:.3g} on a grid of {list(grid)}"
            )
    dtype = next(module.parameters()).dtype
    return one.to(dtype).eval()


class _Normed(nn.Module):
    """A convolution and its norm, as `conv` and `bn`."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.conv = DepthwiseConvolution(dim, (window, window), bias=False)
        self.bn = ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y

    def branch(self) -> Branch:
        return normed_branch(self.conv, self.bn)


def normed_branch(conv: DepthwiseConvolution, norm: ChannelNorm) -> Branch:
    """A convolution with the norm behind it as one branch."""
    weight = conv.weight[:, 0]
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias
    dilation = conv.dilation if isinstance(conv.dilation, int) else conv.dilation[0]
    return fold_norm(Branch(weight, bias, dilation), norm)


class LargeKernelBranches(nn.Module):
    """y = bn(dw_KxK(x)) + bn(dw_kxk(x)), one K x K filter in evaluation.

    Shapes: x and y [B, H, W, dim].
    Options: window K; small k, None for no second branch.
    Equals: `merged()`, in evaluation.
    Paper: RepLKNet (2203.06717); the state dict of its code's `ReparamLargeKernelConv`.
    """

    def __init__(self, dim: int, window: int = 31, small: int | None = 5) -> None:
        super().__init__()
        self.lkb_origin = _Normed(dim, window)
        self.small_conv = None if small is None else _Normed(dim, small)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lkb_origin(x)
        return y if self.small_conv is None else y + self.small_conv(x)

    def merged(self) -> DepthwiseConvolution:
        branches = [self.lkb_origin.branch()]
        if self.small_conv is not None:
            branches.append(self.small_conv.branch())
        return convolution_of(merge_parallel(branches))


DILATED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}
"""Windows and dilations of the branches beside a large window, as UniRepLKNet chooses them."""


class DilatedBranches(nn.Module):
    """y = bn(dw_KxK(x)) + sum_m bn(dw_{k_m x k_m, dilated r_m}(x)), one K x K filter in evaluation.

    Shapes: x and y [B, H, W, dim].
    Options: window K; branches (k_m, r_m), None for those of UniRepLKNet.
    Equals: `merged()`, in evaluation.
    Paper: UniRepLKNet (2311.15599); the state dict of its code's `DilatedReparamBlock`.
    """

    def __init__(
        self, dim: int, window: int = 13, branches: Sequence[tuple[int, int]] | None = None
    ) -> None:
        super().__init__()
        if branches is None and window not in DILATED_BRANCHES:
            needed = f"one of {sorted(DILATED_BRANCHES)}, or branches, are needed"
            raise ShapeError("window", window, needed)
        self.branches = tuple(DILATED_BRANCHES[window] if branches is None else branches)
        self.lk_origin = DepthwiseConvolution(dim, (window, window), bias=False)
        self.origin_bn = ChannelNorm(dim)
        for k, r in self.branches:
            if r * (k - 1) + 1 > window or (r * (k - 1) + 1 - window) % 2:
                needed = f"at most {window} taps, and of the same parity, are needed"
                raise ShapeError("branches", (k, r), needed)
            own = DepthwiseConvolution(dim, (k, k), r, bias=False)
            self.add_module(f"dil_conv_k{k}_{r}", own)
            self.add_module(f"dil_bn_k{k}_{r}", ChannelNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.origin_bn(self.lk_origin(x))
        for conv, norm in self._pairs():
            y = y + norm(conv(x))
        return y

    def merged(self) -> DepthwiseConvolution:
        pairs = [(self.lk_origin, self.origin_bn), *self._pairs()]
        return convolution_of(merge_parallel([normed_branch(*pair) for pair in pairs]))

    def _pairs(self) -> list[tuple[DepthwiseConvolution, ChannelNorm]]:
        found = []
        for k, r in self.branches:
            conv = self.get_submodule(f"dil_conv_k{k}_{r}")
            norm = self.get_submodule(f"dil_bn_k{k}_{r}")
            assert isinstance(conv, DepthwiseConvolution)
            assert isinstance(norm, ChannelNorm)
            found.append((conv, norm))
        return found


class _PointwiseNormed(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = PointwiseConvolution(dim, out, bias=False)
        self.bn = ChannelNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class RepLKBlock(nn.Module):
    """y = x + W_2 relu(large kernel(relu(W_1 bn(x)))), a norm behind each map.

    Shapes: x and y [B, H, W, dim].
    Options: hidden, the width of the large kernel (dim); window and small as `LargeKernelBranches`.
    Paper: RepLKNet (2203.06717); the state dict of its code's `RepLKBlock`.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, window: int = 31, small: int | None = 5
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.prelkb_bn = ChannelNorm(dim)
        self.pw1 = _PointwiseNormed(dim, hidden)
        self.large_kernel = LargeKernelBranches(hidden, window, small)
        self.pw2 = _PointwiseNormed(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.pw1(self.prelkb_bn(x)))
        y: Tensor = x + self.pw2(F.relu(self.large_kernel(hidden)))
        return y


class UniRepLKBlock(nn.Module):
    """y = x + gamma bn(W_2 grn(gelu(W_1 se(bn(dw(x)))))), dw with dilated branches from 7 x 7 on.

    Shapes: x and y [B, H, W, dim].
    Options: window; expansion of the feed-forward; scale, the first value of gamma.
    Paper: UniRepLKNet (2311.15599); the state dict of its code's `UniRepLKNetBlock`.
    """

    def __init__(self, dim: int, window: int = 13, expansion: int = 4, scale: float = 1e-6) -> None:
        super().__init__()
        self.dwconv: nn.Module
        if window >= 7:
            self.dwconv = DilatedBranches(dim, window)
        else:
            self.dwconv = DepthwiseConvolution(dim, (window, window), bias=False)
        self.norm = ChannelNorm(dim)
        self.se = SqueezeExcitation(dim, dim // 4)
        hidden = expansion * dim
        self.pwconv1 = nn.Sequential(nn.Identity(), nn.Linear(dim, hidden))
        self.act = nn.Sequential(nn.GELU(), ResponseNorm(hidden))
        self.pwconv2 = nn.Sequential(
            nn.Linear(hidden, dim, bias=False), nn.Identity(), ChannelNorm(dim)
        )
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.se(self.norm(self.dwconv(x)))
        y: Tensor = x + self.gamma * self.pwconv2(self.act(self.pwconv1(hidden)))
        return y
