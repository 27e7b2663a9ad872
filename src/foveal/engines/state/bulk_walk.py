"""The walk of the delta rule on Hopper: bulk copies run ahead of four warps that multiply.

As `state_walk_forward`: the state goes over the chunks of a piece, for one value head and V value channels;
its four warps do what waits for the state and nothing else.  With READS they also read o = q S + P z on
their way, as `state_output_forward` would from the states and z, which are then not stored.
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

from foveal.engines.state.task import Pairs, Task, run_kernel
from foveal.engines.tile.hopper_compat import load_box, store_box, store_wait, thread_barrier
from foveal.engines.tile.hopper_walk import barriers, specialised
from foveal.tuning.state import CHUNK, READ_STAGES, WALK_STAGES


@gluon.jit
def clear_tail(x_s, count):
    """Sets the rows from `count` on to zero: they belong to other sequences and may not be finite."""
    C: gl.constexpr = x_s.shape[0]
    D: gl.constexpr = x_s.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    if count < C:
        x = x_s.load(ROWS)
        row = gl.arange(0, C, gl.SliceLayout(1, ROWS))
        x_s.store(gl.where((row < count)[:, None], x, gl.zeros([C, D], x_s.dtype, ROWS)))
        fence_async_shared()
        thread_barrier()


@gluon.jit
def gates_of(
    p_sums, start, past_token, row, state_row, h, heads, D: gl.constexpr, DECAY: gl.constexpr
):
    """Running sums of a chunk and their last value, of decay 2; the last sums of all channels, of decay 3."""
    C: gl.constexpr = row.shape[0]
    BY_ROW: gl.constexpr = row.type.layout
    last = gl.maximum(gl.minimum(start + C, past_token) - 1, 0).to(gl.int64) * heads + h
    sums = gl.zeros([C], gl.float32, BY_ROW)
    whole = 0.0
    channels = gl.zeros([D], gl.float32, BY_ROW)
    if DECAY == 2:
        at = (start + row).to(gl.int64) * heads + h
        sums = gl.load(p_sums + at, mask=start + row < past_token, other=0.0)
        whole = gl.load(p_sums + last)
    elif DECAY == 3:
        channels = gl.load(p_sums + last * D + state_row)
    return sums, whole, channels


@gluon.jit
def walk_chunks(
    WHICH: gl.constexpr, k_s, w_s, u_s, q_s, pairs_s, z_s, state_s, ready, free, d_states, p_sums, p_u,
    p_before, p_final, p_o, place, heads, scale,
    MAPS: gl.constexpr, READS: gl.constexpr, DECAY: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, STATES: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[3]
    V: gl.constexpr = u_s.shape[3]
    WIDE: gl.constexpr = DV + D if MAPS else DV
    Z: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, V, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_s.dtype
    piece, h, first, begin, first_token, past_token = place
    row = gl.arange(0, C, gl.SliceLayout(1, Z))
    z_row = gl.arange(0, C, gl.SliceLayout(1, ROWS))
    z_column = gl.arange(0, V, gl.SliceLayout(0, ROWS))
    state_row = gl.arange(0, D, gl.SliceLayout(1, Z))
    column = first + gl.arange(0, V, gl.SliceLayout(0, Z))
    inside = (column < WIDE)[None, :] & (state_row >= 0)[:, None]
    at = (piece * heads + h).to(gl.int64) * (D * WIDE) + state_row[:, None] * WIDE + column[None, :]
    if MAPS:
        s = gl.where(state_row[:, None] == (column - DV)[None, :], 1.0, 0.0)
    elif p_before is not None:
        s = gl.load(p_before + at, mask=inside, other=0.0)
    else:
        s = gl.zeros([D, V], gl.float32, Z)
    state_s.index(0).store(s.to(dtype))
    fence_async_shared()
    thread_barrier()
    count = (past_token - first_token + C - 1) // C
    rate = 0.0
    if DECAY == 1:
        rate = gl.load(p_sums + h)
    ahead = gl.maximum(gl.minimum(first_token, past_token - 1), 0)
    sums, whole, channels = gates_of(p_sums, ahead, past_token, row, state_row, h, heads, D, DECAY)
    for n in range(0, count):
        stage = n % STAGES
        start = first_token + n * C
        size = gl.minimum(past_token - start, C)
        until = gl.full([C], 1.0, gl.float32, gl.SliceLayout(1, Z))
        if DECAY == 1:
            until = gl.exp2(rate * gl.maximum(size - 1 - row, 0).to(gl.float32))
            s *= gl.exp2(rate * size.to(gl.float32))
        elif DECAY == 2:
            until = gl.exp2(whole - sums)
            s *= gl.exp2(whole)
        elif DECAY == 3:
            s *= gl.exp2(channels)[:, None]
        now = sums
        ahead = gl.minimum(start + C, past_token - 1)
        sums, whole, channels = gates_of(
            p_sums, ahead, past_token, row, state_row, h, heads, D, DECAY
        )
        before = state_s.index(n % STATES)
        since = gl.full([C], 1.0, gl.float32, gl.SliceLayout(1, Z))
        if READS:
            if DECAY == 1:
                since = gl.exp2(rate * (row + 1).to(gl.float32)) * scale
            elif DECAY == 2:
                since = gl.exp2(now) * scale
            elif DECAY == 0:
                since = gl.full([C], 1.0, gl.float32, gl.SliceLayout(1, Z)) * scale
        if not MAPS and not READS:
            store_box(d_states, [((begin + n) * heads + h) * D, first], before)
        mbarrier.wait(ready.index(stage), (n // STAGES) & 1)
        k = k_s.index(stage).reshape([C, D])
        w = w_s.index(stage).reshape([C, D])
        none = gl.zeros([C, V], gl.float32, Z)
        read = warpgroup_mma(w, before, none, use_acc=False, is_async=True)
        if READS:
            q = q_s.index(stage).reshape([C, D])
            pairs = pairs_s.index(stage).reshape([C, C])
            o = warpgroup_mma(q, before, none, use_acc=False, is_async=True)
        clear_tail(k, size)
        u_box = u_s.index(stage).reshape([C, V])
        u = u_box.load(Z).to(gl.float32)
        if READS:
            read = warpgroup_mma_wait(1, deps=(read,))
        else:
            read = warpgroup_mma_wait(0, deps=(read,))
        z = gl.where((row < size)[:, None], u - read, 0.0).to(dtype)
        z_s.store((z.to(gl.float32) * until[:, None]).to(dtype))
        if READS and (DECAY == 1 or DECAY == 2):
            # Every thread overwrites what it has read itself.
            u_box.store(z)
        if READS:
            # Before the barrier, behind which the state is overwritten.
            o = warpgroup_mma_wait(0, deps=(o,))
        fence_async_shared()
        thread_barrier()
        s = warpgroup_mma(k.permute((1, 0)), z_s, s, is_async=True)
        if READS:
            if DECAY < 3:
                o *= since[:, None]
            if DECAY == 1 or DECAY == 2:
                o = warpgroup_mma(pairs, u_box, o, is_async=True)
            else:
                o = warpgroup_mma(pairs, z_s, o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
        elif not MAPS:
            rows = gl.convert_layout(z, ROWS)
            p = p_u + (start.to(gl.int64) * heads + h) * DV + first
            p_rows = p + z_row[:, None] * (heads * DV) + z_column[None, :]
            seen = (z_row < size)[:, None] & (first + z_column < DV)[None, :]
            gl.store(p_rows, rows, mask=seen)
        if READS:
            state_s.index((n + 1) % STATES).store(s.to(dtype))
            o = warpgroup_mma_wait(0, deps=(o,))
            mbarrier.arrive(free.index(stage), count=1)
            fence_async_shared()
            thread_barrier()
            rows = gl.convert_layout(o.to(dtype), ROWS)
            p = p_o + (start.to(gl.int64) * heads + h) * DV + first
            p_rows = p + z_row[:, None] * (heads * DV) + z_column[None, :]
            seen = (z_row < size)[:, None] & (first + z_column < DV)[None, :]
            gl.store(p_rows, rows, mask=seen)
        else:
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(free.index(stage), count=1)
            store_wait(1)
            state_s.index((n + 1) % STATES).store(s.to(dtype))
            fence_async_shared()
            thread_barrier()
    if not READS:
        store_wait(0)
    if p_final is not None:
        gl.store(p_final + at, s, mask=inside)


@gluon.jit
def copy_chunks(
    d_k, d_w, d_u, d_q, d_pairs, k_s, w_s, u_s, q_s, pairs_s, ready, free, place, groups,
    READS: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer."""
    C: gl.constexpr = k_s.shape[1]
    _, h, first, _, first_token, past_token = place
    walked: gl.constexpr = d_k.block_type.nbytes + d_w.block_type.nbytes + d_u.block_type.nbytes
    read: gl.constexpr = d_q.block_type.nbytes + d_pairs.block_type.nbytes if READS else 0
    size: gl.constexpr = walked + read
    for n in range(0, (past_token - first_token + C - 1) // C):
        stage = n % STAGES
        bar = ready.index(stage)
        token = first_token + n * C
        mbarrier.wait(free.index(stage), ((n // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, size)
        load_box(d_w, [token, h, 0], bar, w_s.index(stage))
        load_box(d_u, [token, h, first], bar, u_s.index(stage))
        load_box(d_k, [token, h // groups, 0], bar, k_s.index(stage))
        if READS:
            load_box(d_q, [token, h // groups, 0], bar, q_s.index(stage))
            load_box(d_pairs, [token, h, 0], bar, pairs_s.index(stage))


@gluon.jit(do_not_specialize=["heads"])
def state_walk_bulk(
    d_k, d_w, d_u, d_q, d_pairs, d_states, p_sums, p_u, p_before, p_final, p_o, p_pieces, heads, groups,
    scale,
    MAPS: gl.constexpr, READS: gl.constexpr, DECAY: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The arguments of `state_walk_forward` with DELTA; states, where stored, through d_states.

    READS: o [T, heads, DV] in their place, from q and P [T, heads, C]; scale counts but with decay 3.
    """
    dtype: gl.constexpr = d_k.dtype
    D: gl.constexpr = d_k.block_type.shape[2]
    V: gl.constexpr = d_u.block_type.shape[2]
    WIDE: gl.constexpr = DV + D if MAPS else DV
    tiles: gl.constexpr = (WIDE + V - 1) // V
    C: gl.constexpr = d_k.block_type.shape[0]
    STATE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, V], dtype)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, V], dtype)
    program = gl.program_id(0)
    first = program % tiles * V
    h = program // tiles % heads
    piece = program // tiles // heads
    p = p_pieces + 7 * piece
    place = (piece, h, first, gl.load(p), gl.load(p + 2), gl.load(p + 3))
    k_s = gl.allocate_shared_memory(dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    w_s = gl.allocate_shared_memory(dtype, [STAGES] + d_w.block_type.shape, d_w.layout)
    u_s = gl.allocate_shared_memory(dtype, [STAGES] + d_u.block_type.shape, d_u.layout)
    STATES: gl.constexpr = 1 if READS else 2
    if READS:
        q_s = gl.allocate_shared_memory(dtype, [STAGES] + d_q.block_type.shape, d_q.layout)
        pairs_s = gl.allocate_shared_memory(
            dtype, [STAGES] + d_pairs.block_type.shape, d_pairs.layout
        )
    else:
        q_s = k_s
        pairs_s = k_s
    z_s = gl.allocate_shared_memory(dtype, [C, V], ROWS)
    state_s = gl.allocate_shared_memory(dtype, [STATES, D, V], STATE)
    ready = barriers(STAGES, 1)
    free = barriers(STAGES, 1)
    specialised(
        walk_chunks,
        (
            k_s, w_s, u_s, q_s, pairs_s, z_s, state_s, ready, free, d_states, p_sums, p_u, p_before,
            p_final, p_o, place, heads, scale, MAPS, READS, DECAY, DV, STAGES, STATES,
        ),
        copy_chunks,
        (
            d_k, d_w, d_u, d_q, d_pairs, k_s, w_s, u_s, q_s, pairs_s, ready, free, place, groups,
            READS, DV, STAGES,
        ),
        1,
    )  # fmt: skip


def launch_walk_bulk(
    job: Task, inside: Pairs, before: Tensor | None, states: Tensor | None, final: Tensor | None,
    pieces: Tensor, v_tile: int, maps: bool, o: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills the states before all chunks, with them z in place of u, or o; and the final states or maps."""
    assert inside.w is not None
    assert inside.u is not None
    dk, dv = job.dims
    d_states = None
    if states is not None:
        rows, box = states.view(-1, dv), [dk, v_tile]
        d_states = TensorDescriptor.from_tensor(rows, box, _layout(box, rows))
    boxes = (_box(job.k, dk), _box(inside.w, dk), _box(inside.u, v_tile))
    reads: tuple[TensorDescriptor | None, ...] = (None, None)
    if o is not None:
        reads = _box(job.q, dk), _box(inside.pairs, CHUNK)
    tiles = -(-(dv + dk if maps else dv) // v_tile)
    run_kernel(state_walk_bulk, (len(pieces) * job.heads * tiles,),
        *boxes, *reads, d_states, job.sums, inside.u, before, final, o, pieces, job.heads, job.groups,
        job.scale,
        MAPS=maps, READS=o is not None, DECAY=job.decay, DV=dv,
        STAGES=READ_STAGES if o is not None else WALK_STAGES, num_warps=4,
    )  # fmt: skip


def _box(x: Tensor, columns: int) -> TensorDescriptor:
    """Boxes of CHUNK tokens of a head and so many columns of x [T, H, D]."""
    box = [CHUNK, 1, columns]
    return TensorDescriptor.from_tensor(x, box, _layout(box, x))


def _layout(box: list[int], x: Tensor) -> gl.NVMMASharedLayout:
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    return gl.NVMMASharedLayout.get_default_for(box, kind)
