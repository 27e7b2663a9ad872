"""The forward of additive rules on Hopper: bulk copies run ahead of two groups of warps that multiply.

As `additive`: every sequence is cut in pieces; a program finds what a piece adds to the state, from its last
chunk to its first, so that the first are still in the cache when it reads them again, waits for the state
before the piece, passes the state behind it on and writes o.  Programs stay and take one piece after the
other, in the order of the sequences, so that whom they wait for runs already; one of their warps copies
chunks to shared memory meanwhile.  Each group of four warps owns V of the value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from foveal.engines.state.task import Task, run_kernel
from foveal.engines.tile.hopper_compat import load_box, thread_barrier
from foveal.engines.tile.hopper_walk import barriers, specialised
from foveal.tuning.state import BULK_STAGES, CHUNK, processors

_COLUMNS = 64
"""Value channels of a group of warps."""


@gluon.jit
def taken(item_s, item_ready, item_free, turn):
    """The item that the producer took for this turn; -1 behind the last one."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = turn % 2
    mbarrier.wait(item_ready.index(slot), (turn // 2) & 1)
    item = gl.sum(item_s.index(slot).load(ONE), 0)
    mbarrier.arrive(item_free.index(slot), count=1)
    return item


@gluon.jit
def place_of(item, p_pieces, heads, tiles: gl.constexpr, GROUPS: gl.constexpr):
    """Piece, head and first tile of an item; and of the piece: first token, past the last, sequence, the
    pieces before and behind."""
    h = item // tiles % heads
    piece = item // tiles // heads
    p = p_pieces + 7 * piece
    tile = item % tiles * GROUPS
    return (
        piece,
        h,
        tile,
        gl.load(p + 2),
        gl.load(p + 3),
        gl.load(p + 4),
        gl.load(p + 5),
        gl.load(p + 6),
    )


@gluon.jit
def chunks_added(p_rates, h, count, behind, C: gl.constexpr, DECAY: gl.constexpr):
    """How many of the last chunks of a piece the state behind it knows of: float32 ends at 2^-149."""
    added = count
    if DECAY == 1:
        chunk = gl.maximum(-gl.load(p_rates + h) * C, 1e-6)
        added = gl.minimum(count, (150.0 / chunk).to(gl.int32) + 1)
    return gl.where(behind >= 0, added, 0)


@gluon.jit
def clear_rows(v, count):
    """Sets the rows from `count` on to zero: they belong to other sequences and may not be finite."""
    C: gl.constexpr = v.shape[0]
    V: gl.constexpr = v.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [gl.num_warps(), 1], [1, 0])
    if count < C:
        x = v.load(ROWS)
        row = gl.arange(0, C, gl.SliceLayout(1, ROWS))
        v.store(gl.where((row < count)[:, None], x, gl.zeros([C, V], v.dtype, ROWS)))
        fence_async_shared()
        thread_barrier()


@gluon.jit
def walk_pieces(
    WHICH: gl.constexpr, q_s, k_s, v_s, state_s, ready, free, item_s, item_ready, item_free,
    p_rates, p_initial, p_after, p_o, p_final, p_ready, p_pieces, heads, scale,
    DECAY: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """A group of warps: o, the state behind the piece and the final state, of its value channels."""
    C: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    V: gl.constexpr = v_s.shape[2]
    tiles: gl.constexpr = DV // V
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, V, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_s.dtype
    i = gl.arange(0, C, gl.SliceLayout(1, PAIRS))
    j = gl.arange(0, C, gl.SliceLayout(0, PAIRS))
    row = gl.arange(0, C, gl.SliceLayout(1, OUT))
    column = gl.arange(0, C, gl.SliceLayout(0, LEFT))
    o_row = gl.arange(0, C, gl.SliceLayout(1, ROWS))
    o_column = gl.arange(0, V, gl.SliceLayout(0, ROWS))
    state_row = gl.arange(0, D, gl.SliceLayout(1, OUT))
    state_column = gl.arange(0, V, gl.SliceLayout(0, OUT))
    state = state_s.index(WHICH)
    g = 0
    turn = 0
    item = taken(item_s, item_ready, item_free, turn)
    while item >= 0:
        piece, h, tile, first_token, past_token, sequence, before, behind = place_of(
            item, p_pieces, heads, tiles // GROUPS, GROUPS
        )
        tile += WHICH
        at = state_row[:, None] * DV + (tile * V + state_column)[None, :]
        count = (past_token - first_token + C - 1) // C
        adds = chunks_added(p_rates, h, count, behind, C, DECAY)
        rate = 0.0
        if DECAY == 1:
            rate = gl.load(p_rates + h)
        s = gl.zeros([D, V], gl.float32, OUT)
        later = 1.0
        for n in range(0, adds):
            stage = g % STAGES
            size = gl.minimum(past_token - first_token - (count - 1 - n) * C, C)
            until = gl.exp2(rate * (size - 1 - column).to(gl.float32)) * later
            until = gl.where(column < size, until, 0.0)
            mbarrier.wait(ready.index(stage), (g // STAGES) & 1)
            v = v_s.index(stage * GROUPS + WHICH)
            clear_rows(v, size)
            keys = k_s.index(stage).permute((1, 0)).load(LEFT)
            keys = (keys.to(gl.float32) * until[None, :]).to(dtype)
            s = warpgroup_mma(keys, v, s, is_async=True)
            later *= gl.exp2(rate * size.to(gl.float32))
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(free.index(stage), count=1)
            g += 1

        s_before = gl.zeros([D, V], gl.float32, OUT)
        if before >= 0:
            flag = p_ready + 1 + (before * heads + h) * tiles + tile
            seen = gl.atomic_add(flag, 0, sem="acquire")
            while seen == 0:
                seen = gl.atomic_add(flag, 0, sem="acquire")
            p_before = p_after + (before * heads + h).to(gl.int64) * (D * DV)
            s_before = gl.load(p_before + at, cache_modifier=".cg")
        elif p_initial is not None:
            s_before = gl.load(p_initial + (sequence * heads + h).to(gl.int64) * (D * DV) + at)
        if behind >= 0:
            p_behind = p_after + (piece * heads + h).to(gl.int64) * (D * DV)
            kept = gl.exp2(rate * (past_token - first_token).to(gl.float32))
            gl.store(p_behind + at, s + s_before * kept)
            thread_barrier()
            gl.atomic_xchg(p_ready + 1 + (piece * heads + h) * tiles + tile, 1, sem="release")

        s = s_before
        state.store(s.to(dtype))
        fence_async_shared()
        thread_barrier()
        for n in range(0, count):
            if DECAY == 1:
                # Read again, so that what depends on it does not stay in registers.
                rate = gl.load(p_rates + h)
            stage = g % STAGES
            start = first_token + n * C
            size = gl.minimum(past_token - start, C)
            mbarrier.wait(ready.index(stage), (g // STAGES) & 1)
            v = v_s.index(stage * GROUPS + WHICH)
            clear_rows(v, size)
            q = q_s.index(stage)
            k = k_s.index(stage).permute((1, 0))
            none = gl.zeros([C, C], gl.float32, PAIRS)
            pairs = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
            none = gl.zeros([C, V], gl.float32, OUT)
            o = warpgroup_mma(q, state, none, use_acc=False, is_async=True)
            until = gl.exp2(rate * (size - 1 - column).to(gl.float32))
            until = gl.where(column < size, until, 0.0)
            keys = (k.load(LEFT).to(gl.float32) * until[None, :]).to(dtype)
            of_rows = i.to(gl.float32) * rate
            of_columns = j.to(gl.float32) * rate
            between = gl.exp2(of_rows[:, None] - of_columns[None, :]) * scale
            pairs = warpgroup_mma_wait(1, deps=(pairs,))
            pairs = gl.where(i[:, None] >= j[None, :], pairs * between, 0.0)
            pairs = gl.convert_layout(pairs.to(dtype), LEFT)
            o = warpgroup_mma_wait(0, deps=(o,))
            o *= (gl.exp2(rate * (row + 1).to(gl.float32)) * scale)[:, None]
            s *= gl.exp2(rate * size.to(gl.float32))
            o = warpgroup_mma(pairs, v, o, is_async=True)
            s = warpgroup_mma(keys, v, s, is_async=True)
            o, s = warpgroup_mma_wait(0, deps=(o, s))
            mbarrier.arrive(free.index(stage), count=1)
            g += 1
            state.store(s.to(dtype))
            fence_async_shared()
            thread_barrier()
            rows = gl.convert_layout(o.to(dtype), ROWS)
            p = p_o + (start.to(gl.int64) * heads + h) * DV + tile * V
            p_rows = p + o_row[:, None] * (heads * DV) + o_column[None, :]
            gl.store(p_rows, rows, mask=(o_row < size)[:, None])
        if behind < 0:
            gl.store(p_final + (sequence * heads + h).to(gl.int64) * (D * DV) + at, s)
        turn += 1
        item = taken(item_s, item_ready, item_free, turn)


@gluon.jit
def copy_pieces(
    d_q, d_k, d_v, q_s, k_s, v_s, ready, free, item_s, item_ready, item_free, p_rates, p_ready,
    p_pieces, q_stride_h, k_stride_h, v_stride_h, heads, groups, items,
    DECAY: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """The producer: takes items and copies their chunks, k and v backwards, then q, k and v forwards."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    C: gl.constexpr = k_s.shape[1]
    V: gl.constexpr = v_s.shape[2]
    tiles: gl.constexpr = DV // V
    added: gl.constexpr = d_k.block_type.nbytes + GROUPS * d_v.block_type.nbytes
    whole: gl.constexpr = d_q.block_type.nbytes + added
    g = 0
    turn = 0
    item = gl.atomic_add(p_ready, 1)
    while item >= 0:
        item = gl.where(item < items, item, -1)
        slot = turn % 2
        mbarrier.wait(item_free.index(slot), ((turn // 2) & 1) ^ 1)
        item_s.index(slot).store(gl.full([1], 0, gl.int32, ONE) + item)
        mbarrier.arrive(item_ready.index(slot), count=1)
        turn += 1
        if item >= 0:
            _, h, tile, first_token, past_token, _, _, behind = place_of(
                item, p_pieces, heads, tiles // GROUPS, GROUPS
            )
            q_x = (h // groups) * q_stride_h
            k_x = (h // groups) * k_stride_h
            v_x = h * v_stride_h + tile * V
            count = (past_token - first_token + C - 1) // C
            adds = chunks_added(p_rates, h, count, behind, C, DECAY)
            for n in range(0, adds + count):
                stage = g % STAGES
                mbarrier.wait(free.index(stage), ((g // STAGES) & 1) ^ 1)
                bar = ready.index(stage)
                token = first_token + gl.where(n < adds, count - 1 - n, n - adds) * C
                if n < adds:
                    mbarrier.expect(bar, added)
                else:
                    mbarrier.expect(bar, whole)
                    load_box(d_q, [token, q_x], bar, q_s.index(stage))
                load_box(d_k, [token, k_x], bar, k_s.index(stage))
                for w in gl.static_range(GROUPS):
                    load_box(d_v, [token, v_x + w * V], bar, v_s.index(stage * GROUPS + w))
                g += 1
            item = gl.atomic_add(p_ready, 1)


@gluon.jit(do_not_specialize=["heads", "items"])
def state_additive_bulk(
    d_q, d_k, d_v, p_rates, p_initial, p_after, p_o, p_final, p_ready, p_pieces,
    q_stride_h, k_stride_h, v_stride_h, heads, groups, scale, items,
    DECAY: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """o, the state after every piece and the final state; p_rates: log2 of the decay of each head."""
    dtype: gl.constexpr = d_k.dtype
    C: gl.constexpr = d_k.block_type.shape[0]
    D: gl.constexpr = d_k.block_type.shape[1]
    V: gl.constexpr = d_v.block_type.shape[1]
    STATE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, V], dtype)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(dtype, [STAGES, C, D], d_q.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, C, D], d_k.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, C, V], d_v.layout)
    state_s = gl.allocate_shared_memory(dtype, [GROUPS, D, V], STATE)
    item_s = gl.allocate_shared_memory(gl.int32, [2, 1], LINE)
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, GROUPS)
    item_ready = barriers(2, 1)
    item_free = barriers(2, GROUPS)
    specialised(
        walk_pieces,
        (
            q_s, k_s, v_s, state_s, ready, free, item_s, item_ready, item_free, p_rates, p_initial,
            p_after, p_o, p_final, p_ready, p_pieces, heads, scale, DECAY, DV, STAGES, GROUPS,
        ),
        copy_pieces,
        (
            d_q, d_k, d_v, q_s, k_s, v_s, ready, free, item_s, item_ready, item_free, p_rates,
            p_ready, p_pieces, q_stride_h, k_stride_h, v_stride_h, heads, groups, items,
            DECAY, DV, STAGES, GROUPS,
        ),
        GROUPS,
    )  # fmt: skip


def launch_bulk(
    job: Task, initial: Tensor | None, o: Tensor, after: Tensor, final: Tensor, pieces: Tensor
) -> None:
    """Fills o, the states after all pieces and the final states."""
    dk, dv = job.dims
    groups = dv // _COLUMNS
    items = len(pieces) * job.heads
    ready = torch.zeros(1 + items * groups, dtype=torch.int32, device=o.device)
    boxes = (_boxes(job.q, dk), _boxes(job.k, dk), _boxes(job.v, _COLUMNS))
    run_kernel(state_additive_bulk, (min(items, processors("cuda")),),
        *boxes, job.sums, initial, after, o, final, ready, pieces,
        *(x.stride(1) for x in (job.q, job.k, job.v)), job.heads, job.groups, job.scale, items,
        DECAY=job.decay, DV=dv, STAGES=BULK_STAGES, GROUPS=groups, num_warps=4,
    )  # fmt: skip


def _boxes(x: Tensor, columns: int) -> TensorDescriptor:
    """Boxes of CHUNK tokens and so many columns of x [T, H, D], in which heads lie side by side."""
    wide = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    rows = torch.as_strided(x, (x.shape[0], wide), (x.stride(0), 1))
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([CHUNK, columns], kind)
    return TensorDescriptor.from_tensor(rows, [CHUNK, columns], layout)
