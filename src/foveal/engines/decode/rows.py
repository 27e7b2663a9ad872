"""Launches the kernel of rows.cu."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from foveal.caches.view import Columns, View
from foveal.engines.common import nvrtc
from foveal.engines.common.early import starts_early
from foveal.engines.decode.parts import Parts, merge_parts
from foveal.engines.decode.problem import Terms
from foveal.engines.decode.row_kinds import KINDS

_WARPS = 2


class _Problem(ctypes.Structure):
    """The argument of the kernel, field by field as in rows.cu."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_longlong) for name in ("q_batch", "q_token", "q_head")),
        ("table", ctypes.c_void_p),
        ("table_batch", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("lengths", "after", "seen")),
        *((name, ctypes.c_int) for name in ("page_size", "page_step", "head_step", "units")),
        *((name, ctypes.c_void_p) for name in ("keys", "key_channels")),
        *((name, ctypes.c_void_p) for name in ("values", "value_channels")),
        *((name, ctypes.c_void_p) for name in ("key_scales", "key_zeros")),
        *((name, ctypes.c_void_p) for name in ("value_scales", "value_zeros")),
        *((name, ctypes.c_void_p) for name in ("slopes", "sink")),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap")),
        *((name, ctypes.c_int) for name in ("Lq", "left", "sink_tokens", "programs")),
        *((name, ctypes.c_void_p) for name in ("o", "lse", "part", "part_max", "part_sum")),
    )


def decode_rows(view: View, terms: Terms, q: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] in float32; nothing waits for the device."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    o = torch.empty(*q.shape[:3], view.value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    macros = macros_of(view, terms, q)
    shared = shared_memory(macros)
    kernel = _kernel(tuple(macros.items()), shared, q.device)
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs, keys = macros["BLOCKS"] * multiprocessors, 32 * macros["WARPS"]
    parts = Parts.of(programs, macros["ROWS"], keys, view.value_dim, q.device)
    wide = [None if x is None else x.float().contiguous() for x in (terms.slopes, terms.sink)]
    problem = problem_of(view, terms, q, o, lse, parts, *wide)
    stream = torch.cuda.current_stream(q.device).cuda_stream
    kernel.launch(programs, keys, shared, stream, problem)
    merge_parts(view, terms, o, lse, parts)
    return o, lse


def macros_of(view: View, terms: Terms, q: Tensor) -> dict[str, int]:
    """The sizes that the kernel is compiled for."""
    assert view.values is not None
    kind, groups = view.keys.codec.kind, q.shape[2] // view.kv_heads
    rows = 8 if q.shape[1] * groups <= 8 else 16
    return {
        "KIND": KINDS[kind],
        "BFLOAT16": int(q.dtype == torch.bfloat16),
        "DIM": q.shape[3],
        "VALUE_DIM": view.value_dim,
        "KEY_ENTRIES": view.keys.tensors[0].shape[1],
        "VALUE_ENTRIES": view.values.tensors[0].shape[1],
        "HEADS": view.kv_heads,
        "GROUPS": groups,
        "ROWS": rows,
        "WARPS": _WARPS,
        "BLOCKS": _blocks(rows, max(q.shape[3], view.value_dim)),
        "WINDOW": int(terms.left is not None),
        "SOFT_CAP": int(terms.soft_cap is not None),
        "SLOPES": int(terms.slopes is not None),
        "EARLY": int(starts_early(q.device)),
    }


def shared_memory(macros: dict[str, int]) -> int:
    """Bytes of a block: spread entries of every warp, and in their place later its sums and scores."""
    widest = max(macros["DIM"], macros["VALUE_DIM"])
    spread = 32 * (widest + 8) * 2 if macros["KIND"] == KINDS["channels"] else 0
    return macros["WARPS"] * max(spread, macros["ROWS"] * (macros["VALUE_DIM"] + 4 + 2) * 4)


def problem_of(
    view: View, terms: Terms, q: Tensor, o: Tensor, lse: Tensor, parts: Parts,
    slopes: Tensor | None, sink: Tensor | None,
) -> ctypes.Structure:  # fmt: skip
    """The argument of the kernel; slopes and sink [Hq] in float32."""
    assert view.values is not None
    return _Problem(
        *(q.data_ptr(), q.stride(0), q.stride(1), q.stride(2)),
        *(view.page_table.data_ptr(), view.page_table.stride(0)),
        *(_address(x) for x in (view.lengths, view.after, view.seen)),
        *(view.page_size, view.steps[0], view.steps[1], view.batch),
        *_rows_and_channels(view.keys),
        *_rows_and_channels(view.values),
        *_scales_and_zeros(view.keys),
        *_scales_and_zeros(view.values),
        *(_address(x) for x in (slopes, sink)),
        *(terms.scale, terms.soft_cap or 1.0),
        *(q.shape[1], terms.left or 0, terms.sink_tokens, parts.programs),
        *(_address(x) for x in (o, lse, parts.sums, parts.largest, parts.totals)),
    )


def _blocks(rows: int, widest: int) -> int:
    """Blocks of a multiprocessor: as many as registers for keys, values and sums in flight allow."""
    if widest > 128:
        return 2
    return 6 if rows == 8 else 4


@functools.lru_cache(maxsize=64)
def _kernel(macros: tuple[tuple[str, int], ...], shared: int, device: torch.device) -> nvrtc.Kernel:
    source = Path(__file__).with_name("rows.cu")
    kernel = nvrtc.Kernel(source, "decode_rows_forward", dict(macros), device)
    kernel.allow(shared)
    return kernel


def _rows_and_channels(columns: Columns) -> tuple[int | None, int | None]:
    first, *others = columns.tensors
    channels = others[0] if columns.codec.kind == "channels" else None
    return first.data_ptr(), _address(channels)


def _scales_and_zeros(columns: Columns) -> tuple[int | None, int | None]:
    if columns.codec.kind == "channels":
        return None, None
    found = [_address(x) for x in (*columns.tensors[1:], None, None)]
    return found[0], found[1]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
