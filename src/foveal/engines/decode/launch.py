"""Launches of the decode kernels: tiles, programs, workspace."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal._recent import Recent
from foveal.caches.view import Columns, View
from foveal.engines.decode.attend import decode_attend_forward
from foveal.engines.decode.loads import PACKED, loads_of
from foveal.engines.decode.parts import Parts, merge_parts, power, split_options
from foveal.engines.decode.problem import Terms
from foveal.engines.decode.row_kinds import serves
from foveal.engines.decode.rows import decode_rows
from foveal.engines.tile.replay import Replay, launch, replayed


@dataclass(frozen=True)
class DecodeTiles:
    """What a program holds: rows (queries x query heads of a key head) and keys, and how it is run."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


def tiles_of(view: View, rows: int, device: torch.device) -> DecodeTiles:
    """Tiles for `rows` rows of every key head of a view.

    About 32 KB of keys and values in a tile, and two programs with two such in flight on every
    multiprocessor; where most programs begin a new head now and then, three with one hide that better
    (64 mixed lengths on an H100: 0.691 ms, else 0.721).  The places of rows in pages are found one step
    before they are read: a stage more for each tile in flight.  Long sequences in small pages take one
    program with two tiles of twice the keys (16 x 65,536 tokens: 1.393 ms, else 1.403).
    """
    heads, paged = view.batch * view.kv_heads, view.page_table.shape[2] > 1
    row_bytes, value_dim = view.row_bytes(), view.value_dim
    held = min(max(power(rows), 16), 128 if value_dim <= 128 else 64)
    keys = 128
    while keys > 16 and keys * row_bytes > 40960:
        keys //= 2
    warps = 8 if held * power(value_dim) > 8192 else 4
    if paged and held == 16:
        if heads > 2 * processors(device):
            return DecodeTiles(held, keys, warps, 4, 3 * processors(device))
        if _takes_wide_tiles(view, keys, device):
            return DecodeTiles(held, 2 * keys, warps, 5, processors(device))
    buffers = 2 if 5 * keys * row_bytes <= shared_memory(device) else 1
    stages = 2 * buffers + 1 if paged else buffers + 1
    return DecodeTiles(held, keys, warps, stages, 2 * processors(device))


_BESIDE_TILES = 16 << 10
"""Bytes of shared memory that a program needs beside its tiles, at most."""


def _takes_wide_tiles(view: View, keys: int, device: torch.device) -> bool:
    """Whether tiles of 64 keys may become 128: there is work for all, and room for two of them."""
    if keys != 64 or view.page_size % 128 == 64:
        return False
    wide = 2 * keys
    tiles = view.batch * view.kv_heads * (view.page_table.shape[2] * view.page_size // wide)
    room = 2 * wide * view.row_bytes() + _BESIDE_TILES
    return tiles >= 4 * processors(device) and room <= shared_memory(device)


@functools.lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 4 stand for the interpreter's."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=8)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 64 << 10))


def decode_on_device(
    view: View, terms: Terms, q: Tensor, tiles: DecodeTiles | None = None, lean: bool = False
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] in the dtype of q and lse [B, Lq, Hq] in float32; nothing waits for the device."""
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if tiles is None and not lean and serves(view, terms, q):
            return decode_rows(view, terms, q)
        if not q.is_cuda:
            return _compute(view, terms, q, tiles, lean)
        stored = (*view.keys.tensors, *(view.values.tensors if view.values else ()))
        optional = (
            *(view.after, view.bias, view.positions),
            *(terms.sink, terms.key_bias, terms.slopes),
        )
        kind = (
            *(view.keys.codec, view.values and view.values.codec, view.page_size, view.steps),
            *(view.kv_heads, view.value_dim, view.guarded),
            *(x is not None and x.dtype for x in optional),
            *(terms.scale, terms.soft_cap, terms.causal, terms.left, terms.sink_tokens),
            *(tiles, lean, q.dtype, q.device),
        )
        given = (q, view.page_table, view.lengths, view.seen, *stored, *optional)
        tensors = [x for x in given if x is not None]
        o, lse = replayed(_REPLAYS, kind, tensors, lambda: _compute(view, terms, q, tiles, lean))
    assert o is not None
    assert lse is not None
    return o, lse


_REPLAYS: Recent[Replay | int] = Recent(64)


def _compute(
    view: View, terms: Terms, q: Tensor, tiles: DecodeTiles | None, lean: bool
) -> tuple[Tensor, Tensor]:
    batch, Lq, q_heads, head_dim = q.shape
    groups = q_heads // view.kv_heads
    q = q if q.stride(-1) == 1 else q.contiguous()
    latent = view.values is None
    first = view.value_dim if latent else head_dim
    pack = PACKED[view.keys.codec.kind]
    keys, values = _columns(view.keys, pack), _columns(view.values or view.keys, pack)
    value_width = 0 if latent else values[0].shape[1]
    if tiles is None:
        tiles = tiles_of(view, Lq * groups, q.device)
    o = torch.empty(batch, Lq, q_heads, view.value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, Lq, q_heads, dtype=torch.float32, device=q.device)
    parts = Parts.of(tiles.programs, tiles.rows, tiles.keys, view.value_dim, q.device)
    table = view.page_table
    fast = q.device.type == "cuda" and torch.version.hip is None and q.dtype == torch.bfloat16
    loads, scaled = loads_of(view.keys.codec.kind, fast)
    single = table.shape[2] == 1
    layout = 0 if single else 1 if view.page_size % tiles.keys == 0 else 2
    attend_arguments = (
        q,
        (q.stride(0), q.stride(1), q.stride(2)),
        table,
        (table.stride(0), table.stride(1) if table.shape[1] > 1 else 0),
        view.lengths,
        view.after,
        view.seen,
        view.page_size,
        view.steps,
        keys,
        values,
        _terms(view, terms, groups),
        terms.sink,
        o,
        lse,
        parts.sums,
        parts.largest,
        parts.totals,
        *(view.lengths.numel(), Lq, terms.left or 0, terms.sink_tokens, tiles.programs, int(lean)),
    )
    attend_options = {
        "LOADS": loads,
        "SCALED": scaled,
        "SOFT_CAP": terms.soft_cap is not None,
        "CAUSAL": terms.causal,
        "BOUNDARY": terms.causal and Lq > 1,
        "TABLE": layout,
        "PAGE": view.page_size if layout == 2 and view.page_size < 1024 else 0,
        "D": first // pack,
        "D_PAD": max(power(first // pack), 16),
        "REST": head_dim - first,
        "DV_PAD": max(power(view.value_dim // pack), 16),
        "PACK": pack,
        "KEY_WIDTH": keys[0].shape[1],
        "VALUE_WIDTH": value_width,
        "STAGES": tiles.stages,
        "GUARDED": view.guarded,
        "num_warps": tiles.warps,
        **split_options(view, terms, groups, parts),
    }
    launch(decode_attend_forward, (tiles.programs,), *attend_arguments, **attend_options)
    merge_parts(view, terms, o, lse, parts, lean)
    return o, lse


def _columns(columns: Columns, pack: int) -> tuple[Any, ...]:
    """The columns that the loads of a kind name by place: values (in words of 16 bits), scales, zeros."""
    first, *others = columns.tensors
    first = first if pack == 1 else first.view(torch.int16)
    return (first, *others, *(None for _ in range(2 - len(others))))


def _terms(view: View, terms: Terms, groups: int) -> tuple[Any, ...]:
    bias, steps = terms.key_bias, (0, 0, 0)
    if bias is not None:
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        own = bias.shape[1] == view.kv_heads * groups
        batch_step = bias.stride(0) if bias.shape[0] > 1 else 0
        head_step = bias.stride(1) if bias.shape[1] > 1 else 0
        steps = (batch_step, head_step * groups, head_step) if own else (batch_step, head_step, 0)
    cap = 1.0 if terms.soft_cap is None else float(terms.soft_cap)
    return (float(terms.scale), cap, terms.slopes, bias, steps, view.bias, view.positions)
