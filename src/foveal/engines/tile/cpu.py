"""The tiled edition in plain PyTorch: time and memory follow the tiles visited, never Lq x Lk."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.engines.tile.cpu_tiles import Task, TiledAttention
from foveal.patterns.base import Extent, Pattern
from foveal.scores.base import Geometry
from foveal.scores.normal import NormalForm


def refuses(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    if problem.device != "cpu":
        return f"it runs on CPU tensors; these are on {problem.device}"
    return None


def attend(
    problem: Problem,
    pattern: Pattern,
    score: NormalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] of q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]."""
    if _needs_own_keys(problem, pattern):
        k = k.repeat_interleave(problem.groups, dim=2)
        v = v.repeat_interleave(problem.groups, dim=2)
    precision = torch.float64 if problem.dtype == torch.float64 else torch.float32
    extent = problem.extent
    whole = _Piece(pattern, extent, torch.arange(extent.Lq)[None], torch.arange(extent.Lk)[None])
    scaled = q.to(precision) * score.scale
    o, lse = _solve(
        whole, scaled, k.to(precision), v.to(precision), score, geometry, problem.return_lse
    )
    return o.to(problem.dtype), lse


def _needs_own_keys(problem: Problem, pattern: Pattern) -> bool:
    """Whether the lists differ between the query heads that share keys."""
    if problem.groups == 1 or not pattern.depends_on_data:
        return False
    states = pattern.tile_map(problem.extent, *(pattern.tile_unit() or (64, 64)))
    return states.shape[1] == problem.q_heads


class _Piece:
    """A pattern on its extent, and which tokens of the whole problem stand there.

    q_tokens [P, Lq], k_tokens [P, Lk]: P sub-problems of one shape.
    """

    def __init__(
        self, pattern: Pattern, extent: Extent, q_tokens: Tensor, k_tokens: Tensor
    ) -> None:
        self.pattern = pattern.simplify(extent)
        self.extent = extent
        self.q_tokens = q_tokens
        self.k_tokens = k_tokens


def _solve(
    piece: _Piece,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: NormalForm,
    geometry: Geometry,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """q [B P, Lq, Hq, D] scaled, k and v alike; parts are solved on their own and put together."""
    parts = piece.pattern.parts(piece.extent)
    if parts is None:
        task = Task(
            piece.pattern, piece.extent, piece.q_tokens, piece.k_tokens, score, geometry, with_lse
        )
        return _tiled(task, q, k, v)
    outputs, lses, order = [], [], []
    for part in parts:
        count = len(part.q_tokens)
        inner = _Piece(
            part.pattern,
            part.extent,
            piece.q_tokens[:, part.q_tokens].flatten(0, 1),
            piece.k_tokens[:, part.k_tokens].flatten(0, 1),
        )
        taken = (
            tokens[:, index].flatten(0, 1)
            for tokens, index in ((q, part.q_tokens), (k, part.k_tokens), (v, part.k_tokens))
        )
        o, lse = _solve(inner, *taken, score, geometry, with_lse)
        outputs.append(o.unflatten(0, (-1, count)).flatten(1, 2))
        if lse is not None:
            lses.append(lse.unflatten(0, (-1, count)).flatten(1, 2))
        order.append(part.q_tokens.flatten())
    back = torch.argsort(torch.cat(order))
    lse = torch.cat(lses, dim=1)[:, back] if with_lse else None
    return torch.cat(outputs, dim=1)[:, back], lse


def _tiled(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Heads first, query heads grouped by the key head they share."""
    kv_heads = k.shape[2]
    q = q.transpose(1, 2).unflatten(1, (kv_heads, -1)).contiguous()  # [N, Hkv, G, Lq, D]
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()  # [N, Hkv, Lk, D]
    o, lse = TiledAttention.apply(task, q, k, v, *task.score.parameters)
    lse = lse.flatten(1, 2).transpose(1, 2) if task.with_lse else None
    return o.flatten(1, 2).transpose(1, 2), lse
