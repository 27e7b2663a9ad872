"""Layers for long sequences: factorised causal attention, and overlapping chunks of documents."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal.compose.merge import merge
from foveal.layers.heads import MultiHead, Projections, each
from foveal.patterns import Causal, Documents, Fixed, Partition, Pattern, Rows, Sliding, Strided

Kind = Literal["strided", "fixed"]
Arrangement = Literal["split", "interleaved", "merged"]


def factors(kind: Kind, stride: int, summary: int) -> tuple[Pattern, Pattern]:
    """The near and the far pattern of a Sparse Transformer."""
    if kind == "strided":
        return Sliding(stride - 1), Strided(stride)
    return Partition(stride) & Causal(), Fixed(stride, summary)


def united(near: Pattern, far: Pattern) -> Pattern:
    """The union of the factors; the far factor of "fixed" holds the near one already."""
    return far if isinstance(far, Fixed) else near | far


def factorised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: Kind,
    stride: int,
    summary: int,
    arrangement: Arrangement,
    depth: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Attention with two patterns: in two halves of the heads, in alternate layers, or united.

    Shapes: q [B, L, H, D], k and v [B, L, Hkv, D]; split needs an even H, and an even Hkv or one.
    """
    near, far = factors(kind, stride, summary)
    whole = q.shape[1] == k.shape[1] >= 2 * stride

    def run(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        if whole and isinstance(pattern, Fixed):
            return _both_blocks(q, k, v, stride, summary, implementation)
        return attend(q, k, v, pattern, implementation=implementation)

    if arrangement == "interleaved":
        return run(q, k, v, far if depth % 2 else near)
    if arrangement == "merged":
        if whole and kind == "strided":
            return _both_strides(q, k, v, stride, implementation)
        return run(q, k, v, united(near, far))
    if q.shape[-2] % 2 or (k.shape[-2] > 1 and k.shape[-2] % 2):
        raise ShapeError(
            "q", list(q.shape), "an even number of heads is needed to give half to each pattern"
        )
    first, second = (each(partial(_half, number), q, k, v) for number in (0, 1))
    return torch.cat([run(*first, near), run(*second, far)], dim=-2)


def _both_strides(
    q: Tensor, k: Tensor, v: Tensor, stride: int, implementation: str | None
) -> Tensor:
    """The stride - 1 tokens before, and every stride-th token: two softmaxes merged.

    Tiles see few keys of either alone; of their union every tile would see some.
    """
    i = torch.arange(q.shape[1])
    before = Rows((i - stride + 1).clamp(min=0), i)
    parts = (
        attend(q, k, v, pattern, return_lse=True, implementation=implementation)
        for pattern in (before, Strided(stride))
    )
    return merge(*zip(*parts, strict=True))[0]


def _both_blocks(
    q: Tensor, k: Tensor, v: Tensor, stride: int, summary: int, implementation: str | None
) -> Tensor:
    """The own block, and the gathered last `summary` tokens of the blocks before it, merged."""
    block = torch.arange(q.shape[1]) // stride
    token = torch.arange(q.shape[1] // stride * stride).view(-1, stride)
    chosen = token[:, stride - summary :].flatten().to(k.device)
    nothing = torch.zeros_like(block)
    own = attend(
        q, k, v, Partition(stride) & Causal(), return_lse=True, implementation=implementation
    )
    earlier = attend(
        q, k[:, chosen], v[:, chosen], Rows(nothing, (block * summary).clamp(max=len(chosen))),
        return_lse=True, implementation=implementation,
    )  # fmt: skip
    return merge((own[0], earlier[0]), (own[1], earlier[1]))[0]


def _half(number: int, x: Tensor) -> Tensor:
    """The first or the second half of the heads; a single head is in both."""
    return x.chunk(2, dim=-2)[number] if x.shape[-2] > 1 else x


class SparseTransformerAttention(MultiHead):
    """Causal attention in two sparse factors.

    Shapes: x and y [B, L, dim].
    Options: kind "strided" (the last `stride` tokens; every stride-th token) or "fixed" (the own
    block of `stride` tokens; also the last `summary` tokens of every block); arrangement "split"
    gives each factor half of the heads, "interleaved" one factor per layer by the parity of
    `depth`, "merged" the union to every head.
    Paper: Generating Long Sequences with Sparse Transformers (1904.10509).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kind: Kind = "strided",
        *,
        stride: int = 128,
        summary: int = 8,
        arrangement: Arrangement = "split",
        depth: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, dropout=dropout)
        self.kind: Kind = kind
        self.stride = stride
        self.summary = summary
        self.arrangement: Arrangement = arrangement
        self.depth = depth

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return factorised(
            q, k, v, kind=self.kind, stride=self.stride, summary=self.summary,
            arrangement=self.arrangement, depth=self.depth,
        )  # fmt: skip


class ChunkedEncoder(nn.Module):
    """Transformer layers on overlapping chunks of documents, of which the middles are kept.

    Every chunk of `chunk` tokens is encoded together with `overlap` tokens on both sides; the
    overlap is recomputed for each chunk, so two layers are not two applications of one local
    pattern. Chunks and documents are packed one after the other: padding is never computed.

    Shapes: x and y [B, L, dim]; lengths int64 [B], the tokens before the padding, default L; y is 0
    on padding.  positions [chunk + 2 overlap, dim], learned, added by the place in the chunk.
    Equals: with one layer and no positions, one layer with Partition(chunk, before=overlap,
    after=overlap).
    Paper: Local Self-Attention over Long Text for Efficient Document Retrieval (2005.04908).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int = 2,
        *,
        chunk: int = 40,
        overlap: int = 5,
        hidden: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.overlap = overlap
        self.positions = nn.Parameter(torch.zeros(chunk + 2 * overlap, dim))
        self.layers = nn.ModuleList(
            _PackedLayer(dim, heads, hidden or dim, dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths = torch.full((x.shape[0],), x.shape[1]) if lengths is None else lengths
        packing = self._packed(lengths.tolist(), x.shape[1])
        tokens, places, cu_seqlens = (part.to(x.device) for part in packing)
        packed = (x.flatten(0, 1)[tokens] + self.positions[places])[None]
        for layer in self.layers:
            packed = layer(packed, cu_seqlens)
        kept = (places >= self.overlap) & (places < self.overlap + self.chunk)
        y = torch.zeros_like(x.flatten(0, 1)).index_copy(0, tokens[kept], packed[0, kept])
        return y.view_as(x)

    def _packed(self, lengths: list[int], stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token and place in its chunk of everything to encode, and where chunks begin."""
        tokens, places, sizes = [], [], [0]
        for row, length in enumerate(lengths):
            for start in range(0, length, self.chunk):
                first = max(start - self.overlap, 0)
                inside = torch.arange(first, min(start + self.chunk + self.overlap, length))
                tokens.append(inside + row * stride)
                places.append(inside - start + self.overlap)
                sizes.append(len(inside))
        nothing = torch.zeros(0, dtype=torch.int64)
        cu_seqlens = torch.tensor(sizes).cumsum(0).to(torch.int32)
        return torch.cat([*tokens, nothing]), torch.cat([*places, nothing]), cu_seqlens


class _PackedLayer(nn.Module):
    """Attention inside documents, then a feed-forward net, each added and normalised."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = _DocumentAttention(dim, heads, dropout=dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )
        self.norms = nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim)))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.norms[0](x + self.attention(x, cu_seqlens))
        y: Tensor = self.norms[1](x + self.drop(self.feed_forward(x)))
        return y


class _DocumentAttention(Projections):
    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.join(attend(*self.split(x), Documents(), cu_seqlens=cu_seqlens))
