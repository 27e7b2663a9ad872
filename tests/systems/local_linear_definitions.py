"""The systems of `local_linear` written a second time: a weighted regression per query."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.systems.definitions import Example, draw, qkv


def regression(q: Tensor, k: Tensor, v: Tensor, ridge: float) -> Tensor:
    """The value at q [D] of the line through (k [n, D], v [n, Dv]) that minimises
    sum_j w_j |v_j - b - W (k_j - q)|^2 + ridge sum(w) |W|^2."""
    weights = (k @ q * q.shape[0] ** -0.5).softmax(0)
    design = torch.cat([torch.ones_like(k[:, :1]), k - q], dim=1)
    penalty = ridge * torch.eye(design.shape[1], dtype=q.dtype)
    penalty[0, 0] = 0.0
    normal = (weights[:, None] * design).T @ design + penalty
    return torch.linalg.solve(normal, (weights[:, None] * design).T @ v)[0]


def each_query(cell: Callable[[Tensor, Tensor, Tensor], Tensor], *x: Tensor) -> Tensor:
    """o [B, L, H, Dv]: query i of each head on the keys up to i, or on all keys; x: q, k, v [B, L, H, .]."""
    q, k, v = x
    rows = [
        torch.stack(
            [cell(q[b, i, h], k[b, : i + 1, h], v[b, : i + 1, h]) for h in range(q.shape[2])]
        )
        for b in range(len(q))
        for i in range(q.shape[1])
    ]
    return torch.stack(rows).unflatten(0, q.shape[:2])


def local_linear(source: torch.Generator) -> Example:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return each_query(lambda *cell: regression(*cell, 0.7), q, k, v)

    return Example(qkv(source, (11,)), expected, {"ridge": 0.7})


def parallax(source: torch.Generator) -> Example:
    def expected(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        def cell(both: Tensor, k: Tensor, v: Tensor) -> Tensor:
            query, slope = both[:5], both[5:]
            p = (k @ query * 5**-0.5).softmax(0)
            return (p * (1 - (k - p @ k) @ slope)) @ v

        return each_query(cell, torch.cat([q, r], dim=-1), k, v)

    return Example((*qkv(source, (11,)), draw(source, 2, 11, 2, 5)), expected)


LOCAL_LINEAR_DEFINITIONS: dict[str, tuple[Callable[[torch.Generator], Example], ...]] = {
    "local_linear_attention": (local_linear,),
    "parallax": (parallax,),
}
