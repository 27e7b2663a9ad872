"""Inside the chunks of the delta rule with a decay per channel, on Hopper: all bytes once, all at the start.

As `state_pairs_forward`, from log_decay itself.  A chunk whose channels decay too steeply for one product, or
whose inverse float16 cannot hold, is left to that kernel: its running sums are written for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.state.task import Pairs, Task, run_kernel
from foveal.engines.tile.hopper_compat import load_elements, thread_barrier
from foveal.tuning.state import CHUNK, LEVELS

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _sum(a, b):
    return a + b


@gluon.jit
def load_decay(p, seen):
    """log_decay in base 2; as in `state_sums_forward`, exp(-1e4) is 0."""
    return gl.maximum(gl.load(p, mask=seen, other=0.0).to(gl.float32), -1e4) * LOG2E


@gluon.jit
def copy_rows(p, stride, x_s, count):
    """Begins to copy rows, 8 `stride` apart; zeros from `count` on."""
    C: gl.constexpr = x_s.shape[0]
    D: gl.constexpr = x_s.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, C, gl.SliceLayout(1, ROWS))
    column = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    seen = (row < count)[:, None] & (column >= 0)[None, :]
    load_elements(x_s, p + row[:, None] * (stride * 8) + column[None, :], mask=seen)


@gluon.jit
def copy_chunk(
    p_q, p_k, p_v, p_chunks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups,
    C: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """Begins to copy q, k and v of the chunk and value head of this program.

    Returns the head, the first token, how many tokens there are, and where the rows go.
    """
    dtype: gl.constexpr = p_k.dtype.element_ty
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, DK], dtype)
    VALUES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, DV], dtype)
    c = gl.program_id(0) // heads
    h = gl.program_id(0) % heads
    start = gl.load(p_chunks + 2 * c)
    size = gl.load(p_chunks + 2 * c + 1) - start
    q_s = gl.allocate_shared_memory(dtype, [C, DK], KEYS)
    k_s = gl.allocate_shared_memory(dtype, [C, DK], KEYS)
    v_s = gl.allocate_shared_memory(dtype, [C, DV], VALUES)
    first = start.to(gl.int64)
    group = (h // groups).to(gl.int64)
    copy_rows(p_k + (first * k_stride_t + group * k_stride_h) * 8, k_stride_t, k_s, size)
    copy_rows(p_q + (first * q_stride_t + group * q_stride_h) * 8, q_stride_t, q_s, size)
    at = first * v_stride_t + h.to(gl.int64) * v_stride_h
    copy_rows(p_v + at * 8, v_stride_t, v_s, size)
    async_copy.commit_group()
    return h, first, size, q_s, k_s, v_s


@gluon.jit
def write_rows(p, stride, x, count):
    """Stores the first `count` rows of a result, whole lines at a time."""
    C: gl.constexpr = x.shape[0]
    D: gl.constexpr = x.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, C, gl.SliceLayout(1, ROWS))
    column = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    rows = gl.convert_layout(x.to(p.dtype.element_ty), ROWS)
    seen = (row < count)[:, None] & (column >= 0)[None, :]
    gl.store(p + row[:, None] * stride + column[None, :], rows, mask=seen)


@gluon.jit
def load_gates(p_gate, place, i, j, heads, size):
    """Write gates of the tokens i and j of a chunk whose first one is at `place`; 1 where no gates are."""
    gate = gl.full(i.shape, 1.0, gl.float32, i.type.layout)
    gate_of_column = gl.full(j.shape, 1.0, gl.float32, j.type.layout)
    if p_gate is not None:
        gate = gl.load(p_gate + place + i * heads, mask=i < size, other=0.0)
        gate_of_column = gl.load(p_gate + place + j * heads, mask=j < size, other=0.0)
    return gate, gate_of_column


@gluon.jit
def fits_float16(squares, gate):
    """As `_fits_float16` in `chunk_forward`, whose limits leave room for squares that are rounded."""
    grows = gl.abs(1.0 - gate * squares) > 1.02
    large = (gl.abs(gate) > 1024.0) | (squares > 4096.0)
    return gl.max((grows | large).to(gl.int32), 0) == 0


@gluon.jit
def inverted(gated, i, j, a_s, m_s, LEVELS: gl.constexpr):
    """(I + A)^-1 of A [C, C], strictly lower, by halves: products of float16, whose digits are tf32's."""
    C: gl.constexpr = gated.shape[0]
    PAIRS: gl.constexpr = gated.type.layout
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PAIRS, 2)
    none = gl.zeros([C, C], gl.float32, PAIRS)
    x = gl.where(i[:, None] == j[None, :], 1.0, 0.0)
    x -= gl.where((i[:, None] ^ j[None, :]) == 1, gated, 0.0)
    a_s.store(gated.to(gl.float16))
    for level in range(1, LEVELS):
        short = x.to(gl.float16)
        m_s.store(short)
        fence_async_shared()
        thread_barrier()
        left = gl.convert_layout(short, LEFT)
        half = warpgroup_mma(left, a_s, none, use_acc=False, is_async=True)
        half = warpgroup_mma_wait(0, deps=(half,))
        left = gl.convert_layout(half.to(gl.float16), LEFT)
        found = warpgroup_mma(left, m_s, none, use_acc=False, is_async=True)
        found = warpgroup_mma_wait(0, deps=(found,))
        met = ((i >> level)[:, None] ^ (j >> level)[None, :]) == 1
        x -= gl.where(met, found, 0.0)
        thread_barrier()  # all have read m_s
    return x


@gluon.jit
def products(left_k, k_s, left_v, v_s, OUT_K: gl.constexpr, OUT_V: gl.constexpr):
    """left_k k and left_v v of squares in registers, in the layouts OUT_K and OUT_V."""
    for_k = gl.convert_layout(left_k, gl.DotOperandLayout(0, OUT_K, 2))
    for_v = gl.convert_layout(left_v, gl.DotOperandLayout(0, OUT_V, 2))
    C: gl.constexpr = k_s.shape[0]
    DK: gl.constexpr = k_s.shape[1]
    DV: gl.constexpr = v_s.shape[1]
    w = gl.zeros([C, DK], gl.float32, OUT_K)
    w = warpgroup_mma(for_k, k_s, w, use_acc=False, is_async=True)
    u = gl.zeros([C, DV], gl.float32, OUT_V)
    u = warpgroup_mma(for_v, v_s, u, use_acc=False, is_async=True)
    # Both, since what is shared next may lie where operands lay.
    w, u = warpgroup_mma_wait(0, deps=(w, u))
    return w, u


@gluon.jit(do_not_specialize=["heads"])
def state_channels_bulk(
    p_q, p_k, p_v, p_decay, p_gate, p_sums, p_pairs, p_w, p_u, p_since, p_until, p_left, p_chunks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    CHUNK: gl.constexpr, LEVELS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    REACH: gl.constexpr,
):  # fmt: skip
    """What `state_pairs_forward` stores for a forward, one program per chunk and value head.

    Strides of q, k and v count 8 elements.  p_left: whether it is left to do, with all running sums in
    p_sums, of which else only the last row of a chunk is written.
    """
    dtype: gl.constexpr = p_k.dtype.element_ty
    C: gl.constexpr = CHUNK
    warps: gl.constexpr = gl.num_warps()
    # A thread holds tokens one behind the other, which it adds without others.
    SUMS: gl.constexpr = gl.BlockedLayout([C // warps, DK // 32], [1, 32], [warps, 1], [1, 0])
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    OUT_K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, DK, 16])
    OUT_V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, DV, 16])
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.float16)
    h, first, size, q_s, k_s, v_s = copy_chunk(
        p_q, p_k, p_v, p_chunks, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t,
        v_stride_h, heads, groups, C, DK, DV,
    )  # fmt: skip
    e_s = gl.allocate_shared_memory(dtype, [C, DK], k_s.layout)

    row = gl.arange(0, C, gl.SliceLayout(1, SUMS))
    column = gl.arange(0, DK, gl.SliceLayout(0, SUMS))
    seen = (row < size)[:, None] & (column >= 0)[None, :]
    at = row[:, None] * (heads * DK) + column[None, :]
    place = first * heads + h
    x = load_decay(p_decay + place * DK + at, seen)
    sums = gl.associative_scan(x, 0, _sum)
    whole = gl.sum(x, 0)
    left = 1
    if gl.min(whole, 0) >= -REACH:
        left = 0
    async_copy.wait_group(0)
    thread_barrier()

    if left == 0:
        p_last = p_sums + (place + (size - 1).to(gl.int64) * heads) * DK
        gl.store(p_last + column, whole)
        # Decay from the geometric middle of what the chunk decays by, in each channel.
        middle = whole * 0.5
        half = gl.exp2(middle)
        since = sums - middle[None, :]
        later = gl.exp2(since)
        # Every thread overwrites what it has read itself.
        k = k_s.load(SUMS).to(gl.float32)
        earlier = k * gl.exp2(-since)
        e_s.store(earlier.to(dtype))
        gl.store(p_until + place * DK + at, (earlier * half[None, :]).to(dtype), mask=seen)
        k_s.store((k * later).to(dtype))
        q = q_s.load(SUMS).to(gl.float32) * later
        q_s.store(q.to(dtype))
        gl.store(p_since + place * DK + at, (q * (half * scale)[None, :]).to(dtype), mask=seen)
        fence_async_shared()
        thread_barrier()

        none = gl.zeros([C, C], gl.float32, PAIRS)
        keys = warpgroup_mma(k_s, e_s.permute((1, 0)), none, use_acc=False, is_async=True)
        pairs = warpgroup_mma(q_s, e_s.permute((1, 0)), none, use_acc=False, is_async=True)
        i = gl.arange(0, C, gl.SliceLayout(1, PAIRS))
        j = gl.arange(0, C, gl.SliceLayout(0, PAIRS))
        gate, gate_of_column = load_gates(p_gate, place, i, j, heads, size)
        keys, pairs = warpgroup_mma_wait(0, deps=(keys, pairs))
        squares = gl.sum(gl.where(i[:, None] == j[None, :], keys, 0.0), 1)
        gated = gl.where(i[:, None] > j[None, :], keys * gate[:, None], 0.0)
        pairs = gl.where(i[:, None] >= j[None, :], pairs * scale, 0.0)
        write_rows(p_pairs + place * C, heads * C, pairs, size)
        if fits_float16(squares, gate):
            a_s = gl.allocate_shared_memory(gl.float16, [C, C], SQUARE)
            m_s = gl.allocate_shared_memory(gl.float16, [C, C], SQUARE)
            inverse = inverted(gated, i, j, a_s, m_s, LEVELS)
            solve = (inverse * gate_of_column[None, :]).to(dtype)
            by = gl.convert_layout(half, gl.SliceLayout(0, OUT_K))
            w, u = products(solve, k_s, solve, v_s, OUT_K, OUT_V)
            write_rows(p_w + place * DK, heads * DK, w * by[None, :], size)
            write_rows(p_u + place * DV, heads * DV, u, size)
        else:
            left = 1
    if left == 1:
        # Once more, so that sums do not stay in registers.
        x = load_decay(p_decay + place * DK + at, seen)
        gl.store(p_sums + place * DK + at, gl.associative_scan(x, 0, _sum), mask=seen)
    gl.store(p_left + gl.program_id(0), left)


@gluon.jit(do_not_specialize=["heads"])
def state_tokens_bulk(
    p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_w, p_u, p_left, p_chunks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    CHUNK: gl.constexpr, LEVELS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """As `state_channels_bulk`, of a decay per token, whose sums it reads; nothing is too steep."""
    dtype: gl.constexpr = p_k.dtype.element_ty
    C: gl.constexpr = CHUNK
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    OUT_K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, DK, 16])
    OUT_V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, DV, 16])
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.float16)
    h, first, size, q_s, k_s, v_s = copy_chunk(
        p_q, p_k, p_v, p_chunks, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t,
        v_stride_h, heads, groups, C, DK, DV,
    )  # fmt: skip
    place = first * heads + h
    i = gl.arange(0, C, gl.SliceLayout(1, PAIRS))
    j = gl.arange(0, C, gl.SliceLayout(0, PAIRS))
    sums_i = gl.load(p_sums + place + i * heads, mask=i < size, other=-1e30)
    sums_j = gl.load(p_sums + place + j * heads, mask=j < size, other=-1e30)
    gate, gate_of_column = load_gates(p_gate, place, i, j, heads, size)
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()

    none = gl.zeros([C, C], gl.float32, PAIRS)
    keys = warpgroup_mma(k_s, k_s.permute((1, 0)), none, use_acc=False, is_async=True)
    pairs = warpgroup_mma(q_s, k_s.permute((1, 0)), none, use_acc=False, is_async=True)
    lower = i[:, None] >= j[None, :]
    between = gl.exp2(gl.where(lower, sums_i[:, None] - sums_j[None, :], 0.0))
    keys, pairs = warpgroup_mma_wait(0, deps=(keys, pairs))
    squares = gl.sum(gl.where(i[:, None] == j[None, :], keys, 0.0), 1)
    gated = gl.where(i[:, None] > j[None, :], keys * between * gate[:, None], 0.0)
    pairs = gl.where(lower, pairs * between * scale, 0.0)
    write_rows(p_pairs + place * C, heads * C, pairs, size)
    left = 1
    if fits_float16(squares, gate):
        left = 0
        a_s = gl.allocate_shared_memory(gl.float16, [C, C], SQUARE)
        m_s = gl.allocate_shared_memory(gl.float16, [C, C], SQUARE)
        inverse = inverted(gated, i, j, a_s, m_s, LEVELS) * gate_of_column[None, :]
        reads = (inverse * gl.exp2(sums_j)[None, :]).to(dtype)
        w, u = products(reads, k_s, inverse.to(dtype), v_s, OUT_K, OUT_V)
        write_rows(p_w + place * DK, heads * DK, w, size)
        write_rows(p_u + place * DV, heads * DV, u, size)
    gl.store(p_left + gl.program_id(0), left)


def launch_tokens_bulk(job: Task, found: Pairs) -> Tensor:
    """As `launch_channels_bulk`, of a decay per token."""
    left = job.q.new_empty(job.chunk_count * job.heads, dtype=torch.int32)
    constants = {"CHUNK": CHUNK, "LEVELS": LEVELS, "DK": job.dims[0], "DV": job.dims[1]}
    run_kernel(state_tokens_bulk, (len(left),),
        job.q, job.k, job.v, job.sums, job.gate, found.pairs, found.w, found.u, left,
        job.tables().chunks, *_strides(job), job.heads, job.groups, job.scale,
        **constants, **job.tuning.tokens,
    )  # fmt: skip
    return left


def launch_channels_bulk(job: Task, found: Pairs) -> Tensor:
    """Fills the pairs of most chunks; int32 [chunks Hv]: whether `state_pairs_forward` is to do it."""
    left = job.q.new_empty(job.chunk_count * job.heads, dtype=torch.int32)
    constants = {"CHUNK": CHUNK, "LEVELS": LEVELS, "DK": job.dims[0], "DV": job.dims[1]}
    run_kernel(state_channels_bulk, (len(left),),
        job.q, job.k, job.v, job.log_decay, job.gate, job.sums, found.pairs, found.w, found.u, found.q,
        found.k, left, job.tables().chunks, *_strides(job), job.heads, job.groups, job.scale,
        REACH=job.reach, **constants, **job.tuning.channels,
    )  # fmt: skip
    return left


def _strides(job: Task) -> tuple[int, ...]:
    """In units of 8 elements, as `copies_in_bulk` asks: lines of 16 bytes are copied at once."""
    return tuple(stride // 8 for stride in job.strides("q", "k", "v"))
