"""Attention on key blocks chosen by pooled scores: what is left out is dropped, made linear, or pooled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import OptionError, SelectionError, ShapeError
from foveal._judged import judged, need_dtype, need_shape
from foveal._shares import share_of
from foveal.compose.merge import merge
from foveal.layers.heads import MultiHead
from foveal.patterns import Blocks, BlockSelection, Causal, Pattern
from foveal.scores import KeyBias, Softmax
from foveal.selectors.budgets import check_levels

Rest = Literal["marginal", "complement", "all"]
Feature = Literal["softmax", "elu", "relu"]
Levels = tuple[tuple[int, float], ...]
_ROWS_AT_ONCE = 64
"""Blocks of queries whose sampled scores are in memory at once."""


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """Means [B, ceil(L / block), H, D] of the blocks of x [B, L, H, D]; the last one may be short."""
    whole = x.shape[1] // block * block
    parts = [x[:, :whole].unflatten(1, (-1, block)).mean(2)] if whole else []
    if whole < x.shape[1]:
        parts.append(x[:, whole:].mean(1, keepdim=True))
    return torch.cat(parts, dim=1) if parts else x[:, :0]


def ranks(scores: Tensor) -> Tensor:
    """0 for the largest of the last axis, 1 for the next, ...; ties go to the lower index first."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1)


def spread_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, heads, D] of x [B, L, Hkv, D]"""
    if heads % x.shape[2]:
        raise ShapeError("k", list(x.shape), f"its heads must divide the {heads} query heads")
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def block_map(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Softmax over key blocks of the scores of pooled tokens.  [B, Hq, q_blocks, kv_blocks], no gradient"""
    with torch.no_grad():
        pooled_q, pooled_k = pool_blocks(q, block), pool_blocks(spread_heads(k, q.shape[2]), block)
        scores = torch.einsum("bihd,bjhd->bhij", pooled_q, pooled_k) * q.shape[-1] ** -0.5
        return torch.softmax(scores, dim=-1)


def _features(x: Tensor, feature: Feature) -> Tensor:
    if feature == "softmax":
        return torch.softmax(x, dim=-1)
    return torch.nn.functional.elu(x) + 1 if feature == "elu" else torch.relu(x)


@judged
def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    block: int = 64,
    critical: float = 0.05,
    negligible: float = 0.10,
    rest: Rest = "marginal",
    feature: Feature = "softmax",
    implementation: str | None = None,
) -> Tensor:
    """o = softmax attention on critical blocks + (linear attention on the rest) W + b, not causal.

    Per block of queries the key blocks with the largest softmax(mean(q) mean(k)^T) are critical, the
    smallest negligible, those between marginal.  The linear part is phi(q) S / (phi(q) z) with S = sum
    phi(k) v^T and z = sum phi(k) over the blocks of `rest`; 0 where there are none.

    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv], weight W [Dv, Dv] (o_linear @ W), bias b
    [Dv]; both None leave the linear part out.
    Options: critical and negligible, shares of the key blocks, rounded up and down, at least one block
    critical; rest "marginal" (the paper), "complement" (all that is not critical) or "all"; feature
    softmax over channels, elu + 1 or relu.
    Cost: critical of dense, and 2 L (D Dv + blocks D Dv / block) for the states.
    Equals: dense attention at critical = 1 without the linear part.
    Paper: SLA (2509.24006).
    """
    heads = q.shape[2]
    _fit_linear(q, v, weight, bias)
    for name, value in (("critical", critical), ("negligible", negligible)):
        if not 0 <= value <= 1:
            raise OptionError(name, value, "a share from 0 to 1 is needed")
    scores = block_map(q, k, block)
    blocks = scores.shape[-1]
    place = ranks(scores)
    kept = max(1, min(blocks, share_of(blocks, critical)))
    dropped = min(blocks - kept, math.floor(negligible * blocks + 1e-9))
    selection = BlockSelection.from_block_mask(place < kept, block, block)
    o = attend(q, k, v, Blocks(selection), implementation=implementation)
    if weight is None and bias is None:
        return o
    if rest == "all":
        members = torch.ones_like(place, dtype=torch.bool)
    elif rest == "complement":
        members = place >= kept
    elif rest == "marginal":
        members = (place >= kept) & (place < blocks - dropped)
    else:
        raise SelectionError("rest", rest, '"marginal", "complement" or "all" is needed')
    linear = _block_linear(q, k, v, members, block, feature, heads)
    if weight is not None:
        o = o + linear @ weight
    return o if bias is None else o + bias


def _fit_linear(q: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    width = v.shape[-1]
    if weight is not None:
        need_shape("weight", weight, (width, width), like=q)
    if bias is not None:
        need_shape("bias", bias, (width,), like=q)
    need_dtype(q, weight=weight, bias=bias)


def _block_linear(
    q: Tensor, k: Tensor, v: Tensor, members: Tensor, block: int, feature: Feature, heads: int
) -> Tensor:
    """Linear attention of each block of queries on its `members` [B, H, q_blocks, kv_blocks]."""
    length = q.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    phi_q, phi_k = _features(q.to(wide), feature), _features(k.to(wide), feature)
    k_blocks, v_blocks = (_in_blocks(spread_heads(x, heads), block) for x in (phi_k, v.to(wide)))
    states = torch.einsum("bnthd,bnthe->bhnde", k_blocks, v_blocks)
    sums = k_blocks.sum(2).transpose(1, 2)  # [B, H, kv_blocks, D]
    chosen = members.to(wide)
    state = (chosen @ states.flatten(3)).unflatten(3, states.shape[3:])
    total = chosen @ sums
    q_blocks = _in_blocks(phi_q, block)
    above = torch.einsum("bnthd,bhnde->bnthe", q_blocks, state)
    below = torch.einsum("bnthd,bhnd->bnth", q_blocks, total)[..., None]
    o = above / torch.where(below == 0, 1.0, below)
    return o.flatten(1, 2)[:, :length].to(q.dtype)


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """[B, blocks, block, H, D] of x [B, L, H, D], zeros at the end."""
    missing = -x.shape[1] % block
    blocks: Tensor = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block))
    return blocks


class SparseLinearAttention(MultiHead):
    """`sparse_linear_attention` with W and b learned from zero, so that training starts at its sparse part.

    Shapes: x and y [B, L, dim].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        block: int = 64,
        critical: float = 0.05,
        negligible: float = 0.10,
        rest: Rest = "marginal",
        feature: Feature = "softmax",
    ) -> None:
        super().__init__(dim, heads)
        self.block, self.critical, self.negligible = block, critical, negligible
        self.rest: Rest = rest
        self.feature: Feature = feature
        self.weight = nn.Parameter(torch.zeros(dim // heads, dim // heads))
        self.bias = nn.Parameter(torch.zeros(dim // heads))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_linear_attention(
            q, k, v, self.weight, self.bias, block=self.block, critical=self.critical,
            negligible=self.negligible, rest=self.rest, feature=self.feature,
        )  # fmt: skip


def sampled_importance(
    q: Tensor,
    k: Tensor,
    q_block: int,
    kv_block: int,
    sample: float,
    causal: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """max over sampled pairs of a tile of s_ij - max_j s_ij.  [B, Hq, q_blocks, kv_blocks], -inf: hidden

    A share `sample` of the tokens of every block is looked at: evenly spaced, or drawn.
    """
    with torch.no_grad():
        Lq, Lk = q.shape[1], k.shape[1]
        rows = _sampled(Lq, q_block, sample, generator).to(q.device)
        columns = _sampled(Lk, kv_block, sample, generator).to(q.device)
        keys = spread_heads(k, q.shape[2])[:, columns]
        owner = columns // kv_block
        found = []
        for first in range(0, -(-Lq // q_block), _ROWS_AT_ONCE):
            stop = first + _ROWS_AT_ONCE
            own = rows[(rows // q_block >= first) & (rows // q_block < stop)]
            scores = torch.einsum("bihd,bjhd->bhij", q[:, own], keys) * q.shape[-1] ** -0.5
            if causal:
                hidden = columns > (own + Lk - Lq)[:, None]
                scores = scores.masked_fill(hidden, -torch.inf)
            largest = scores.amax(-1, keepdim=True)
            scores = scores - torch.where(largest == -torch.inf, 0.0, largest)
            of_keys = _largest_of(scores, owner, -(-Lk // kv_block), -1)
            of_both = _largest_of(
                of_keys, own // q_block - first, int(own[-1] // q_block) - first + 1, -2
            )
            found.append(of_both)
        return torch.cat(found, dim=2)


def _sampled(length: int, block: int, sample: float, generator: torch.Generator | None) -> Tensor:
    """Ascending tokens, about a share `sample` and at least one of every block."""
    step = max(1, round(1 / sample))
    if generator is None:
        token = torch.arange(length)
        return token[token % block % step == 0]
    place = torch.rand(-(-length // block), block, generator=generator).argsort(-1)
    chosen = (place < max(1, block // step)).flatten()[:length]
    chosen[::block] |= ~chosen.new_tensor(
        [bool(chosen[i : i + block].any()) for i in range(0, length, block)]
    )
    return chosen.nonzero()[:, 0]


def _largest_of(x: Tensor, owner: Tensor, count: int, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = count
    index = owner if axis == -1 else owner[:, None]
    return x.new_full(shape, -torch.inf).scatter_reduce(axis, index.expand_as(x), x, "amax")


@judged
def pyramid_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    levels: Levels = ((1, 0.10), (2, 0.15), (8, 0.35)),
    q_block: int = 128,
    kv_block: int = 64,
    sample: float = 0.25,
    causal: bool = False,
    generator: torch.Generator | None = None,
    implementation: str | None = None,
) -> Tensor:
    """One softmax over key blocks at several resolutions: at level h, means of h keys weigh h times.

    o_i = sum over blocks, groups g of exp(s(q_i, mean k_g) + ln h) mean v_g / Z.  Blocks are ranked per block
    of queries by the largest exp(s_ij - max_j s_ij) among sampled pairs; the best share comes at level 1, the
    next at the next level, and what is past the last share is skipped.

    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv].
    Options: levels, pairs (h, share of the blocks ranked up to here), h dividing kv_block; sample, share of
    tokens that ranking looks at, evenly spaced or drawn from `generator`; causal pools only blocks that lie
    before all queries of a block, the others come at level 1 and outside the shares.
    Cost: sum of shares / h of dense, and sample ** 2 / 2 for the ranking.
    Equals: block-sparse attention with one level 1; dense where keys are equal inside groups and all is kept.
    Paper: Pyramid Sparse Attention (2512.04025).
    """
    check_levels(levels)
    if any(kv_block % h for h, _ in levels):
        raise SelectionError("levels", levels, f"divisors of kv_block, {kv_block}, are needed")
    if not 0 < sample <= 1:
        raise OptionError("sample", sample, "a share above 0 and up to 1 is needed")
    importance = sampled_importance(q, k, q_block, kv_block, sample, causal, generator)
    blocks = importance.shape[-1]
    place = ranks(importance)
    near = torch.zeros_like(place, dtype=torch.bool)
    visible = ~near
    if causal:
        first = torch.arange(importance.shape[2]) * q_block + k.shape[1] - q.shape[1]
        start = torch.arange(blocks) * kv_block
        near = (start + kv_block > first[:, None]).to(q.device).expand_as(near)
        visible = (start < first[:, None] + q_block).to(q.device).expand_as(near)
        place = ranks(importance.masked_fill(near, -torch.inf))
    count = blocks - near.sum(-1, keepdim=True)
    outputs, lses, begin = [], [], torch.zeros_like(count)
    for h, until in levels:
        end = share_of(count, until)
        mask = (place >= begin) & (place < end) & ~near
        mask = mask | (near & visible) if h == 1 else mask
        begin = torch.maximum(begin, end)
        o, lse = _level(q, k, v, mask, h, q_block, kv_block, causal, implementation)
        outputs.append(o)
        lses.append(lse)
    if all(h != 1 for h, _ in levels) and causal:
        o, lse = _level(q, k, v, near & visible, 1, q_block, kv_block, causal, implementation)
        outputs.append(o)
        lses.append(lse)
    return outputs[0] if len(outputs) == 1 else merge(outputs, lses)[0]


def _level(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, h: int, q_block: int, kv_block: int,
    causal: bool, implementation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention on pooled keys of the blocks of `mask`, and its lse with ln h in it."""
    length = k.shape[1]
    selection = BlockSelection.from_block_mask(mask, q_block, kv_block // h)
    pattern: Pattern = Blocks(selection)
    score = Softmax(q.shape[-1] ** -0.5)
    if h == 1:
        pattern = pattern & Causal() if causal else pattern
        return attend(q, k, v, pattern, score, return_lse=True, implementation=implementation)
    size = length // h * h
    k, v = pool_blocks(k, h), pool_blocks(v, h)
    if size < length:
        # The last group is short: its mean weighs as many keys as it has.
        weight = q.new_zeros(1, 1, k.shape[1])
        weight[..., -1] = math.log((length - size) / h)
        o, lse = attend(
            q, k, v, pattern, score + KeyBias(weight), return_lse=True, implementation=implementation
        )  # fmt: skip
    else:
        o, lse = attend(q, k, v, pattern, score, return_lse=True, implementation=implementation)
    return o, lse + math.log(h)


class PyramidSparseAttention(MultiHead):
    """`pyramid_sparse_attention` between projections.

    Shapes: x and y [B, L, dim].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        levels: Sequence[tuple[int, float]] = ((1, 0.10), (2, 0.15), (8, 0.35)),
        q_block: int = 128,
        kv_block: int = 64,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, heads)
        self.levels = tuple(levels)
        self.q_block, self.kv_block, self.causal = q_block, kv_block, causal

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pyramid_sparse_attention(
            q, k, v, levels=self.levels, q_block=self.q_block, kv_block=self.kv_block,
            causal=self.causal,
        )  # fmt: skip
