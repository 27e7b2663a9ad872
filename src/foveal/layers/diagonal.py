"""Sparse attention between two sequences that run side by side, around the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import PatternError, ShapeError
from foveal._kept import kept
from foveal.patterns import Pattern, Rows
from foveal.patterns.strided import Triangular


@kept(64)
def diagonal(
    queries: int, keys: int, window: int, global_tokens: int = 0, triangular: bool = False
) -> Pattern:
    """The columns around the diagonal of a matrix [queries, keys], and the first ones."""
    for name, count in (("window", window), ("global_tokens", global_tokens)):
        if count < 0:
            raise PatternError(name, count, "at least 0 tokens are needed")
    centre = torch.arange(queries, dtype=torch.float64) * (keys / max(queries, 1))
    last = max(keys - 1, 0)
    low, high = ((centre + o).trunc().clamp(0, last).to(torch.int64) for o in (-window, window))
    pattern: Pattern = Rows(low, (high + 1).clamp(max=keys))
    if global_tokens:
        zero = torch.zeros(queries, dtype=torch.int64)
        pattern = pattern | Rows(zero, zero + min(global_tokens, keys))
    return pattern | Triangular(keys / max(queries, 1)) if triangular else pattern


@kept(64)
def around_diagonal(
    queries: int, keys: int, window: int, global_tokens: int, triangular: bool
) -> Pattern:
    """`diagonal`, and every key for the first int(global_tokens queries / keys) queries."""
    count = min(int(global_tokens * queries / max(keys, 1)), queries)
    ends = torch.zeros(queries, dtype=torch.int64)
    ends[:count] = keys
    whole = Rows(torch.zeros_like(ends), ends)
    pattern = diagonal(queries, keys, window, global_tokens, triangular)
    return pattern | whole if count else pattern


class DiagonalAttention(nn.Module):
    """Attention of one sequence to itself or to another one that runs beside it at another rate.

    Query i stands at c = L' / L * i among the L' keys and sees trunc(c + o), |o| <= window, and the first
    global_tokens keys; the first int(global_tokens L / L') queries see everything.

    Shapes: x [B, L, dim], other [B, L', dim], default x; returns [B, L, dim].
    Options: dim = heads * head_dim; window, global_tokens in tokens; `triangular` adds the keys at
    offsets of t (t + 1) / 2 to both sides.
    Paper: Hybrid Transformers for Music Source Separation (2211.08553).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 400,
        global_tokens: int = 100,
        triangular: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.options = (window, global_tokens, triangular)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(other).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        pattern = around_diagonal(q.shape[1], k.shape[1], *self.options)
        y: Tensor = self.proj(attend(q, k, v, pattern).flatten(-2))
        return y
