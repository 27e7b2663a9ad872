"""Layers of learned sparse attention: spans at anchors, cores, scored keys, factored tiles, chosen heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import OptionError, SelectionError
from foveal._judged import judged, need_dtype, need_shape
from foveal.compose.merge import merge
from foveal.layers.heads import MultiHead, Projections
from foveal.layers.trainable_sparse_blocks import ranks
from foveal.layers.trainable_sparse_gates import polar_heads
from foveal.layers.trainable_sparse_tokens import (
    GateOn,
    core_context,
    monarch_attention,
    sparsek_attention,
)
from foveal.patterns import Chosen, Sliding, SpanSelection
from foveal.selectors import Stripes


@judged
def superlinear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    search_q: Tensor | None = None,
    *,
    anchors: int = 3,
    first: int = 8,
    exponent: float = 2.0,
    backward: float = 2.0,
) -> Tensor:
    """o_t = sum_r softmax_r(search_q_t . k_a_r) softmax(q_t k over window and span r) v.

    Anchors are the best `anchors` of the keys at t + 1 - i^exponent, i > first, by unscaled products; the
    span of anchor a is [a - ceil(backward sqrt(t + 1)), a], cut before the window of (first + 1)^exponent
    - 1 tokens, at least the query's own.  Without an anchor the window alone counts.  The anchors' softmax
    carries the gradient of the search.
    Shapes: q and search_q [B, L, Hq, D] (None: q), k [B, L, Hkv, D], v [B, L, Hkv, Dv].
    Paper: Superlinear Multi-Step Attention (2026).
    """
    search_q = q if search_q is None else search_q
    need_shape("search_q", search_q, tuple(q.shape), like=q)
    need_dtype(q, search_q=search_q)
    if anchors < 1:
        raise OptionError("anchors", anchors, "at least 1 is needed")
    if not (backward >= 0 and math.isfinite(backward)):
        raise OptionError("backward", backward, "a finite number of at least 0 is needed")
    place, logits = Stripes(exponent, first).anchors(search_q, k)
    window = int((first + 1) ** exponent) - 1
    near = attend(q, k, v, Sliding(max(window - 1, 0)), return_lse=True)
    count = min(anchors, place.shape[1])
    if count == 0:
        return near[0]
    best = logits.topk(count, dim=-1)
    weights = torch.softmax(best.values.masked_fill(best.values == -torch.inf, -1e30), dim=-1)
    position = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
    reach = torch.ceil(backward * (position + 1).double().sqrt()).long()[:, None]
    chosen = place.expand(*logits.shape[:2], -1, -1).gather(-1, best.indices)
    before = (position - max(window, 1) + 1)[:, None]  # the first key of the window
    starts = (chosen - reach).clamp(min=0)
    stops = torch.where(chosen < 0, 0, (chosen + 1).minimum(before)).clamp(min=0)
    total = torch.zeros_like(near[0])
    for r in range(count):
        spans = SpanSelection(starts[..., r : r + 1].int(), stops[..., r : r + 1].int())
        far = attend(q, k, v, Chosen(spans), return_lse=True)
        joined = merge((near[0], far[0]), (near[1], far[1]))[0]
        total = total + weights[..., r].transpose(1, 2)[..., None].to(joined.dtype) * joined
    return total


class SuperlinearAttention(Projections):
    """`superlinear` between projections, with queries of their own for the search.

    Shapes: x and y [B, L, dim].  Options as of `superlinear`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        anchors: int = 3,
        first: int = 8,
        exponent: float = 2.0,
        backward: float = 2.0,
    ) -> None:
        super().__init__(dim, heads)
        self.search = nn.Linear(dim, dim)
        self.anchors, self.first = anchors, first
        self.exponent, self.reach = exponent, backward

    def forward(self, x: Tensor) -> Tensor:
        search = self.search(x).unflatten(-1, (self.heads, -1))
        return self.join(
            superlinear(
                *self.split(x), search, anchors=self.anchors, first=self.first,
                exponent=self.exponent, backward=self.reach,
            )
        )  # fmt: skip


class CoreContextAttention(MultiHead):
    """`core_context` between projections.

    Shapes: x and y [B, L, dim].
    """

    def __init__(self, dim: int, heads: int, *, group: int = 16, window: int = 1024) -> None:
        super().__init__(dim, heads)
        self.group, self.window = group, window

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return core_context(q, k, v, group=self.group, window=self.window)


class SparseKAttention(Projections):
    """`sparsek_attention` between projections, with scores u_j = w x_j + e j per head.

    Shapes: x and y [B, L, dim].
    Options: e, the slope over positions, starts at `slope`; the others as of `sparsek_attention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        keys: int = 256,
        window: int = 0,
        gate_on: GateOn = "v",
        slope: float = 0.0,
    ) -> None:
        super().__init__(dim, heads)
        self.keys, self.window, self.gate_on = keys, window, gate_on
        # One number added to all scores would change nothing.
        self.score = nn.Linear(dim, heads, bias=False)
        self.slope = nn.Parameter(torch.full((heads,), slope))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 counts to 256
        place = torch.arange(x.shape[1], device=x.device, dtype=wide)
        scores = self.score(x).to(wide) + place[:, None] * self.slope
        o = sparsek_attention(
            *self.split(x), scores, keys=self.keys, window=self.window, gate_on=self.gate_on
        )
        return self.join(o)


class MonarchAttention(MultiHead):
    """`monarch_attention` between projections.

    Shapes: x and y [B, tiles * rows * columns, dim].
    """

    def __init__(self, dim: int, heads: int, *, rows: int, columns: int) -> None:
        super().__init__(dim, heads)
        self.rows, self.columns = rows, columns

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return monarch_attention(q, k, v, rows=self.rows, columns=self.columns)


class PolarAttention(Projections):
    """`polar_heads` between projections; a small net on the last token says which heads are computed.

    The net learns by `router_loss(layer.scores(x), layer.sizes(x))` on a frozen layer.
    Shapes: x and y [B, L, dim].
    Options: kept, heads that are computed; hidden, the width of the net.
    """

    def __init__(self, dim: int, heads: int, *, kept: int, hidden: int = 64) -> None:
        super().__init__(dim, heads)
        if not 1 <= kept <= heads:
            raise SelectionError("kept", kept, f"1 to {heads} heads are needed")
        self.kept = kept
        self.router = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(polar_heads(*self.split(x), self.scores(x), heads=self.kept))

    def scores(self, x: Tensor) -> Tensor:
        """[B, heads]"""
        found: Tensor = self.router(x.detach()[:, -1])
        return found

    def sizes(self, x: Tensor) -> Tensor:
        """Norms of the outputs of all heads at the last token, [B, heads], without gradient."""
        with torch.no_grad():
            q, k, v = self.split(x)
            o = polar_heads(q, k, v, q.new_zeros(len(q), self.heads), heads=self.heads)
            found: Tensor = o[:, -1].norm(dim=-1)
            return found


def router_loss(scores: Tensor, sizes: Tensor, kept: int) -> Tensor:
    """Binary cross entropy of the heads against being among the `kept` of largest output.

    Shapes: scores and sizes [B, heads].
    Paper: Polar Sparsity (2505.14884).
    """
    target = (ranks(sizes) < kept).to(scores.dtype)
    return nn.functional.binary_cross_entropy_with_logits(scores, target)
