"""Launches of the entmax kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.engines.entmax.backward import entmax_backward_kv, entmax_backward_q
from foveal.engines.entmax.gathered import (
    entmax_backward_kv_gathered,
    entmax_backward_q_gathered,
    entmax_values_gathered,
)
from foveal.engines.entmax.support import (
    entmax_keys,
    entmax_queries,
    entmax_support_kv,
    entmax_support_q,
)
from foveal.engines.entmax.threshold import entmax_threshold
from foveal.engines.entmax.values import entmax_values
from foveal.engines.tile import routes
from foveal.engines.tile.launch import Layout, list_layout
from foveal.engines.tile.launches import Launch, compile_together
from foveal.engines.tile.parts import Task
from foveal.engines.tile.spec import Spec
from foveal.scores import hooks
from foveal.scores.entmax import EntmaxForm
from foveal.tuning import tile as tuning
from foveal.tuning.config import Config
from foveal.tuning.tables import BACKWARD_KV, FORWARD

# How far apart two steps of different order may be, in parts of the sum of the weights: the better one
# is then off by about the power 3/2 of this.  A third step, on the keys that were found, leaves the cube of
# what is left, and the last one, in the values, its square.
_TOLERANCE = 2.0**-2
_FINE_TOLERANCE = 2.0**-10


@dataclass(frozen=True)
class Sizes:
    """Tiles (queries x keys) that all kernels share, since the lists are in them, and options of each."""

    queries: int
    keys: int
    threshold: tuple[int, int]  # warps, stages
    values: tuple[int, int]
    backward_q: tuple[int, int]
    backward_kv: tuple[int, int]
    block: int = 64  # queries that list single keys together
    keys_at_once: int = 64  # of these lists
    queries_at_once: int = 128  # of the lists by key
    values_gathered: tuple[int, int] = (4, 2)
    backward_q_gathered: tuple[int, int] = (4, 2)
    backward_kv_gathered: tuple[int, int] = (4, 1)


_INTERPRETED = Sizes(
    32, 32, (1, 1), (1, 1), (1, 1), (1, 1), 16, 16, 16, (1, 1), (1, 1), (1, 1)
)  # fmt: skip
# Up to this length lists of single keys and queries have room for all; beyond it for so many.
LISTED_WHOLE = 8192
_KEY_ROOM, _QUERY_ROOM = 2048, 4096


def sizes_of(device: torch.device, dim: int, dtype: torch.dtype) -> Sizes:
    """Sizes by device and head size."""
    architecture = tuning.architecture(device)
    if architecture == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32:
        side = 64 if dim <= 64 else 32
        return Sizes(side, 32, *(((4, 1),) * 4))
    if dim <= 64:
        return Sizes(64, 64, (4, 3), (4, 3), (4, 3), (4, 2))
    if dim <= 128:
        stages = 2 if architecture in ("sm_90", "sm_100", "sm_80") else 1
        return Sizes(64, 64, (4, stages), (4, stages), (4, 1), (4, 1))
    return Sizes(32, 32, (4, 1), (4, 1), (4, 1), (4, 1))


@dataclass(frozen=True)
class Setting:
    """What a task and its tensors are launched with."""

    sizes: Sizes
    spec: Spec
    power: int
    by_query: Layout
    by_key: Layout
    c: float
    a: float
    scale: float

    def options(self, which: tuple[int, int]) -> dict[str, Any]:
        return {
            "SPEC": self.spec,
            "POWER": self.power,
            "num_warps": which[0],
            "num_stages": which[1],
            "enable_fp_fusion": True,
        }

    @property
    def rows(self) -> int:
        """Queries of a tile."""
        return self.by_query.q_tile[2]

    @property
    def blocks(self) -> int:
        """Blocks of queries in a tile."""
        return max(1, self.rows // self.sizes.block)

    def room(self, most: int, tokens: int) -> int:
        """Entries of a list of single keys or queries; 0 where pairs are tested by tiles of bits."""
        if self.spec.route is routes.BITS:
            return 0
        return tokens if tokens <= LISTED_WHOLE else most


def setting(task: Task, score: EntmaxForm, q: Tensor, v: Tensor) -> Setting:
    """Tiles, lists and numbers of a task on q [N, Lq, Hq, D] and v [N, Lk, Hkv, Dv]."""
    alpha, scale = score.alpha, score.scale
    assert not isinstance(alpha, Tensor)
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    sizes = sizes_of(q.device, max(head_dim, value_dim), q.dtype)
    config = Config(sizes.queries, sizes.keys, 4, 1)
    by_query, by_key = (
        list_layout(kind, task.pattern, task.extent, config, q.device, q.shape[2])
        for kind in (FORWARD, BACKWARD_KV)
    )
    spec = Spec(
        by_query.q_tile, by_query.k_tile, 1, head_dim, value_dim,
        by_query.route, hooks.PRODUCT, hooks.NOTHING, hooks.NOTHING, "ieee",
    )  # fmt: skip
    power = {1.5: 2, 2.0: 1}.get(alpha, 0)
    return Setting(
        sizes, spec, power, by_query, by_key, scale * (alpha - 1), 1 / (alpha - 1), scale
    )


def _walk(tiles: Sequence[Tensor], layout: Layout, heads: int) -> tuple[Any, ...]:
    """Lists of tiles [N, heads, rows, width] as the routes read them, with the tests of a layout."""
    indices, partial, counts = tiles
    rows, width = indices.shape[2], indices.shape[3]
    return indices, partial, counts, heads * rows, rows, 1, width, *layout.arguments[7:]


def forward(
    chosen: Setting, q: Tensor, k: Tensor, v: Tensor, training: bool
) -> tuple[Tensor | None, ...]:
    """o, and for training what the backward reads: flat, tau and twelve tensors of lists.

    o and flat [N, Lq, Hq, Dv], tau float32 [N, Hq, Lq].  Lists come in threes: entries, how many of
    them are of tested tiles, how many there are; of tiles by query and by key, of single keys by
    block of queries, of single queries by tile of keys.
    """
    N, Lq, heads, _ = q.shape
    Lk, groups = k.shape[1], heads // k.shape[2]
    layout, sizes, blocks = chosen.by_query, chosen.sizes, chosen.blocks
    tiles, k_tiles, width = layout.q_tiles, layout.k_tiles, layout.arguments[6]
    programs, lists = N * heads * tiles, N * heads * k_tiles

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=q.device)

    def listed(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        return integers(*shape), integers(*shape[:-1]), integers(*shape[:-1])

    o = q.new_empty(N, Lq, heads, v.shape[-1])
    flat = torch.empty_like(o) if training else None
    tau = q.new_empty(N, heads, Lq, dtype=torch.float32)
    words = -(-width // 32)
    rows = integers(programs, 2, words, chosen.rows)
    columns = integers(programs, width, chosen.rows // 16, -(-layout.k_tile[2] // 32))
    room = chosen.room(_KEY_ROOM, Lk)
    by_query, keys = listed(N, heads, tiles, width), listed(programs * blocks, room)
    walk = _walk(by_query, layout, heads)
    strides = [x.stride()[:3] for x in (q, k, v, o)]
    tolerance = _TOLERANCE if q.dtype in (torch.bfloat16, torch.float16) else _FINE_TOLERANCE
    if chosen.power == 1:
        tolerance /= 32
    numbers = Lq, Lk, heads, groups, chosen.c, chosen.a
    spec = {"SPEC": chosen.spec}
    in_blocks = {"BLOCKS": blocks}
    seen = integers(N, heads, k_tiles, tiles)
    launches = [
        Launch(
            entmax_threshold, programs,
            (q, k, tau, rows, columns, *strides[:2], *numbers, tolerance, words, width,
             layout.arguments),
            chosen.options(sizes.threshold),
        ),
        Launch(
            entmax_keys, programs * blocks,
            (columns, *keys, tiles, heads, width, room, layout.arguments),
            spec | in_blocks | {"num_warps": 2},
        ),
        Launch(
            entmax_support_q, programs,
            (rows, seen, *by_query, tiles, k_tiles, heads, words, width, layout.arguments),
            spec | {"num_warps": 1},
        ),
        Launch(
            entmax_values, programs,
            (q, k, v, o, flat, tau, *strides, *numbers, keys[2], room, walk),
            chosen.options(sizes.values) | in_blocks,
        ),
        Launch(
            entmax_values_gathered, programs * blocks,
            (q, k, v, o, flat, tau, *strides, *numbers, tiles, *keys, room, layout.arguments),
            chosen.options(sizes.values_gathered) | in_blocks | {"N": sizes.keys_at_once},
        ),
    ]  # fmt: skip
    results: tuple[Tensor | None, ...] = (o,)
    if training:
        queries_room = chosen.room(_QUERY_ROOM, Lq)
        by_key, queries = listed(N, heads, k_tiles, tiles), listed(lists, queries_room)
        launches += [
            Launch(entmax_support_kv, lists, (seen, *by_key, tiles), {"num_warps": 1}),
            Launch(
                entmax_queries, lists,
                (rows, seen, *by_key, *queries, tiles, k_tiles, words, queries_room),
                spec | {"num_warps": 4},
            ),
        ]  # fmt: skip
        results = (o, flat, tau, *by_query, *by_key, *keys, *queries)
    compile_together(launches, (chosen.spec, sizes, chosen.power, training), q)
    for launch in launches:
        launch()
    return results


def backward(
    chosen: Setting, q: Tensor, k: Tensor, v: Tensor, do: Tensor, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; kept: what the forward gave after o.  Bitwise repeatable."""
    N, Lq, heads, _ = q.shape
    Lk, kv_heads = k.shape[1], k.shape[2]
    flat, tau = kept[:2]
    by_query, by_key, keys, queries = (kept[start : start + 3] for start in (2, 5, 8, 11))
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )  # fmt: skip
    shift = torch.empty_like(tau)
    of = [x.stride()[:3] for x in (q, k, v, do)]
    sizes, layout, inverse = chosen.sizes, chosen.by_query, chosen.by_key
    numbers = Lq, Lk, heads, heads // kv_heads, chosen.c, chosen.a, chosen.scale
    of_q = (
        q, k, v, do, flat, tau, shift, dq, *of, flat.stride()[:3], dq.stride()[:3], *numbers,
    )  # fmt: skip
    of_kv = (
        q, k, v, do, tau, shift, dk, dv, *of, dk.stride()[:3], dv.stride()[:3], *numbers,
    )  # fmt: skip
    programs, lists = N * heads * layout.q_tiles, N * kv_heads * inverse.k_tiles
    rooms = keys[0].shape[1], queries[0].shape[1]
    in_blocks = {"BLOCKS": chosen.blocks}
    launches = [
        Launch(
            entmax_backward_q, programs, (*of_q, keys[2], rooms[0], _walk(by_query, layout, heads)),
            chosen.options(sizes.backward_q) | in_blocks,
        ),
        Launch(
            entmax_backward_q_gathered, programs * chosen.blocks,
            (*of_q, layout.q_tiles, *keys, rooms[0], layout.arguments),
            chosen.options(sizes.backward_q_gathered) | in_blocks | {"N": sizes.keys_at_once},
        ),
        Launch(
            entmax_backward_kv, lists,
            (*of_kv, queries[2], rooms[1], _walk(by_key, inverse, heads)),
            chosen.options(sizes.backward_kv),
        ),
        Launch(
            entmax_backward_kv_gathered, lists, (*of_kv, *queries, rooms[1], inverse.arguments),
            chosen.options(sizes.backward_kv_gathered) | {"N": sizes.queries_at_once},
        ),
    ]  # fmt: skip
    compile_together(launches, (chosen.spec, sizes, chosen.power, "backward"), q)
    for launch in launches:
        launch()
    return dq, dk, dv
