"""What a process with Triton's interpreter runs: the kernel that computes marked gradient rows again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import foveal as fv
from foveal.engines.tile.lists import walk_lists
from foveal.patterns.base import Extent, Pattern
from foveal.testing import check

SCALE = 0.25
CPU = torch.device("cpu")
# A pattern, its grids of queries and keys, query heads and key heads.
BOXES: dict[str, tuple[Pattern, tuple[int, ...], tuple[int, ...], int, int]] = {
    "sequence": (fv.Causal(), (7,), (11,), 4, 2),
    "image": (fv.Neighborhood((3, 2)), (3, 4), (3, 4), 2, 1),
    "volume": (fv.Neighborhood((2, 2, 2)), (2, 2, 3), (2, 2, 3), 1, 1),
}


def _gradients(mask: Tensor, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Base-2 lse, delta, dq, dk, dv of q, k, v, do by plain products."""
    q, k, v, do = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, 2) for x in leaves[1:])
    s = torch.einsum("nqhd,nkhd->nhqk", leaves[0], keys) * SCALE
    s = s.masked_fill(~mask, -math.inf)
    p = torch.where(mask.any(-1, keepdim=True), s, 0.0).softmax(-1).masked_fill(~mask, 0.0)
    o = torch.einsum("nhqk,nkhd->nqhd", p, values)
    found = torch.autograd.grad(o, leaves, do)
    lse = torch.logsumexp(s.detach(), -1) / math.log(2)
    delta = (o.detach() * do).sum(-1).transpose(1, 2).contiguous()
    return torch.where(lse == -math.inf, math.inf, lse), delta, *found


def _tensors(queries: int, keys: int, heads: int, kv_heads: int, seed: int) -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(seed)
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)
    return tuple(torch.randn(1, *shape, 24, generator=source) for shape in shapes)


def _repaired(
    static: Pattern,
    extent: Extent,
    tensors: tuple[Tensor, ...],
    mask: Tensor,
    lists: tuple[tuple[object, ...], ...] = ((), ()),
) -> list[str]:
    """Verdicts on gradients all of whose rows were marked and NaN."""
    from foveal.engines.tile.hopper_backward_repair import launch_repair
    from foveal.engines.tile.hopper_launch import intervals

    q, k, v, do = tensors
    lse, delta, *exact = _gradients(mask, tensors, torch.float64)
    *_, dq, dk, dv = _gradients(mask, tensors, torch.float32)
    statistics = lse.float(), delta.float()
    sides = [intervals(static, extent, CPU, by_key) for by_key in (False, True)]
    grids = [side[0][0] for side in sides]
    got = []
    for by_key in (False, True):
        (_, _, bounds), second = sides[by_key]
        own, others = ((k, v), (q, do)) if by_key else ((q, do), (k, v))
        marks = torch.ones(1, own[0].shape[2], own[0].shape[1], dtype=torch.int8)
        outs = tuple(torch.full_like(x, math.nan) for x in own[: 1 + by_key])
        rows, columns = grids[::-1] if by_key else grids
        launch_repair(
            marks, own, others, statistics, outs, bounds, rows, columns, (q.shape[1],) * 3,
            (SCALE / math.log(2), SCALE), *((*listed, *second) for listed in lists[by_key][:1]),
            *lists[by_key][1:],
        )  # fmt: skip
        got += outs
    return [
        str(check(name, a, plain, b))
        for name, a, plain, b in zip(("dq", "dk", "dv"), got, (dq, dk, dv), exact, strict=True)
    ]


def boxes_repaired(name: str, seed: int) -> list[str]:
    pattern, q_grid, kv_grid, heads, kv_heads = BOXES[name]
    tensors = _tensors(math.prod(q_grid), math.prod(kv_grid), heads, kv_heads, seed)
    return _repaired(pattern, Extent(q_grid, kv_grid), tensors, pattern.dense_mask(q_grid, kv_grid))


def two_intervals_repaired(seed: int) -> list[str]:
    from foveal.engines.tile.hopper_launch import list_arguments

    pattern, extent = fv.Sliding(9, sink_tokens=3), Extent((40,), (40,))
    lists = []
    for by_key in (False, True):
        found = walk_lists(pattern, extent, 16, 32, 2, CPU, by_key)
        lists.append((list_arguments(found), *((32, 16) if by_key else (16, 32))))
    mask = pattern.dense_mask(40, 40)
    return _repaired(pattern, extent, _tensors(40, 40, 2, 1, seed), mask, tuple(lists))


def lists_repaired(seed: int) -> list[str]:
    from foveal.engines.tile.hopper_launch import list_arguments

    source = torch.Generator().manual_seed(seed)
    kept = torch.rand(1, 2, 2, 2, generator=source) < 0.6
    pattern = fv.Blocks(fv.BlockSelection.from_block_mask(kept, 32, 32))
    extent = Extent((40,), (40,))
    lists = []
    for by_key in (False, True):
        found = walk_lists(pattern, extent, 16, 32, 2, CPU, by_key)
        lists.append((list_arguments(found), *((32, 16) if by_key else (16, 32))))
    mask = pattern.dense_mask(40, 40)
    return _repaired(fv.Dense(), extent, _tensors(40, 40, 2, 1, seed), mask, tuple(lists))
