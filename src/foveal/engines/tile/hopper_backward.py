"""Launches the backward of the Hopper edition, in one kernel or, bit by bit repeatable, in two.

`hopper_backward_prepare` runs first; then `hopper_backward_joint` (all gradients in one pass) or
`hopper_backward_separate` (dQ, and dK with dV); then `hopper_backward_repair` computes rows again that
hidden pairs have spoilt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from foveal.engines.tile.hopper_backward_joint import (
    tile_attend_backward_joint,
    tile_attend_backward_round,
)
from foveal.engines.tile.hopper_backward_prepare import launch_prepare
from foveal.engines.tile.hopper_backward_repair import launch_repair
from foveal.engines.tile.hopper_backward_separate import (
    tile_attend_backward_keys,
    tile_attend_backward_queries,
)
from foveal.engines.tile.hopper_launch import (
    bias_arguments,
    descriptor,
    head_pad,
    intervals,
    list_arguments,
    on_grid,
    programs,
    split_boxes,
    statistics_descriptor,
    sums_descriptor,
)
from foveal.engines.tile.hopper_merge import launch_merge, tile_attend_backward_merge
from foveal.engines.tile.hopper_plan import (
    JOINT_KEYS,
    JOINT_QUERIES,
    joint_list_walk,
    joint_pays,
    joint_walk,
    keys_walk,
    queries_walk,
    shared_heads,
)
from foveal.engines.tile.lists import WalkLists, in_tile_order
from foveal.engines.tile.replay import launch
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.dense import Dense

Lists = tuple[WalkLists, WalkLists]
_Grads = tuple[Tensor, Tensor, Tensor]
# Rows of dQ, and of dK or dV, that are not finite: int8 [N, H, tokens].
_Marks = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Sides:
    """What all kernels of one backward read; q, do, k, v on their grids [N, *grid, H, D]."""

    q: Tensor
    do: Tensor
    k: Tensor
    v: Tensor
    lse2: Tensor
    delta: Tensor
    lengths: tuple[int, int, int]
    kv_lengths: tuple[int, int, int]
    bounds: Tensor
    kv_bounds: Tensor
    axes: int
    scale: float

    @property
    def grid(self) -> tuple[int, ...]:
        return self.lengths[: self.axes]

    @property
    def scales(self) -> tuple[float, float]:
        return self.scale * 1.4426950408889634, self.scale

    @property
    def launches(self) -> list[slice]:
        """Batch entries of each launch: a descriptor has five axes at most."""
        batch = len(self.q)
        return [slice(None)] if self.axes < 3 else [slice(n, n + 1) for n in range(batch)]


@dataclass(frozen=True)
class _Listed:
    """Lists of queries and of keys, and second intervals of each, () where one is enough."""

    of_queries: WalkLists
    of_keys: WalkLists
    second: tuple[Tensor, ...]
    kv_second: tuple[Tensor, ...]


def launch_backward(
    pattern: Pattern,
    extent: Extent,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    *,
    lists: Lists | None = None,
    biases: Tensor | None = None,
    repeatable: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of q, k, v; o and lse as launch_forward gave them.

    repeatable: bit by bit, by two kernels; by default where torch.use_deterministic_algorithms asks for
    it or one kernel does not pay (`joint_pays`).  One kernel adds to dQ in fp32, in 4 N Hq Lq D bytes
    more and in an order that changes.
    With `lists` of queries and of keys, of tiles of JOINT_QUERIES x JOINT_KEYS, only their tiles are
    visited, and `pattern` says what the tested ones hide.  `biases` [N or 1, heads, Lk] are added to the
    scores per key.  The two kernels know neither.
    """
    if lists is not None:
        extent = extent.flat()
    if repeatable is None:
        repeatable = torch.are_deterministic_algorithms_enabled() or (
            lists is None and not joint_pays(pattern, extent, q.shape[3])
        )
    plain = lists is None and biases is None
    assert plain or not repeatable, "the two kernels walk boxes only, and add no biases"
    (lengths, axes, bounds), second = intervals(pattern, extent, q.device, False)
    (kv_lengths, _, kv_bounds), kv_second = intervals(pattern, extent, q.device, True)
    grid, kv_grid = lengths[:axes], kv_lengths[:axes]
    do = on_grid(do, grid)
    sums = None
    if not repeatable:
        sums = torch.empty(
            len(q), q.shape[2], *grid, q.shape[3], dtype=torch.float32, device=q.device
        )
    lse2, delta = launch_prepare(o, do.flatten(1, -3), lse, dlse, sums, grid)
    q, k, v = on_grid(q, grid), on_grid(k, kv_grid), on_grid(v, kv_grid)
    sides = _Sides(q, do, k, v, lse2, delta, lengths, kv_lengths, bounds, kv_bounds, axes, scale)
    walked = None if lists is None else _Listed(*lists, second, kv_second)
    added = () if biases is None else bias_arguments(biases, q.shape[-2])
    if sums is None:
        grads, marks = _two_kernels(sides, pattern, extent)
    else:
        grads, marks = _one_kernel(sides, pattern, extent, sums, walked, added)
    if marks is not None:
        _repair(sides, grads, marks, walked, added)
    dq, dk, dv = (x.flatten(1, -3) for x in grads)
    return dq, dk, dv


def _outputs(sides: _Sides, hides: bool) -> tuple[_Grads, _Marks | None]:
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (sides.q, sides.k, sides.v)
    )
    if not hides:
        return (dq, dk, dv), None
    marks = [
        torch.empty(len(x), x.shape[-2], math.prod(grid), dtype=torch.int8, device=x.device)
        for x, grid in ((dq, sides.lengths), (dk, sides.kv_lengths))
    ]
    return (dq, dk, dv), (marks[0], marks[1])


def _one_kernel(
    sides: _Sides,
    pattern: Pattern,
    extent: Extent,
    sums: Tensor,
    lists: _Listed | None,
    biases: tuple[Any, ...],
) -> tuple[_Grads, _Marks | None]:
    q, k, axes = sides.q, sides.k, sides.axes
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    groups = heads // kv_heads
    batch, length = len(q), math.prod(sides.lengths)
    # A partition of its own for dQ needs the registers that accumulators of 128 columns take.
    apart = head_dim <= 64
    of_keys: tuple[Any, ...] = ()
    if lists is None:
        walk = joint_walk(pattern, extent, head_dim, biased=len(biases) > 0)
    else:
        # Heads of a group meet the same keys only where their lists are in the same order.
        same_order = lists.of_keys.heads_per_list % groups == 0
        by_key = lists.of_keys if same_order else in_tile_order(lists.of_keys)
        of_keys = (*list_arguments(by_key), *lists.kv_second)
        hides = not isinstance(pattern, Dense) or length % JOINT_QUERIES > 0
        walk = joint_list_walk(hides, head_dim)
    (dq, dk, dv), marks = _outputs(sides, walk.hides)
    for part in sides.launches:
        items, running = programs(walk, sides.kv_lengths, k[part])
        rounds: list[tuple[int, int, tuple[Tensor, ...], tuple[int, ...]]] = [
            (running, items, (), ())
        ]
        split: tuple[int, ...] = ()
        if lists is None and isinstance(pattern, Dense) and not walk.hides:
            split = split_boxes(walk, length, items, q.device)
        if split:
            sharing, rest = split[1], items % split[1]
            tile = 2 * sharing, walk.consumers * walk.rows[0], head_pad(head_dim)
            buffers = (sums.new_empty(tile), sums.new_empty(tile))
            whole = items - rest
            rounds = [(sharing, items, buffers, split)]
            if not walk.persistent:
                rounds = [(whole, whole, (), ()), (sharing, rest, buffers, (*split[:2], whole))]
        # Along lists tiles of keys differ more in length, and heads that end together matter more than
        # the cache: of a group only the head at hand is counted there.
        together = length * (groups if lists is None else 1)
        shared = shared_heads(kv_heads, 1, together, head_dim, walk.even)
        statistics = sides.lse2, sides.delta
        descriptors = [
            *(descriptor(x[part], walk.rows, axes) for x in (k, sides.v)),
            *(descriptor(x[part], walk.columns, axes) for x in (q, sides.do)),
            *(statistics_descriptor(x[part], walk.columns, sides.grid) for x in statistics),
            *(descriptor(x[part], walk.rows, axes) for x in (dk, dv)),
            sums_descriptor(sums[part], walk.columns, apart),
        ]
        # Of three axes each launch has one entry of the batch.
        entry = part.start or 0
        added = (biases[0][entry:], *biases[1:]) if biases and biases[1] else biases
        for running, count, parts, cut in rounds:
            if running == 0:
                continue
            launch(
                tile_attend_backward_joint,
                (running,),
                *descriptors,
                sides.kv_bounds,
                None if marks is None else marks[1][part],
                of_keys,
                *sides.kv_lengths,
                kv_heads,
                groups,
                shared,
                count,
                *sides.scales,
                parts,
                cut,
                added,
                walk.consumers,
                walk.rows,
                walk.columns,
                axes,
                walk.stages,
                walk.hides,
                apart,
                num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
        if split:
            sizes = math.prod(sides.kv_lengths), kv_heads, shared, items
            launch_merge(tile_attend_backward_merge, (dk, dv), buffers, split, walk, sizes)
    rows = 64
    launch(
        tile_attend_backward_round, (triton.cdiv(length, rows), batch * heads),
        sums, dq, None if marks is None else marks[0], sides.scale, length, heads,
        HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), ROWS=rows,
    )  # fmt: skip
    return (dq, dk, dv), marks


def _two_kernels(sides: _Sides, pattern: Pattern, extent: Extent) -> tuple[_Grads, _Marks | None]:
    q, do, k, v, axes = sides.q, sides.do, sides.k, sides.v, sides.axes
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    groups = heads // kv_heads
    length, kv_length = math.prod(sides.lengths), math.prod(sides.kv_lengths)
    statistics = sides.lse2, sides.delta
    of_queries = queries_walk(pattern, extent, head_dim)
    of_keys = keys_walk(pattern, extent, head_dim)
    (dq, dk, dv), marks = _outputs(sides, of_queries.hides or of_keys.hides)
    pitches = [
        sides.lse2.shape[3] if axes == 2 else sides.lengths[1],
        sides.lse2.shape[4] if axes == 3 else 1,
    ]
    for part in sides.launches:
        walk = of_keys
        items, running = programs(walk, sides.kv_lengths, k[part])
        launch(
            tile_attend_backward_keys,
            (running,),
            *(descriptor(x[part], walk.rows, axes) for x in (k, v)),
            *(descriptor(x[part], walk.columns, axes) for x in (q, do)),
            *(statistics_descriptor(x[part], walk.columns, sides.grid) for x in statistics),
            *(descriptor(x[part], walk.rows, axes) for x in (dk, dv)),
            sides.kv_bounds,
            None if marks is None else marks[1][part],
            *sides.kv_lengths,
            kv_heads,
            groups,
            shared_heads(kv_heads, 1, length * groups, head_dim),
            items,
            *sides.scales,
            walk.consumers,
            walk.rows,
            walk.columns,
            axes,
            walk.stages,
            walk.skips,
            marks is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
        walk = of_queries
        items, running = programs(walk, sides.lengths, q[part])
        launch(
            tile_attend_backward_queries,
            (running,),
            *(descriptor(x[part], walk.rows, axes) for x in (q, do)),
            *(descriptor(x[part], walk.columns, axes) for x in (k, v)),
            descriptor(dq[part], walk.rows, axes),
            *(x[part] for x in statistics),
            sides.bounds,
            None if marks is None else marks[0][part],
            *sides.lengths,
            *pitches,
            sides.lse2[0, 0].numel(),
            heads,
            groups,
            shared_heads(heads, groups, kv_length, head_dim),
            items,
            *sides.scales,
            walk.consumers,
            walk.rows,
            walk.columns,
            axes,
            walk.stages,
            walk.skips,
            marks is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return (dq, dk, dv), marks


def _repair(
    sides: _Sides,
    grads: _Grads,
    marks: _Marks,
    lists: _Listed | None,
    biases: tuple[Any, ...] = (),
) -> None:
    """Computes marked rows again from visible pairs alone."""
    dq, dk, dv = (x.flatten(1, -3) for x in grads)
    q, do, k, v = (x.flatten(1, -3) for x in (sides.q, sides.do, sides.k, sides.v))
    fold = sides.grid[-1], sides.lse2.shape[-1], sides.lse2[0, 0].numel()
    statistics = sides.lse2, sides.delta
    queries = sides.bounds, sides.lengths, sides.kv_lengths, fold, sides.scales
    keys = sides.kv_bounds, sides.kv_lengths, sides.lengths, fold, sides.scales
    if lists is None:
        launch_repair(marks[0], (q, do), (k, v), statistics, (dq,), *queries, biases=biases)
        launch_repair(marks[1], (k, v), (q, do), statistics, (dk, dv), *keys, biases=biases)
        return
    by_query = (*list_arguments(lists.of_queries), *lists.second), JOINT_QUERIES, JOINT_KEYS
    by_key = (*list_arguments(lists.of_keys), *lists.kv_second), JOINT_KEYS, JOINT_QUERIES
    launch_repair(marks[0], (q, do), (k, v), statistics, (dq,), *queries, *by_query, biases=biases)
    launch_repair(marks[1], (k, v), (q, do), statistics, (dk, dv), *keys, *by_key, biases=biases)
