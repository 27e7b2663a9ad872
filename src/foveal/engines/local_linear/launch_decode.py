"""Launches of the decode: when it pays, and over how many parts of the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.engines.local_linear.decode import (
    local_linear_decode,
    local_linear_decode_merge,
    local_linear_decode_solve,
)
from foveal.engines.local_linear.decode_given import (
    local_linear_decode_given,
    local_linear_decode_given_merge,
)
from foveal.engines.local_linear.kernels import Solver
from foveal.engines.local_linear.launch import LOG2E
from foveal.engines.tile.launch import separable
from foveal.engines.tile.launches import Launch
from foveal.engines.tile.lists import boxes
from foveal.engines.tile.parts import Task
from foveal.engines.tile.spec import padded

_MOST_QUERIES = 4
_LEAST_KEYS = 256
_LARGEST_DIM = 128
_KEYS = 32
# Bytes of a column of a box of keys where r is given.
_GIVEN_BYTES = 128
_WARPS = 8
# Lines of a matrix that a program merges, at most, and of those of all parts, at 128 columns.
_LINES = 4
_MERGED = 64
# Squares of so many lines below the diagonal of a symmetric matrix are not written.
_SIDE = 16
# Programs that solve a system, each for its columns of the output.
_SOLVERS = 2
# Keys of a part are at least so many.
_LEAST_SHARE = 256
_MOST_SPLITS = 64


def decodes(task: Task, q: Tensor, v: Tensor) -> bool:
    """Whether few queries see intervals of many keys."""
    few = task.extent.Lq <= _MOST_QUERIES and task.extent.Lk >= _LEAST_KEYS
    small = max(q.shape[3], v.shape[3]) <= _LARGEST_DIM
    return few and small and len(task.extent.kv_grid) == 1 and separable(task.pattern, task.extent)


def decode(task: Task, solver: Solver, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o [N, Lq, H, Dv] and lse [N, H, Lq] of a task that `decodes`."""
    on_device = boxes(task.pattern, task.extent, q.device)
    assert on_device is not None
    N, Lq, heads, D = q.shape
    DV, pad = v.shape[3], max(padded(D), padded(v.shape[3]))
    rows = N * heads * Lq
    splits = _splits(rows, task.extent.Lk, q.device)
    sums = torch.empty(rows, splits, 2 + 2 * pad, device=q.device)
    matrices = torch.empty(rows, splits, pad, 2 * pad, device=q.device)
    means = torch.empty(rows, 1 + 2 * pad, device=q.device)
    system = torch.empty(rows, pad, 2 * pad, device=q.device)
    o, lse = q.new_empty(N, Lq, heads, DV), torch.empty(N, heads, Lq, device=q.device)
    side = {"PAD": pad, "SIDE": _SIDE}
    sizes = {"D": D, "DV": DV, "PAD": pad}
    arguments = (
        q, k, v, on_device.lower[0], on_device.upper[0], sums, matrices,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], heads, heads // k.shape[2], Lq, splits,
        float(task.score.scale * LOG2E),
    )  # fmt: skip
    Launch(local_linear_decode, rows * splits, arguments, _boxed(q, pad) | sizes | side)()
    merged = (sums, matrices, means, system, splits)
    some = 1 << (splits - 1).bit_length()
    lines = max(1, min(_LINES, _MERGED * 128 // (some * pad)))
    options = {"LINES": lines, "SPLITS": some, "num_warps": 8 if some * pad > 2048 else 4}
    Launch(local_linear_decode_merge, rows * (pad // lines), merged, side | options)()
    solved = (
        q, solver.ridge, means, system, o, lse, q.stride()[:3], o.stride()[:3], heads, Lq,
        solver.max_iterations, float(solver.tolerance),
    )  # fmt: skip
    columns = max(pad // _SOLVERS, 16)
    options = {"COLUMNS": columns, "HELD": 512 // pad, "num_warps": 4}
    Launch(local_linear_decode_solve, rows * (pad // columns), solved, sizes | options)()
    return o, lse


def _boxed(q: Tensor, pad: int) -> dict[str, Any]:
    """Options of the sums: more boxes on their way where they fit into shared memory."""
    roomy = q.is_cuda and torch.version.hip is None and q.element_size() == 2
    roomy = roomy and torch.cuda.get_device_capability(q.device)[0] >= 9
    # A program's threads hold so many keys beside each other, eight columns each.
    apart = max(1, min(_KEYS, 8 * 32 * _WARPS // pad))
    return {
        "KEYS": _KEYS, "APART": apart, "PRECISION": "ieee",
        "num_warps": _WARPS, "num_stages": 3 if roomy else 2,
    }  # fmt: skip


def decode_given(task: Task, q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """As `decode`, with r [N, 1, H, D] of one query."""
    on_device = boxes(task.pattern, task.extent, q.device)
    assert on_device is not None
    N, Lq, heads, D = q.shape
    DV, groups, kv_heads = v.shape[3], heads // k.shape[2], k.shape[2]
    sizes = {"DV": DV, "VALUE_PAD": padded(DV), "ROWS": max(16, 1 << (groups - 1).bit_length())}
    splits = _splits(N * kv_heads, task.extent.Lk, q.device)
    width = 4 + 2 * sizes["VALUE_PAD"]
    sums = torch.empty(N * kv_heads * splits, width, sizes["ROWS"], device=q.device)
    o, lse = q.new_empty(N, Lq, heads, DV), torch.empty(N, heads, Lq, device=q.device)
    arguments = (
        q, r, k, v, on_device.lower[0], on_device.upper[0], sums,
        q.stride()[:3], r.stride()[:3], k.stride()[:3], v.stride()[:3], heads, groups, splits,
        float(task.score.scale * LOG2E),
    )  # fmt: skip
    keys = _GIVEN_BYTES // q.element_size()
    options = {"D": D, "PAD": padded(D), "KEYS": keys, "PRECISION": "ieee"}
    options |= {"num_warps": 4, "num_stages": 3}
    Launch(local_linear_decode_given, len(sums), arguments, sizes | options)()
    several = {"SPLITS": 1 << (splits - 1).bit_length(), "num_warps": 4}
    merged = (sums, o, lse, o.stride()[:3], heads, groups, splits)
    Launch(local_linear_decode_given_merge, N * heads, merged, sizes | several)()
    return o, lse


def _splits(rows: int, keys: int, device: torch.device) -> int:
    """Parts of the keys: as many programs as the device runs at once, unless they got few keys."""
    units = 8
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(units // max(rows, 1), keys // _LEAST_SHARE, _MOST_SPLITS))
