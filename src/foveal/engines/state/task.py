"""A recurrence on a device, tables of its chunks and pieces, and how kernels are launched."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from foveal._kept import kept
from foveal.engines.state.chunk_forward import state_sums_forward
from foveal.engines.tile.compiling import Call
from foveal.engines.tile.replay import launch
from foveal.rules.base import Recurrence
from foveal.tuning.state import CHUNK, REACH, Tuning, piece_of, processors, tuning

_RECORDED: ContextVar[list[Call] | None] = ContextVar("_RECORDED", default=None)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Launches inside are listed, tensors by their dtype, and not run."""
    calls: list[Call] = []
    token = _RECORDED.set(calls)
    try:
        yield calls
    finally:
        _RECORDED.reset(token)


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    calls = _RECORDED.get()
    if calls is None:
        launch(kernel, grid, *arguments, **options)
    else:
        types = tuple(x.dtype if isinstance(x, Tensor) else x for x in arguments)
        calls.append((kernel, grid, types, options))


class Tables(NamedTuple):
    """int32 tables on the device: chunks (first token, past the last) and pieces (first chunk, past the
    last, first token, past the last, sequence, the pieces before and behind or -1); the first pieces
    of all sequences come first; sequences (first chunk, past the last)."""

    chunks: Tensor
    pieces: Tensor
    sequences: Tensor


@kept(64)
def tables(lengths: tuple[int, ...], each: int, device: torch.device) -> Tables:
    """Tables of sequences of these lengths, cut in pieces of `each` chunks."""
    chunks: list[tuple[int, int]] = []
    sequences: list[tuple[int, int, int, int]] = []
    start = 0
    for length in lengths:
        stop, begin = start + length, len(chunks)
        places = range(start, stop, CHUNK)
        chunks.extend((place, min(place + CHUNK, stop)) for place in places)
        sequences.append((begin, len(chunks), start, stop))
        start = stop
    counts = [max(-(-(end - begin) // each), 1) for begin, end, _, _ in sequences]
    order = [
        (own, n) for own in range(max(counts, default=0)) for n, c in enumerate(counts) if own < c
    ]
    number = {key: place for place, key in enumerate(order)}
    pieces = []
    for own, n in order:
        begin, end, first, stop = sequences[n]
        edges = first + own * each * CHUNK, min(first + (own + 1) * each * CHUNK, stop)
        around = number.get((own - 1, n), -1), number.get((own + 1, n), -1)
        pieces.append((begin + own * each, min(begin + (own + 1) * each, end), *edges, n, *around))
    ends = [(begin, end) for begin, end, _, _ in sequences]
    rows = (chunks or [(0, 0)], pieces or [(0, 0, 0, 0, 0, -1, -1)], ends or [(0, 0)])
    return Tables(*(torch.tensor(x, dtype=torch.int32).to(device) for x in rows))


@dataclass(frozen=True)
class Task:
    """A recurrence on a device, as its kernels see it; `sums` as `p_sums` in `tiles`, `bulk`: whether
    the kernel in `bulk` adds it up, `log_decay`: where the kernel in `bulk_channels` makes the sums."""

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor | None
    gate: Tensor | None
    decay: int
    scale: float
    delta: bool
    lengths: tuple[int, ...]
    piece: int
    tuning: Tuning
    bulk: bool = False
    log_decay: Tensor | None = None

    @property
    def heads(self) -> int:
        return int(self.v.shape[1])

    @property
    def groups(self) -> int:
        return self.heads // int(self.q.shape[1])

    @property
    def dims(self) -> tuple[int, int]:
        return int(self.k.shape[-1]), int(self.v.shape[-1])

    @property
    def chunk_count(self) -> int:
        return sum(-(-length // CHUNK) for length in self.lengths)

    @property
    def reach(self) -> int:
        """log2 of the decay that a factor of a product may undo: float16 has no room for it."""
        return 0 if self.q.dtype == torch.float16 else REACH

    def tables(self) -> Tables:
        return tables(self.lengths, self.piece, self.q.device)

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def constants(self) -> dict[str, Any]:
        """Compile-time constants that all kernels share."""
        dk, dv = self.dims
        precision = "ieee" if self.q.dtype == torch.float32 else "tf32"
        return {"DECAY": self.decay, "CHUNK": CHUNK, "DK": dk, "DV": dv, "PRECISION": precision}

    def strides(self, *names: str) -> tuple[int, ...]:
        return tuple(s for name in names for s in getattr(self, name).stride()[:2])


def padded(width: int) -> int:
    """The width of a tile that holds `width` channels."""
    return max(1 << max(width - 1, 0).bit_length(), 16)


def task(linear: Recurrence, training: bool, whole_sums: bool = True) -> Task:
    """The recurrence with its gates in float32 and their running sums.

    Where not `whole_sums`, these may be left to the kernel that reads them.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (linear.q, linear.k, linear.v))
    gate = None if linear.write_gate is None else linear.write_gate.float().contiguous()
    decay = 0 if linear.log_decay is None else linear.log_decay.dim()
    found = tuning(q.dtype, q.shape[-1], linear.delta, decay)
    job = Task(q, k, v, None, gate, decay, linear.scale, linear.delta, linear.lengths, 1, found)
    plain = not training and not linear.delta and linear.divisor is None and copies_in_bulk(job)
    sizes = q.dtype, *job.dims, decay, gate is not None
    bulk = plain and adds_in_bulk(*sizes, linear.lengths)
    if bulk:
        found = dataclasses.replace(found, piece=0)
    columns = v.shape[1], k.shape[2] + v.shape[2]
    piece = piece_of(linear.lengths, columns, linear.delta, found, processors(q.device.type))
    job = dataclasses.replace(job, piece=piece, bulk=bulk)
    if not whole_sums and decay == 3 and linear.log_decay is not None and inside_in_bulk(job):
        log_decay = linear.log_decay.contiguous()
        sums = job.scratch(*log_decay.shape, dtype=torch.float32)
        return dataclasses.replace(job, sums=sums, log_decay=log_decay)
    return dataclasses.replace(job, sums=_sums(job, linear.log_decay))


def cut_by() -> Callable[..., int]:
    """What decides on pieces, by which launches that are kept are told apart: who measures replaces it."""
    return piece_of


def inside_in_bulk(job: Task) -> bool:
    """Whether a kernel in `bulk_channels` goes before `state_pairs_forward`, which does what it leaves."""
    # With a decay per channel float16 has no room for its factors.
    kind = job.decay == 2 or (job.decay == 3 and job.reach > 0)
    fits = job.delta and job.chunk_count > 0 and job.dims[1] in (64, 128)
    return kind and fits and copies_in_bulk(job)


def adds_in_bulk(
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    decay: int,
    gated: bool,
    lengths: tuple[int, ...],
) -> bool:
    """Whether the kernel in `bulk` computes the forward of an additive rule of such sizes."""
    # A chunk that reaches into the next sequence would take over what is not finite there.
    whole = all(length % CHUNK == 0 for length in lengths[:-1])
    plain = decay < 2 and not gated and value_dim in (64, 128) and whole
    return plain and _fits_bulk_copies(dtype, head_dim) and has_bulk_copies()


def copies_in_bulk(job: Task) -> bool:
    """Whether bulk copies of q, k and v are possible, on a Hopper and with Gluon for it."""
    fits = _fits_bulk_copies(job.q.dtype, job.dims[0]) and has_bulk_copies()
    return fits and all(_aligned(x) for x in (job.q, job.k, job.v))


def _fits_bulk_copies(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and head_dim in (64, 128)


@functools.lru_cache(maxsize=1)
def has_bulk_copies() -> bool:
    """Whether the device is a Hopper and Triton has Gluon for it."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    if importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is None:
        return False
    return torch.cuda.get_device_capability() == (9, 0)


def _aligned(x: Tensor) -> bool:
    """Starts of rows at multiples of 16 bytes."""
    places = (x.stride(0), x.stride(1), x.storage_offset())
    return all(place >= 0 and place * x.element_size() % 16 == 0 for place in places)


def _sums(plain: Task, log_decay: Tensor | None) -> Tensor | None:
    if log_decay is None:
        return None
    dtype = torch.float64 if plain.q.dtype == torch.float32 else torch.float32
    if plain.decay == 1:
        if log_decay.is_meta:  # arithmetic on it would import seconds' worth of PyTorch
            return log_decay.new_empty(log_decay.shape, dtype=dtype)
        return (log_decay.to(dtype) * math.log2(math.e)).contiguous()
    log_decay = log_decay.contiguous()
    sums = log_decay.new_empty(log_decay.shape, dtype=dtype)
    width = log_decay[0].numel() if len(log_decay) else 0
    if plain.chunk_count:
        tile = min(padded(width), 128)
        programs = (plain.chunk_count, triton.cdiv(width, tile))
        run_kernel(
            state_sums_forward,
            programs,
            log_decay,
            sums,
            plain.tables().chunks,
            width,
            CHUNK=CHUNK,
            TILE=tile,
            num_warps=4,
        )
    return sums


class Pairs(NamedTuple):
    """What `state_pairs_forward` finds: P; for the delta rule a, M, w and u; with decay 3 q and k with
    their decays; else None."""

    pairs: Tensor
    keys: Tensor | None
    inverse: Tensor | None
    w: Tensor | None
    u: Tensor | None
    q: Tensor | None
    k: Tensor | None


class Gradients(NamedTuple):
    """dq and dk per value head, dv, dgate and ddecay in float32, dinitial; None where not wanted."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    ddecay: Tensor | None
    dgate: Tensor | None
    dinitial: Tensor | None
