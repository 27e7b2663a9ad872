"""Groups of tokens: documents as trees, neighbours of atoms."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import PatternError
from foveal._judged import judged
from foveal.layers.atoms import NeighbourAttention, attend_neighbours
from foveal.layers.groups import (
    DOCUMENT,
    SECTION,
    SENTENCE,
    TOKEN,
    HierarchicalAttention,
    attend_groups,
    document_groups,
)
from foveal.layers.heads import each
from foveal.patterns import Dense, Documents, Pattern, Tree
from foveal.scores import Score, Softmax
from foveal.systems.base import Claim, Draw, Identity, System


def regular_document(length: int, sentence: int, section: int) -> Tensor:
    """Kinds of the tokens of a document of equal sentences.  int64 [length]

    Options: words per sentence, sentences per section; each of them headed by an anchor.
    """
    for name, count in (("sentence", sentence), ("section", section)):
        if count < 1:
            raise PatternError(name, count, "at least 1 is needed")
    body = torch.full((1 + section * (1 + sentence),), TOKEN)
    body[0] = SECTION
    body[1 :: 1 + sentence] = SENTENCE
    count = -(-max(length - 1, 0) // len(body))
    return torch.cat([torch.tensor([DOCUMENT]), body.repeat(count)])[:length]


@judged
def hdt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    groups: Tensor | None = None,
    sentence: int = 31,
    section: int = 8,
    implementation: str | None = None,
) -> Tensor:
    """Attention among the tokens of a sentence, the anchors of a section, the anchors of a document.

    Shapes: q [B, L, H, D], k, v [B, L, Hkv, .]; groups int64 [levels, L] or [B, levels, L], -1 where a
    token is no member of a level (on no level: output 0).
    Options: without groups, those of `regular_document` with `sentence` words and `section` sentences.
    """
    if groups is None:
        groups = document_groups(regular_document(q.shape[1], sentence, section))
    return attend_groups(q, k, v, groups, implementation)


def _tree(
    grid: tuple[int, ...], *, groups: Tensor | None = None, sentence: int = 31, section: int = 8
) -> tuple[Pattern, Score]:
    if groups is None:
        groups = document_groups(regular_document(grid[0], sentence, section))
    return Tree(groups), Softmax()


def _one_group(draw: Draw) -> Claim:
    length = draw.integer(2, 9)
    whole = torch.zeros(1, length, dtype=torch.int64)
    return Claim(draw.qkv((length,)), lambda q, k, v: hdt(q, k, v, groups=whole), attend)


def _documents(draw: Draw) -> Claim:
    first, second = draw.integer(1, 5), draw.integer(1, 5)
    numbers = torch.tensor([[0] * first + [1] * second])
    cut = torch.tensor([0, first, first + second], dtype=torch.int32)
    return Claim(
        draw.qkv((first + second,)),
        lambda q, k, v: hdt(q, k, v, groups=numbers),
        lambda q, k, v: attend(q, k, v, Documents(), cu_seqlens=cut),
    )


def _samples(draw: Draw) -> Claim:
    groups = torch.stack([draw.permutation(12).reshape(2, 6) // 4 for _ in range(2)])

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [
            hdt(*each(lambda x, n=n: x[n : n + 1], q, k, v), groups=groups[n])  # type: ignore[misc]
            for n in range(2)
        ]
        return torch.cat(rows)

    return Claim(draw.qkv((6,)), lambda q, k, v: hdt(q, k, v, groups=groups), one_by_one)


HDT = System(
    name="hdt",
    title="HDT: Hierarchical Document Transformer",
    year=2024,
    paper="He, Flicke, Buchmann, Gurevych, Geiger; arXiv 2407.08330",
    kind="operator",
    summary="Words attend inside their sentence, sentence anchors inside their section, section "
    "anchors inside the document; every sample has a tree of its own, with any number of levels.",
    op=hdt,
    compose=_tree,
    layer=HierarchicalAttention,
    identities=(
        Identity("one_group", "One level with one group is dense attention.", _one_group),
        Identity("documents", "A level of document numbers is packed attention.", _documents),
        Identity("samples", "A batch of trees is every sample with its own tree.", _samples),
    ),
    reference_shapes=({"grid": (8192,), "heads": 12, "kv_heads": 12, "head_dim": 64},),
)


@judged
def escaip(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distances: Tensor,
    *,
    cutoff: float = 6.0,
    angle_weight: Tensor | None = None,
    directions: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention among the edges of each atom; an edge counts less the longer it is, 0 at the cut-off.

    Shapes: q, k, v [atoms, edges, H, D]; distances [atoms, edges]; angle_weight [H] with directions
    [atoms, edges, 3], unit vectors.
    Options: cutoff in the unit of the distances; implementation="reference" for second derivatives.
    """
    return attend_neighbours(
        q,
        k,
        v,
        distances,
        cutoff,
        angle_weight=angle_weight,
        directions=directions,
        implementation=implementation,
    )


def _edges(
    grid: tuple[int, ...],
    *,
    cutoff: float = 6.0,
    angle_weight: Tensor | None = None,
    directions: Tensor | None = None,
) -> tuple[Pattern, Score]:
    """All edges of one atom, before distances and angles weigh them."""
    return Dense(), Softmax()


def _no_distance(draw: Draw) -> Claim:
    edges = draw.integer(1, 7)
    nearest = torch.zeros(2, edges, dtype=torch.float64)
    return Claim(draw.qkv((edges,)), lambda q, k, v: escaip(q, k, v, nearest), attend)


def _beyond(draw: Draw) -> Claim:
    edges, kept = draw.integer(3, 7), 2
    apart = draw.normal(2, edges).abs()
    apart[:, kept:] = 6.0 + apart[:, kept:]

    def without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = escaip(*each(lambda x: x[:, :kept], q, k, v), apart[:, :kept])
        return torch.cat([near, torch.zeros_like(v[:, kept:])], dim=1)

    def within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = escaip(q, k, v, apart)
        return torch.cat([o[:, :kept], torch.zeros_like(o[:, kept:])], dim=1)

    return Claim(draw.qkv((edges,)), within, without)


def _rotation(draw: Draw) -> Claim:
    edges, places = draw.integer(2, 6), draw.normal(2, 6, 3)[:, :5]
    turn, _ = torch.linalg.qr(draw.normal(3, 3))
    weight = draw.normal(2)
    places = places[:, :1].expand(-1, edges, -1) + draw.normal(2, edges, 3)

    def at(points: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distances = points.norm(dim=-1)
        unit = points / distances[..., None]
        return escaip(q, k, v, distances, angle_weight=weight, directions=unit)

    return Claim(
        draw.qkv((edges,)),
        lambda q, k, v: at(places, q, k, v),
        lambda q, k, v: at(places @ turn, q, k, v),
    )


ESCAIP = System(
    name="escaip",
    title="The Importance of Being Scalable: Improving the Speed and Accuracy of Neural Network "
    "Interatomic Potentials Across Chemical Domains",
    year=2024,
    paper="Qu, Krishnapriyan; arXiv 2410.24169",
    kind="model",
    summary="The edges of an atom attend to each other; a smooth envelope of the distance weighs "
    "the keys, so that forces stay continuous where a neighbour crosses the cut-off.",
    op=escaip,
    compose=_edges,
    layer=NeighbourAttention,
    identities=(
        Identity("no_distance", "At distance 0 every edge counts fully.", _no_distance),
        Identity("beyond", "Edges beyond the cut-off are not there.", _beyond),
        Identity("rotation", "Turning all positions changes nothing.", _rotation),
    ),
    reference_shapes=({"grid": (32,), "heads": 8, "kv_heads": 8, "head_dim": 16},),
)
