"""Layers over groups of tokens: scales of a picture, trees of documents, boxes of voxels, head shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import DtypeError, PatternError, ShapeError
from foveal.layers.heads import MultiHead, Projections, each
from foveal.patterns import Documents, Tree
from foveal.patterns.scales import Grid, Scales, Sees

PADDING, TOKEN, SENTENCE, SECTION, DOCUMENT = range(5)
"""Kinds of tokens of a hierarchical document: padding, a word, and the anchors of each level."""


class ScaleAttention(MultiHead):
    """Attention over the scales of a picture in one sequence, as `Scales` says.

    Shapes: x and y [B, L, dim] with L the tokens of all scales, small ones first.
    Options: sees "before" as in VAR, "own" as in HMAR, with a window as in MVAR.
    Paper: VAR (2404.02905), HMAR (2506.04421), MVAR (2505.12742).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        scales: tuple[int | Grid, ...],
        sees: Sees = "own",
        window: int | None = None,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, dropout=dropout)
        self.pattern = Scales(scales, sees, window)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern)


def document_groups(kinds: Tensor) -> Tensor:
    """The groups of hierarchical documents: level 0 sentences, 1 sections, 2 the document.

    A sentence holds its words and its anchor; a section the anchors of its sentences and its own; the
    document the anchors of its sections and its own.  An anchor stands before what it heads.

    Shapes: kinds int64 [..., L] of PADDING, TOKEN, SENTENCE, SECTION, DOCUMENT; returns [..., 3, L], -1
    where a token is no member.
    """
    sentence, section = ((kinds == kind).cumsum(-1) for kind in (SENTENCE, SECTION))
    levels = (
        (sentence, (kinds == TOKEN) | (kinds == SENTENCE)),
        (section, (kinds == SENTENCE) | (kinds == SECTION)),
        (torch.zeros_like(section), (kinds == SECTION) | (kinds == DOCUMENT)),
    )
    return torch.stack([torch.where(member, number, -1) for number, member in levels], dim=-2)


def attend_groups(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor, implementation: str | None = None
) -> Tensor:
    """Attention among tokens that share a group on some level, every sample with groups of its own.

    Shapes: q [B, L, H, D], k, v [B, L, Hkv, .], groups int64 [levels, L] or [B, levels, L].  Samples with
    their own groups run as one sequence of B L tokens.
    """
    if groups.dim() == 2:
        return attend(q, k, v, Tree(groups), implementation=implementation)
    batch, length = q.shape[:2]
    if groups.shape[0] != batch or groups.shape[2] != length:
        raise ShapeError("groups", list(groups.shape), f"[{batch}, levels, {length}] is needed")
    apart = int(groups.max()) + 1 if groups.numel() else 1
    sample = torch.arange(batch, device=groups.device)[:, None, None]
    numbered = torch.where(groups >= 0, groups + sample * max(apart, 1), -1)
    tree = Tree(numbered.transpose(0, 1).flatten(1))
    packed = each(lambda x: x.flatten(0, 1)[None], q, k, v)
    o: Tensor = attend(*packed, tree, implementation=implementation)[0]
    by_sample: Tensor = o.unflatten(0, (batch, length))
    return by_sample


class HierarchicalAttention(Projections):
    """Attention inside sentences, among the anchors of a section, and among those of the document.

    Shapes: x and y [B, L, dim]; groups [levels, L] or [B, levels, L], as `document_groups` makes them.
    A token on no level gives the bias of the output map.
    Paper: HDT: Hierarchical Document Transformer (2407.08330).
    """

    def forward(self, x: Tensor, groups: Tensor) -> Tensor:
        return self.join(attend_groups(*self.split(x), groups))


def attend_boxes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coordinates: Tensor,
    box: int | tuple[int, ...] = 6,
    implementation: str | None = None,
) -> Tensor:
    """Attention among the voxels of each box, boxes of any number of voxels packed in one sequence.

    Shapes: q, k, v [1, N, H, D]; coordinates int64 [N, 1 + axes]: sample, then the place in the
    grid.
    Options: box, the side in voxels, one for all axes or one per axis.
    """
    if coordinates.is_floating_point() or coordinates.is_complex():
        raise DtypeError("coordinates", coordinates.dtype, "an integer dtype is needed")
    axes = coordinates.shape[-1] - 1 if coordinates.dim() else 0
    if coordinates.shape != (q.shape[1], axes + 1) or axes < 1 or q.shape[0] != 1:
        raise ShapeError(
            "coordinates", list(coordinates.shape), "[N, 1 + axes] and q [1, N, H, D] are needed"
        )
    sides = torch.tensor((1,) + ((box,) * axes if isinstance(box, int) else tuple(box)))
    whole = not (sides.is_floating_point() or isinstance(box, bool))
    if not whole or sides.shape != (axes + 1,) or bool((sides < 1).any()):
        raise PatternError("box", box, f"a side of at least 1 for each of {axes} axes is needed")
    cells = coordinates.div(sides.to(coordinates.device), rounding_mode="floor")
    _, owner, counts = torch.unique(cells, dim=0, return_inverse=True, return_counts=True)
    order = torch.argsort(owner, stable=True)
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    packed = each(lambda x: x[:, order], q, k, v)
    o = attend(*packed, Documents(), cu_seqlens=cu_seqlens, implementation=implementation)
    return o[:, torch.argsort(order)]


class BoxAttention(Projections):
    """x + attention(norm(x)), then y + mlp(norm(y)): the block of VoxelKP on active voxels.

    Shapes: x and y [N, dim]; coordinates int64 [N, 1 + axes], sample first.
    Options: box side in voxels; the MLP is `ratio` times as wide.
    Paper: VoxelKP (2312.08871).
    """

    def __init__(
        self, dim: int, heads: int = 4, box: int | tuple[int, ...] = 6, *, ratio: int = 4
    ) -> None:
        super().__init__(dim, heads)
        self.box = box
        self.norms = nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim)))
        self.mlp = nn.Sequential(
            nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)
        )

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        heads = self.split(self.norms[0](x)[None])
        x = x + self.join(attend_boxes(*heads, coordinates, self.box))[0]
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y
