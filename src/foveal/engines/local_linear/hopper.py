"""The forward on Hopper: passes of the warp-specialised kernels, and what is left to the portable ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal._recent import Recent
from foveal.engines.common.early import starts_early
from foveal.engines.local_linear.forward import local_linear_moments, local_linear_output
from foveal.engines.local_linear.hopper_given import local_linear_given
from foveal.engines.local_linear.hopper_pass import local_linear_means, local_linear_values
from foveal.engines.local_linear.hopper_steps import local_linear_steps
from foveal.engines.local_linear.kernels import LONG, Reached, Rows, Solver, unit
from foveal.engines.local_linear.launch import stage
from foveal.engines.local_linear.open_rows import local_linear_open_rows
from foveal.engines.local_linear.prepare import local_linear_prepare, local_linear_spread
from foveal.engines.local_linear.solve import local_linear_solve
from foveal.engines.tile.hopper_launch import descriptor, head_pad, on_grid, packed_bounds, programs
from foveal.engines.tile.hopper_plan import Walk, forward_walk, queries_walk, shared_heads
from foveal.engines.tile.launch import least_columns, separable
from foveal.engines.tile.launches import Launch
from foveal.engines.tile.parts import Task
from foveal.engines.tile.replay import Replay, Results, replayed
from foveal.engines.tile.spec import padded
from foveal.patterns.dense import Dense

_SOME = 512
"""Keys of a head whose covariance is looked at."""
_SLOTS = 4096
"""Rows that a program looks at together to find those that are left."""
_LEAST_KEYS = 256
"""Fewer are not worth kernels of their own."""


def suits(task: Task, q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take a task: intervals of keys on one axis or two, up to 128 columns."""
    small = max(q.shape[3], v.shape[3]) <= 128
    many = task.extent.Lk >= _LEAST_KEYS
    return many and small and len(task.extent.q_grid) < 3 and separable(task.pattern, task.extent)


def forward(
    task: Task, solver: Solver, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Rows, Reached]:
    """o [N, Lq, H, Dv], and what the portable kernels would have found, of a task that `suits`."""

    def compute() -> Results:
        call = _Call(task, solver, q, k, v)
        for one in call.launches():
            one()
        reached = call.reached
        return call.o, call.x, call.mean, call.lse, reached.ratio, reached.count

    kind = ("solve", solver.tolerance, solver.max_iterations)
    o, x, mean, lse, ratio, count = _repeated(task, kind, (q, k, v, solver.ridge), compute)
    return o, Rows(x, mean, lse), Reached(ratio, count)


_REPLAYS: Recent[Replay | int] = Recent(64)


def _repeated(
    task: Task,
    kind: tuple[object, ...],
    tensors: tuple[Tensor, ...],
    compute: Callable[[], Results],
) -> tuple[Tensor, ...]:
    """compute(), as a repetition of its launches if a call like it was there before."""
    x = tensors[0]
    key = (*kind, task.pattern, task.extent, task.score.scale, x.dtype, x.device)
    found = replayed(_REPLAYS, key, tensors, compute) if x.is_cuda else compute()
    return tuple(each for each in found if each is not None)


class _Call:
    """The launches of a forward, and the memory between them."""

    def __init__(self, task: Task, solver: Solver, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.task, self.solver = task, solver
        self.q, self.k, self.v = q, k, v
        self.mean = q.new_empty(q.shape, dtype=torch.float32)
        self.lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        self.x, self.residual = torch.empty_like(self.mean), torch.empty_like(self.mean)
        self.direction = torch.empty_like(self.mean, dtype=q.dtype)
        self.reached = Reached(
            torch.empty_like(self.lse), torch.empty_like(self.lse, dtype=torch.int32)
        )
        self.levels = self.lse.new_empty(4, *self.lse.shape)
        self.noise, self.marks = noise_and_marks(q)
        self.spread = self.lse.new_empty(k.shape[0], k.shape[2])
        self.rows = torch.empty_like(self.reached.count)
        self.counts = self.rows.new_empty(q.shape[0], q.shape[2])
        self.o = q.new_empty(*q.shape[:3], v.shape[3])

    def launches(self) -> list[Launch]:
        """All of them, in their order."""
        return [
            self.begin(),
            self.means(),
            *self.steps(),
            *self.rest(),
            *self.output(),
        ]

    def begin(self) -> Launch:
        """What `prepare` does, and how much the variance of the keys differs from axis to axis."""
        k, D = self.k, self.k.shape[3]
        pad = max(padded(D), least_columns("sm_90", k.dtype))
        sizes = {"D": D, "PAD": pad, "ROWS": 128, "SOME": _SOME, "num_warps": 8}
        sizes["EARLY"] = starts_early(k.device)
        heads = k.shape[2]
        arguments = (
            k, self.noise, self.marks, self.spread, k.stride()[:3], k.shape[1], heads,
            k.numel() // D, _rounding(k),
        )  # fmt: skip
        return Launch(local_linear_spread, k.shape[0] * heads, arguments, sizes)

    def means(self) -> Launch:
        """Mean keys, lse, and the start of the solve."""
        walk = queries_walk(self.task.pattern, self.task.extent, 128)
        if self.k.shape[3] <= 64:
            walk = dataclasses.replace(walk, consumers=1)
        state = (
            self.x, self.residual, self.direction, self.reached.ratio,
            self.reached.count, self.levels, self.levels.stride(0), self.solver.ridge, self.noise,
            float(self.solver.tolerance), LONG,
        )  # fmt: skip
        middle = (self.lse, self.mean, self.spread, state, self.marks)
        options = {"D": self.q.shape[3], **follows(self.q)}
        return _prepared(self.task, local_linear_means, walk, (self.q,), (self.k,), middle, options)

    def steps(self) -> list[Launch]:
        """Steps of the rows that are not solved, until they are."""
        task, q, k = self.task, self.q, self.k
        walk = queries_walk(task.pattern, task.extent, 128)
        (X, Y, Z), axes, bounds = packed_bounds(task.pattern, task.extent, q.device, False)
        kv_grid = task.extent.kv_grid if axes > 1 else (task.extent.Lk,)
        heads, groups, D = q.shape[2], q.shape[2] // k.shape[2], q.shape[3]
        lines, length = q.shape[0] * heads, math.prod(walk.rows)
        tiles = -(-X * Y * Z // length)
        state = (
            self.x, self.residual, self.direction, self.reached.ratio, self.reached.count,
            self.levels, self.levels.stride(0), self.solver.ridge, self.noise, LONG,
        )  # fmt: skip
        lists = self.reached.ratio, self.rows, self.counts, X, Y, Z
        slots = min(_SLOTS, 1 << (X * Y * Z - 1).bit_length())
        options = {"R": walk.rows, "SLOTS": slots, "num_warps": 8, **follows(q)}
        find = Launch(local_linear_open_rows, lines, lists, options)
        arguments = (
            descriptor(on_grid(k, kv_grid), walk.columns, axes), q, q.stride()[:3], self.lse, self.mean,
            self.spread, state, self.marks, self.rows, self.counts, bounds, X, Y, Z, heads, groups,
            shared_heads(heads, groups, k.shape[1], D), tiles, unit(task),
            self.solver.max_iterations,
        )  # fmt: skip
        # Rows of a tile come from anywhere: without hidden pairs only where all see the same.
        hides = walk.hides or not isinstance(task.pattern, Dense)
        options = {
            "M": length, "C": walk.columns, "AXES": axes, "STAGES": 4,
            "HIDES": hides, "D": D, "PAD": head_pad(D), "num_warps": 4, "enable_fp_fusion": True,
            **_registers(1), **follows(q),
        }  # fmt: skip
        return [find, Launch(local_linear_steps, lines * tiles, arguments, options)]

    def rest(self) -> list[Launch]:
        """Tiles of which a row had too much noise, more precisely; all of them if a sum was not finite."""
        task, q, k, v = self.task, self.q, self.k, self.v
        heads, groups = q.shape[2], q.shape[2] // k.shape[2]
        chosen = stage("solve", task, q, v, precise=True)
        layout, mean = chosen.layout, self.mean
        arguments = (
            q, mean, mean, self.lse, self.solver.ridge, self.noise, self.x, self.residual,
            self.direction, self.reached.ratio, self.reached.count, (self.marks, self.levels[3]),
            layout.q_strides(q), layout.q_strides(mean), layout.q_strides(mean), layout.q_grid,
            (k, layout.k_strides(k), layout.k_grid), heads, groups, unit(task),
            float(self.solver.tolerance), self.solver.max_iterations, layout.arguments,
        )  # fmt: skip
        options = {"ADJOINT": False, "AGAIN": True, **chosen.options, **follows(q)}
        return [
            _means_again(task, q, k, v, mean, self.lse, self.marks),
            Launch(local_linear_solve, chosen.queries(q), arguments, options),
        ]

    def output(self) -> list[Launch]:
        """o; tiles with a long r, or marked ones, by the portable kernel in pieces of r."""
        task, q, k, v, o = self.task, self.q, self.k, self.v, self.o
        walk = forward_walk(task.pattern, task.extent, 128)
        walk = dataclasses.replace(walk, stages=2 if max(q.shape[3], v.shape[3]) > 64 else 4)
        options = {"D": q.shape[3], "DV": v.shape[3], **follows(q)}
        middle = (self.lse, self.mean, self.levels[3], o, o.stride()[:3], self.marks)
        fast = _prepared(
            task, local_linear_values, walk, (q, self.direction), (k, v), middle, options
        )
        rows = Rows(self.x, self.mean, self.lse)
        return [fast, _output_again(task, q, k, v, rows, o, self.marks, LONG, self.levels[3])]


def follows(q: Tensor) -> dict[str, Any]:
    """Options of a kernel that starts while the one in front of it ends."""
    return {"EARLY": True, "launch_pdl": True} if starts_early(q.device) else {}


def noise_and_marks(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for what `prepare` writes."""
    return q.new_empty(1, dtype=torch.float32), q.new_empty(2, dtype=torch.int32)


def prepare(k: Tensor, noise: Tensor, marks: Tensor) -> Launch:
    """The noise of roundings to the dtype of k, and marks that are not set."""
    D, total = k.shape[3], k.numel() // k.shape[3]
    arguments = (k, noise, marks, k.stride()[:3], k.shape[1], k.shape[2], total, _rounding(k))
    sizes = {"D": D, "PAD": padded(D), "ROWS": 128, "num_warps": 4}
    return Launch(local_linear_prepare, 1, arguments, sizes)


def _rounding(k: Tensor) -> float:
    return 0.2 * torch.finfo(k.dtype).eps


def _registers(consumers: int) -> dict[str, int]:
    """Two programs of a single consumer share a processor: while one takes a step, the other multiplies."""
    return {"maxnreg": 128} if consumers == 1 else {}


def _prepared(
    task: Task, kernel: Any, walk: Walk, rows: tuple[Tensor, ...], columns: tuple[Tensor | None, ...],
    middle: tuple[Any, ...], options: dict[str, Any],
) -> Launch:  # fmt: skip
    """A kernel on boxes of rows [N, Lq, H, .] and columns [N, Lk, Hkv, .], with all its arguments."""
    q, k = rows[0], columns[0]
    assert k is not None
    lengths, axes, bounds = packed_bounds(task.pattern, task.extent, q.device, False)
    kv_grid = task.extent.kv_grid if axes > 1 else (task.extent.Lk,)
    laid_out = [on_grid(x, lengths[:axes]) for x in rows]
    total, _ = programs(dataclasses.replace(walk, persistent=False), lengths, laid_out[0])
    heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    width = max(x.shape[3] for x in (*rows, *columns) if x is not None)
    boxes = [
        None if x is None else descriptor(on_grid(x, kv_grid), walk.columns, axes) for x in columns
    ]
    arguments = (
        *(descriptor(x, walk.rows, axes) for x in laid_out), *boxes, *middle, bounds, *lengths,
        heads, groups, shared_heads(heads, groups, k.shape[1], width), total, unit(task),
    )  # fmt: skip
    fixed = {
        "W": walk.consumers, "R": walk.rows, "C": walk.columns, "AXES": axes,
        "STAGES": walk.stages, "HIDES": walk.hides, "SKIPS": walk.skips,
        "num_warps": 4, "enable_fp_fusion": True, **_registers(walk.consumers),
    }  # fmt: skip
    return Launch(kernel, total, arguments, fixed | options)


def forward_given(task: Task, q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """o [N, Lq, H, Dv] and base-2 lse [N, H, Lq] of a task that `suits`; r [N, Lq, H, D], dtype of q."""

    def compute() -> Results:
        o = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        mean = q.new_empty(q.shape, dtype=torch.float32)
        noise, marks = noise_and_marks(q)
        walk = dataclasses.replace(queries_walk(task.pattern, task.extent, 128), stages=3)
        middle = (lse, o, o.stride()[:3], marks)
        options = {"DV": v.shape[3]}
        launches = [
            prepare(k, noise, marks),
            _prepared(task, local_linear_given, walk, (q, r), (k, v), middle, options),
            _means_again(task, q, k, v, mean, lse, marks),
            _output_again(task, q, k, v, Rows(r, mean, lse), o, marks, math.inf),
        ]
        for one in launches:
            one()
        return o, lse

    o, lse = _repeated(task, ("given",), (q, k, v, r), compute)
    return o, lse


def _means_again(
    task: Task, q: Tensor, k: Tensor, v: Tensor, mean: Tensor, lse: Tensor, mark: Tensor
) -> Launch:
    """The portable kernel of the moments, which runs where the mark is set."""
    chosen = stage("moments", task, q, v)
    layout, heads = chosen.layout, q.shape[2]
    arguments = (
        q, mean, lse, mark, layout.q_strides(q), layout.q_strides(mean), layout.q_grid,
        (k, layout.k_strides(k), layout.k_grid), heads, heads // k.shape[2], unit(task),
        layout.arguments,
    )  # fmt: skip
    return Launch(local_linear_moments, chosen.queries(q), arguments, chosen.options | follows(q))


def _output_again(
    task: Task,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    o: Tensor,
    mark: Tensor,
    longest: float,
    lost: Tensor | None = None,
) -> Launch:
    """The portable kernel of the output in pieces of r: of tiles with an r longer than that, or of all."""
    chosen = stage("output", task, q, v, True)
    layout, heads = chosen.layout, q.shape[2]
    arguments = (
        q, rows.mean, rows.lse, rows.r, o, layout.q_strides(q), layout.q_strides(rows.mean),
        layout.q_strides(rows.r), layout.q_strides(o), layout.q_grid,
        (k, layout.k_strides(k), layout.k_grid), (v, layout.k_strides(v)),
        heads, heads // k.shape[2], unit(task), longest, mark, lost, layout.arguments,
    )  # fmt: skip
    return Launch(local_linear_output, chosen.queries(q), arguments, chosen.options | follows(q))
