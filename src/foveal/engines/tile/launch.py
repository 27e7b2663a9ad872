"""What a kernel is launched with: tiles, routes and hooks of a task on a device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.engines.tile import routes
from foveal.engines.tile.kinds import kind_of
from foveal.engines.tile.lists import boxes, inverse, tile_states
from foveal.engines.tile.parts import Task
from foveal.engines.tile.spans import spans
from foveal.engines.tile.spec import Spec, Tile
from foveal.engines.tile.terms import BY_DISTANCE, FROM_TABLE, PER_KEY, PER_PAIR, LocalTerm
from foveal.patterns.base import FULL, PARTIAL, Extent, Pattern
from foveal.patterns.blocks import Blocks
from foveal.patterns.combine import Intersection, Union
from foveal.patterns.dense import Dense
from foveal.scores import hooks
from foveal.tuning import tile as tuning
from foveal.tuning.tile import BACKWARD_KV, Config

LOG2E = 1.4426950408889634
_SMALLEST = 16
_FEW_QUERIES = 32
# Pairs that are judged at once where a mask is packed into bits.
_PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Tiles of one kernel and the route between them, as the kernel reads it.

    packed: query heads of a key head that stand on an axis of the grid before the tokens, so that one
    tile holds short queries of all of them.
    """

    rank: int
    q_tile: Tile
    k_tile: Tile
    q_grid: Tile
    k_grid: Tile
    route: Any
    arguments: tuple[Any, ...]
    packed: int = 1

    @property
    def q_tiles(self) -> int:
        return _tiles(self.q_grid, self.q_tile)

    @property
    def k_tiles(self) -> int:
        return _tiles(self.k_grid, self.k_tile)

    def q_strides(self, x: Tensor) -> tuple[int, ...]:
        """Strides (batch, x, y, z, head) of queries [N, Lq, H, D] on their grid."""
        if self.packed > 1:
            n, token, head, _ = x.stride()
            return n, 0, head, token, head * self.packed
        return _grid_strides(x, self.q_grid)

    def k_strides(self, x: Tensor) -> tuple[int, ...]:
        return _grid_strides(x, self.k_grid)


def _tiles(grid: Tile, tile: Tile) -> int:
    return math.prod(-(-length // side) for length, side in zip(grid, tile, strict=True))


def _grid_strides(x: Tensor, grid: Tile) -> tuple[int, ...]:
    n, token, head, _ = x.stride()
    return n, token * grid[1] * grid[2], token * grid[2], token, head


@dataclass(frozen=True)
class Stage:
    """One kernel of a task, ready to launch."""

    spec: Spec
    config: Config
    layout: Layout

    @property
    def options(self) -> dict[str, Any]:
        return options(self.config.warps, self.config.stages)


def options(warps: int, stages: int) -> dict[str, Any]:
    """Compiler options of a launch."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Sizes:
    """What decides on tiles besides the pattern."""

    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


def in_three(grid: tuple[int, ...]) -> Tile:
    """The grid with axes of length 1 before its own."""
    x, y, z = (1,) * (3 - len(grid)) + grid
    return x, y, z


def stage(
    kind: str,
    task: Task,
    terms: tuple[LocalTerm, ...],
    sizes: Sizes,
    heads: int,
    packed: int = 1,
) -> Stage:
    """The kernel `kind` of tuning.tile for a task; heads: query heads, of which `packed` share tiles."""
    dim = max(sizes.head_dim, sizes.value_dim)
    architecture = tuning.architecture(sizes.device)
    intervals = separable(task.pattern, task.extent)
    pattern = kind_of(task.pattern, intervals)
    config = tuning.lookup(kind, architecture, dim, sizes.dtype, sizes.device, pattern)
    if any(term.kind in (PER_PAIR, BY_DISTANCE, FROM_TABLE) for term in terms):
        # Compilers stage what terms read per pair in shared memory too: float32 per pair and stage.
        smaller = min(config.queries, 64), min(config.keys, 64)
        warps = config.warps
        if architecture == "sm_90" and sizes.dtype != torch.float32 and config.queries >= 64:
            # With 4 warps a table over block lists ended in illegal accesses (Triton 3.6, H100).
            warps = 8
        config = Config(*smaller, warps, 1)
    place = kind, task.pattern, task.extent, config, sizes.device
    layout = _box_layout(*place, packed) if intervals else list_layout(*place, heads)
    chosen = [_HOOKS[term.kind] for term in terms] + [hooks.NOTHING] * (2 - len(terms))
    spec = Spec(
        q_tile=layout.q_tile,
        k_tile=layout.k_tile,
        rank=layout.rank,
        head_dim=sizes.head_dim,
        value_dim=sizes.value_dim,
        route=layout.route,
        shape=_shape(task),
        first=chosen[0],
        second=chosen[1],
        precision="ieee",
        columns=least_columns(architecture, sizes.dtype),
    )
    return Stage(spec, config, layout)


def least_columns(architecture: str, dtype: torch.dtype) -> int:
    """Columns of a tensor on chip, at least."""
    # With 16 and 32 columns and 4 warps, o was wrong on an H100, for 5 values per head (Triton 3.6).
    return 64 if architecture == "sm_90" and dtype != torch.float32 else 32


def lay_out(
    kind: str,
    pattern: Pattern,
    extent: Extent,
    config: Config,
    device: torch.device,
    heads: int,
    packed: int = 1,
) -> Layout:
    """Tiles of at most the sizes of `config`, and the route between them; kind as for `stage`."""
    if separable(pattern, extent):
        return _box_layout(kind, pattern, extent, config, device, packed)
    return list_layout(kind, pattern, extent, config, device, heads)


def list_layout(
    kind: str, pattern: Pattern, extent: Extent, config: Config, device: torch.device, heads: int
) -> Layout:
    """The same for a pattern that is walked by lists whether it is separable or not."""
    call = kind, pattern, extent, config, device, heads
    found = writes(pattern)
    return _list_layout(*call) if found is None else _kept_list_layout(*call, found)


def separable(pattern: Pattern, extent: Extent) -> bool:
    """Whether the pattern is a product of intervals."""
    return not pattern.depends_on_data and _has_bounds(pattern, extent)


@functools.lru_cache(maxsize=256)
def _has_bounds(pattern: Pattern, extent: Extent) -> bool:
    return pattern.bounds(extent) is not None


def writes(pattern: Pattern) -> tuple[int, ...] | None:
    """Changes when a block list of the pattern is written in place.

    None: lists made of it must not be kept, because a graph is to find them again or because PyTorch
    does not count writes.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    if isinstance(pattern, Blocks):
        indices = pattern.selection.indices
        return None if indices.is_inference() else (indices._version,)
    found = [writes(member) for member in getattr(pattern, "members", ())]
    if any(own is None for own in found):
        return None
    return tuple(count for own in found for count in own or ())


_HOOKS = {
    PER_PAIR: hooks.PER_PAIR,
    PER_KEY: hooks.PER_KEY,
    BY_DISTANCE: hooks.BY_DISTANCE,
    FROM_TABLE: hooks.FROM_TABLE,
}


def _shape(task: Task) -> hooks.Shape:
    if task.score.soft_cap is not None:
        return hooks.CAPPED
    return hooks.PRODUCT if task.score.scale > 0 and not task.score.terms else hooks.SCALED


def scoring(task: Task, terms: tuple[LocalTerm, ...], heads: int) -> tuple[Any, ...]:
    """scale, cap and the two terms as the hooks read them."""
    score = task.score
    scale, cap = score.scale * LOG2E, 1.0
    if score.soft_cap is not None:
        scale, cap = score.scale / score.soft_cap, score.soft_cap * LOG2E
    arguments = [_term(term, heads) for term in terms] + [(0,)] * (2 - len(terms))
    return float(scale), float(cap), *arguments


def _term(term: LocalTerm, heads: int) -> tuple[Any, ...]:
    values = term.values
    if term.kind == PER_PAIR:
        return values, *_broadcast_strides(values)
    if term.kind == PER_KEY:
        keys = values.shape[-1]
        return values, *_broadcast_strides(values), heads // values.shape[1], keys
    assert term.q_codes is not None
    assert term.k_codes is not None
    head_stride = values.stride(0) if values.shape[0] > 1 else 0
    parts, queries = term.q_codes.shape
    last = values.shape[-1] - 1
    keys = term.k_codes.shape[1]
    return values, head_stride, term.q_codes, term.k_codes, queries, keys, parts, last


def _broadcast_strides(x: Tensor) -> tuple[int, ...]:
    return tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))


def _cut(size: int, tokens: int) -> int:
    """A tile size (a power of two) no larger than the tokens need."""
    return max(_SMALLEST, min(size, 1 << max(tokens - 1, 0).bit_length()))


@functools.lru_cache(maxsize=256)
def _box_layout(
    kind: str,
    pattern: Pattern,
    extent: Extent,
    config: Config,
    device: torch.device,
    packed: int = 1,
) -> Layout:
    if packed > 1:
        return _packed_layout(pattern, extent, config, device, packed)
    bounds = pattern.bounds(extent)
    on_device = boxes(pattern, extent, device)
    assert bounds is not None
    assert on_device is not None
    extent = bounds.extent
    queries, keys = _cut(config.queries, extent.Lq), _cut(config.keys, extent.Lk)
    if kind == BACKWARD_KV:
        k_tile, q_tile = tuning.choose_shapes(*inverse(bounds), extent.q_grid, keys, queries)
        limits = (on_device.q_lower, on_device.q_upper)
    else:
        q_tile, k_tile = tuning.choose_shapes(
            bounds.lower, bounds.upper, extent.kv_grid, queries, keys
        )
        limits = (on_device.lower, on_device.upper)
    arguments = (*_three_axes(limits[0]), *_three_axes(limits[1]))
    grids = in_three(extent.q_grid), in_three(extent.kv_grid)
    return Layout(len(extent.q_grid), q_tile, k_tile, *grids, routes.BOXES, arguments)


def heads_to_pack(task: Task, terms: tuple[LocalTerm, ...], groups: int) -> int:
    """How many query heads of a key head share the tiles of the forward: all, where queries are few.

    Keys are then read once for all of them.
    """
    few = task.extent.Lq <= _FEW_QUERIES and task.score.sink is None and not terms
    if groups == 1 or not few or not separable(task.pattern, task.extent):
        return 1
    return groups if len(task.extent.q_grid) == len(task.extent.kv_grid) == 1 else 1


def _packed_layout(
    pattern: Pattern, extent: Extent, config: Config, device: torch.device, packed: int
) -> Layout:
    """Queries of a sequence on the grid [packed, Lq]: on its first axis each sees all of length 1."""
    bounds = pattern.bounds(extent)
    on_device = boxes(pattern, extent, device)
    assert bounds is not None
    assert on_device is not None
    first, last = torch.zeros(packed, dtype=torch.int64), torch.ones(packed, dtype=torch.int64)
    sizes = _cut(config.queries, packed * extent.Lq), _cut(config.keys, extent.Lk)
    q_tile, k_tile = tuning.choose_shapes(
        (first, *bounds.lower), (last, *bounds.upper), (1, extent.Lk), *sizes
    )
    ends = [x.to(device=device, dtype=torch.int32) for x in (first, last)]
    lower, upper = (ends[0], *on_device.lower), (ends[1], *on_device.upper)
    arguments = (*_three_axes(lower), *_three_axes(upper))
    grids = (1, packed, extent.Lq), (1, 1, extent.Lk)
    return Layout(2, q_tile, k_tile, *grids, routes.BOXES, arguments, packed)


def _three_axes(axes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (axes[0],) * (3 - len(axes)) + axes


def list_tiles(pattern: Pattern, config: Config) -> tuple[int, int]:
    """Query and key tile of a pattern that is walked by lists: they divide its blocks."""
    unit = pattern.tile_unit() or (config.queries, config.keys)
    queries, keys = (1 << ((n & -n).bit_length() - 1) for n in unit)
    return min(queries, config.queries), min(keys, config.keys)


def refuses_lists(pattern: Pattern, extent: Extent) -> str | None:
    """Why a pattern that is not separable cannot be walked by lists, or None."""
    unit = pattern.tile_unit()
    if unit is not None and any(n % _SMALLEST for n in unit):
        return f"its blocks hold multiples of {_SMALLEST} tokens; here {unit[0]} x {unit[1]}"
    static = static_part(pattern)
    if static is None:
        return f"it joins block lists with static patterns by one & or one |, unlike {pattern.key}"
    if isinstance(pattern, Union) and pattern.depends_on_data and unit and extent.Lk % unit[1]:
        return f"a union with block lists needs Lk to be a multiple of {unit[1]}, not {extent.Lk}"
    return None


def static_part(pattern: Pattern) -> Pattern | None:
    """The pattern that decides inside partial tiles, or None when no single one does."""
    if not pattern.depends_on_data:
        return pattern
    if isinstance(pattern, Blocks):
        return Dense()
    if not isinstance(pattern, Intersection | Union):
        return None
    lists = [p for p in pattern.members if p.depends_on_data]
    static = tuple(p for p in pattern.members if not p.depends_on_data)
    if any(not isinstance(p, Blocks) for p in lists):
        return None
    if not static:
        return Dense()
    return static[0] if len(static) == 1 else type(pattern)(static)


def _list_layout(
    kind: str, pattern: Pattern, extent: Extent, config: Config, device: torch.device, heads: int
) -> Layout:
    q_tile, k_tile = list_tiles(pattern, config)
    by_key = kind == BACKWARD_KV
    if pattern.depends_on_data:
        states = tile_states(pattern, extent, q_tile, k_tile, device)
        lists = _lists(states, extent.Lk % k_tile > 0, by_key, heads)
    else:
        lists = _static_lists(pattern, extent, q_tile, k_tile, device, by_key)
    static = static_part(pattern)
    assert static is not None
    route, marks, limits = _tests(static, extent, q_tile, k_tile, device, by_key)
    grids = in_three(extent.flat().q_grid), in_three(extent.flat().kv_grid)
    arguments = (*lists, *marks, *limits)
    return Layout(1, (1, 1, q_tile), (1, 1, k_tile), *grids, route, arguments)


@functools.lru_cache(maxsize=8)
def _kept_list_layout(
    kind: str,
    pattern: Pattern,
    extent: Extent,
    config: Config,
    device: torch.device,
    heads: int,
    versions: tuple[int, ...],
) -> Layout:
    return _list_layout(kind, pattern, extent, config, device, heads)


@functools.lru_cache(maxsize=64)
def _static_lists(
    pattern: Pattern,
    extent: Extent,
    q_tile: int,
    k_tile: int,
    device: torch.device,
    by_key: bool,
) -> tuple[Any, ...]:
    states = pattern.tile_map(extent, q_tile, k_tile)[None, None].to(device)
    return _lists(states, extent.Lk % k_tile > 0, by_key, 1)


def _lists(states: Tensor, ragged: bool, by_key: bool, heads: int) -> tuple[Any, ...]:
    """Lists as the routes read them, partial tiles first; states [B or 1, heads or 1, q, k] tiles.

    A last key tile that the keys do not fill counts as partial.
    """
    if ragged:
        states = states.clone()
        states[..., -1] = states[..., -1].clamp(max=PARTIAL)
    if by_key:
        states = states.transpose(-1, -2)
    rank = torch.where(states == PARTIAL, 0, torch.where(states == FULL, 1, 2)).to(torch.uint8)
    indices = torch.argsort(rank, dim=-1, stable=True).to(torch.int32).contiguous()
    partial = (rank == 0).sum(-1).to(torch.int32).contiguous()
    counts = (rank < 2).sum(-1).to(torch.int32).contiguous()
    batches, lists, tiles, width = states.shape
    strides = (lists * tiles if batches > 1 else 0, tiles if lists > 1 else 0)
    return indices, partial, counts, *strides, heads // lists if lists > 1 else heads, width


@functools.lru_cache(maxsize=64)
def _tests(
    static: Pattern,
    extent: Extent,
    q_tile: int,
    k_tile: int,
    device: torch.device,
    by_key: bool,
) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """The route, its marks and what it tests pairs with: intervals where there are some, else bits."""
    bounds = static.bounds(extent)
    if bounds is not None and len(bounds.extent.kv_grid) == 1:
        ends = inverse(bounds) if by_key else (bounds.lower, bounds.upper)
        limits = tuple(axes[0].to(device=device, dtype=torch.int32) for axes in ends)
        return routes.LISTS, (limits[0], 0), limits
    two = spans(static, extent, by_key) if bounds is None else None
    if two is not None:
        limits = tuple(x.to(device) for x in two)
        return routes.SPANS, (limits[0], 0), limits
    words, marks = (x.to(device) for x in bits(static, extent, q_tile, k_tile, by_key))
    return routes.BITS, (marks, marks.shape[1]), (words, words)


def bits(
    static: Pattern, extent: Extent, q_tile: int, k_tile: int, by_key: bool = False
) -> tuple[Tensor, Tensor]:
    """Visible pairs of the partial tiles as words [tiles, q_tile, ceil(k_tile / 32)] and which words
    each tile has, int32 [q_tiles, k_tiles]; keys and queries change places `by_key`."""
    states = static.tile_map(extent, q_tile, k_tile).clone()
    if extent.Lk % k_tile:
        states[:, -1] = states[:, -1].clamp(max=PARTIAL)
    marks = torch.zeros(states.shape, dtype=torch.int32)
    partial = torch.nonzero(states == PARTIAL)
    marks[partial[:, 0], partial[:, 1]] = torch.arange(len(partial), dtype=torch.int32)
    own, other = (k_tile, q_tile) if by_key else (q_tile, k_tile)
    width = -(-other // 32)
    words = torch.zeros(max(len(partial), 1), own, width, dtype=torch.int32)
    weight = torch.ones(32, dtype=torch.int64) << torch.arange(32)
    within_q, within_k = torch.arange(q_tile), torch.arange(k_tile)
    at_once = max(1, _PAIRS_AT_ONCE // (own * width * 32))
    for numbers in torch.arange(len(partial)).split(at_once):
        q = partial[numbers, 0, None] * q_tile + within_q  # [tiles, q_tile]
        k = partial[numbers, 1, None] * k_tile + within_k
        q_pos = q.clamp(max=extent.Lq - 1) + (extent.Lk - extent.Lq)
        k_pos = k.clamp(max=extent.Lk - 1)
        seen = static.allows(q_pos[:, :, None], k_pos[:, None], extent)
        seen = seen & (q < extent.Lq)[:, :, None] & (k < extent.Lk)[:, None]
        seen = torch.nn.functional.pad(seen.mT if by_key else seen, (0, width * 32 - other))
        packed = (seen.unflatten(-1, (width, 32)) * weight).sum(-1)
        words[numbers] = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return words, marks.T.contiguous() if by_key else marks
