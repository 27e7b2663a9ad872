"""Attention among the neighbours of each atom: EScAIP's layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import ScoreError, ShapeError
from foveal._judged import need_shape
from foveal.layers.heads import Projections
from foveal.patterns import Dense
from foveal.scores import Bias, KeyBias, Score, Softmax


def envelope_bias(distances: Tensor, cutoff: float) -> Tensor:
    """Log of a weight that falls smoothly from 1 at distance 0 to 0 at the cut-off.

    -x^2 / (1 - x^2) with x = distance / cutoff, -inf from the cut-off on.  Differentiable, with
    gradient 0 outside.  Any shape.
    """
    x = distances / cutoff
    inside = x < 1
    squared = torch.where(inside, x, 0.0) ** 2
    return torch.where(inside, -squared / (1 - squared), -torch.inf)


def attend_neighbours(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distances: Tensor,
    cutoff: float,
    *,
    angle_weight: Tensor | None = None,
    directions: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention among the edges of each atom; key e counts with the envelope of its distance.

    s_ee' = q_e . k_e' / sqrt(D) + log envelope(distance of e') + angle_weight[h] cos(angle of e and e').

    Shapes: q, k, v [atoms, edges, H, D]; distances [atoms, edges], at least `cutoff` on padding;
    angle_weight [H] with directions [atoms, edges, 3], unit vectors.
    Limits: an atom without an edge inside the cut-off gives 0.  Second derivatives, as for training on
    forces, need implementation="reference", the plain PyTorch one.
    """
    if not cutoff > 0:
        raise ScoreError("cutoff", cutoff, "a distance above 0 is needed")
    need_shape("distances", distances, tuple(q.shape[:2]), like=q)
    if (angle_weight is None) != (directions is None):
        raise ShapeError("directions", "one of two", "angle_weight and directions, or none of them")
    score: Score = Softmax() + KeyBias(envelope_bias(distances, cutoff)[:, None])
    if angle_weight is not None and directions is not None:
        need_shape("angle_weight", angle_weight, (q.shape[2],), like=q)
        need_shape("directions", directions, (*q.shape[:2], 3), like=q)
        cosines = directions @ directions.transpose(1, 2)
        score = score + Bias(angle_weight[None, :, None, None] * cosines[:, None])
    return attend(q, k, v, Dense(), score, implementation=implementation)


class NeighbourAttention(Projections):
    """Self-attention among the messages of an atom's edges, weighted by a smooth envelope.

    Shapes: x and y [atoms, edges, dim]; distances [atoms, edges]; directions [atoms, edges, 3] when
    angles take part.
    Options: cutoff in the unit of the distances; angles adds a learned weight per head on the cosine
    between two edges; implementation as in `attend`, "reference" for second derivatives.
    Paper: EScAIP, The Importance of Being Scalable (2410.24169).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        cutoff: float,
        *,
        angles: bool = False,
        implementation: str | None = None,
    ) -> None:
        super().__init__(dim, heads)
        self.cutoff = cutoff
        self.implementation = implementation
        self.angle_weight = nn.Parameter(torch.zeros(heads)) if angles else None

    def forward(self, x: Tensor, distances: Tensor, directions: Tensor | None = None) -> Tensor:
        o = attend_neighbours(
            *self.split(x),
            distances,
            self.cutoff,
            angle_weight=self.angle_weight,
            directions=directions,
            implementation=self.implementation,
        )
        return self.join(o)
