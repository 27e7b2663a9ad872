# mypy: ignore-errors
"""Backward of the Hopper edition in one kernel: dQ, dK and dV out of one pass over the visible boxes.

With P = exp(S - lse) and dS = P (dP - delta), delta = sum(do o) - dlse:
dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.

A work item is two boxes of keys, one for each consumer, which keeps dK and dV of its box in registers.
dS of a box of queries passes through shared memory, and the copy engine adds dS K to fp32 sums in
global memory, in an order that changes from run to run (FlashAttention-3, Shah et al. 2024).  Where
registers allow, a partition of its own computes dS K (`apart`); at head_dim 128 they do not, and each
consumer computes half of the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.tile.hopper_compat import add_box, store_wait
from foveal.engines.tile.hopper_forward import row_places, store_rows
from foveal.engines.tile.hopper_lists import HEADER
from foveal.engines.tile.hopper_walk import (
    alone,
    barriers,
    boxes,
    copy_box,
    copy_statistics,
    following,
    load_boxes,
    numbered,
    part_slot,
    place,
    product_layout,
    row_bounds,
    seen_by_rows,
    seen_whole,
    store_part,
    taken,
    turns,
    visible,
    whole,
)


@gluon.jit
def place_listed(t, lists, heads, shared):
    """Batch, head and position in the lists of work item t."""
    tiles = lists[1]
    rest = t // (shared * tiles)
    groups = heads // shared
    return rest // groups, rest % groups * shared + t % shared, t // shared % tiles


@gluon.jit
def list_at(lists, n, head, position):
    """The list of a query head; the lists of heads that share keys are in the same order."""
    line = n * lists[5] + head // lists[3] * lists[4] + position
    return lists[0] + line.to(gl.int64) * lists[2]


@gluon.jit
def load_queries(
    rows, row_s, row_ready, row_free,
    columns, column_s, statistics, statistic_s, column_ready, column_free,
    p_bounds, lists, X, Y, Z, heads, shared, total, groups, split,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: K and V of every work item, then Q and dO with their statistics, in order."""
    if len(lists) == 0:
        load_boxes(
            rows, row_s, row_ready, row_free,
            columns, column_s, statistics, statistic_s, column_ready, column_free,
            p_bounds, X, Y, Z, heads, shared, total, 1, groups, split, (), W, R, C, AXES, STAGES,
        )  # fmt: skip
    else:
        g = 0
        turn = 0
        for t in range(gl.program_id(0), total, gl.num_programs(0)):
            n, head, position = place_listed(t, lists, heads, shared)
            x0 = gl.load(list_at(lists, n, head * groups, position)) * (W * R[0])
            for c in gl.static_range(W):
                for i in gl.static_range(2):
                    mbarrier.wait(row_free[i].index(c), (turn & 1) ^ 1)
                    mbarrier.expect(row_ready[i].index(c), rows[i].block_type.nbytes)
                    copy_box(
                        rows[i], n, x0 + c * R[0], 0, 0, head,
                        row_ready[i].index(c), row_s[i].index(c), AXES,
                    )  # fmt: skip
            for member in range(groups):
                q_head = head * groups + member
                p_list = list_at(lists, n, q_head, position)
                count = gl.load(p_list + 2)
                x = gl.load(p_list + HEADER) * C[0]
                for j in range(count):
                    # Asked for before the waits, so that it is there when the next copy can start.
                    after = gl.load(p_list + (HEADER + gl.minimum(j + 1, count - 1))) * C[0]
                    stage = g % STAGES
                    phase = (g // STAGES) & 1
                    for i in gl.static_range(2):
                        mbarrier.wait(column_free[i].index(stage), phase ^ 1)
                        copy_statistics(
                            statistics[i], columns[i], n * heads * groups + q_head, x, 0, 0,
                            column_ready[i].index(stage), statistic_s[i].index(stage), AXES,
                        )  # fmt: skip
                        copy_box(
                            columns[i], n, x, 0, 0, q_head,
                            column_ready[i].index(stage), column_s[i].index(stage), AXES,
                        )  # fmt: skip
                    x = after
                    g += 1
            turn += 1


@gluon.jit
def add_rows(desc, line, x, y, z, column, buffer, AXES: gl.constexpr):
    """Starts the addition of a box to the sums [N Hq, *grid, D]; it clips what lies outside."""
    if AXES == 1:
        add_box(desc, [line, x, column], buffer)
    elif AXES == 2:
        add_box(desc, [line, x, y, column], buffer)
    else:
        add_box(desc, [line, x, y, z, column], buffer)


@gluon.jit
def part_of_dq(
    ds_s, k_s, slot, FIRST: gl.constexpr, H: gl.constexpr, DEPTH: gl.constexpr
):  # fmt: skip
    """Starts dS K for all boxes of keys and the columns [FIRST, FIRST + H) of K."""
    W: gl.constexpr = k_s.shape[0]
    M: gl.constexpr = ds_s.shape[1]
    N: gl.constexpr = ds_s.shape[2]
    O: gl.constexpr = product_layout(H)
    dq = gl.zeros([N, H], gl.float32, O)
    for w in gl.static_range(W):
        k = k_s.index(w).reshape([M, k_s.shape[-1]]).slice(FIRST, H, 1)
        ds = ds_s.index(w * DEPTH + slot).permute((1, 0))
        dq = warpgroup_mma(ds, k, dq, use_acc=w > 0, is_async=True)
    return dq


@gluon.jit
def put(dq, buffer):
    """Writes a box of dQ where the copy engine has read the one before."""
    store_wait(0)
    buffer.reshape([dq.shape[0], dq.shape[1]]).store(dq)
    fence_async_shared()


@gluon.jit
def sum_dq(
    k_s, k_ready, ds_s, ds_ready, ds_free, dq_s, item_done, dq_desc, p_bounds, lists, X, Y, Z,
    heads, groups, shared, total, split,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """dQ of every box of queries, beside the consumers."""
    H: gl.constexpr = dq_s.shape[-1]
    buffer = dq_s.index(0)
    g = 0
    for turn in range(turns(total, split)):
        t, first, stop = taken(turn, total, split)
        by, ny, bz, nz = 0, 1, 0, 1
        if len(lists) > 0:
            n, head, position = place_listed(t, lists, heads, shared)
        else:
            n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, False)
            starts, counts = boxes(p_bounds, X, Y, Z, x0, y0, z0, W, R, C, AXES, 4)
            bx, by, bz = starts
            nx, ny, nz = counts
            y1 = by + ny * C[1]
            z1 = bz + nz * C[2]
            count = nx * ny * nz
            if len(split) > 0:
                bx += first * C[0]
                count = stop - first
        for w in gl.static_range(W):
            mbarrier.wait(k_ready.index(w), turn & 1)
        for member in range(groups):
            line = (n * heads + head) * groups + member
            if len(lists) > 0:
                p_list = list_at(lists, n, head * groups + member, position)
                count = gl.load(p_list + 2)
                x, y, z = 0, 0, 0
            else:
                x, y, z = bx, by, bz
            for j in range(count):
                if len(lists) > 0:
                    x = gl.load(p_list + (HEADER + j)) * C[0]
                slot = g % DEPTH
                for w in gl.static_range(W):
                    mbarrier.wait(ds_ready.index(w * DEPTH + slot), (g // DEPTH) & 1)
                dq = part_of_dq(ds_s, k_s, slot, 0, H, DEPTH)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                mbarrier.arrive(ds_free.index(slot), count=1)
                put(dq, buffer)
                add_rows(dq_desc, line, x, y, z, 0, buffer, AXES)
                if len(lists) == 0:
                    if AXES == 1:
                        x += C[0]
                    else:
                        x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
                g += 1
        mbarrier.arrive(item_done, count=1)
    store_wait(0)


@gluon.jit
def biases_of(biases, n, head, row, x0, y0, z0, X, Y, Z, R: gl.constexpr):
    """What is added to the scores of each key of a box, in base 2; -inf where no key is."""
    x, y, z, inside = row_places(row, x0, y0, z0, X, Y, Z, R)
    at = n.to(gl.int64) * biases[1] + head // biases[3] * biases[2] + ((x * Y + y) * Z + z)
    bias = gl.load(biases[0] + at, mask=inside, other=float("-inf"))
    return bias.to(gl.float32) * 1.4426950408889634


@gluon.jit
def accumulate_member(
    WHICH: gl.constexpr, g, member, dk, dv, k, v, none, row, n, head, place_of, box, count, walked, tests,
    k_s, q_s, do_s, lse_s, delta_s, q_ready, do_ready, q_free, do_free,
    ds_s, ds_ready, ds_free, dq_s, dq_desc, lists, X, Y, Z, heads, groups, scale_log2, biases,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    DEPTH: gl.constexpr, HIDES: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """dK and dV of a box of keys with the boxes of queries of one head; how many boxes there were so far."""
    N: gl.constexpr = C[0] * C[1] * C[2]
    D: gl.constexpr = q_s.shape[-1]
    H: gl.constexpr = dq_s.shape[-1]
    S: gl.constexpr = product_layout(N)
    O: gl.constexpr = product_layout(D)
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    OTHER: gl.constexpr = 1 - WHICH
    buffer = dq_s.index(0 if APART else WHICH)
    x0, y0, z0 = place_of
    bx, by, bz = box
    y1, z1, position = walked
    last_low, first_up, low, width, low_2, width_2 = tests
    line = (n * heads + head) * groups + member
    if len(biases) > 0:
        bias = biases_of(biases, n, head * groups + member, row, x0, y0, z0, X, Y, Z, R)
    if len(lists) > 0:
        p_list = list_at(lists, n, head * groups + member, position)
        tested = gl.load(p_list + 1)
        count = gl.load(p_list + 2)
        x, y, z = gl.load(p_list + HEADER) * C[0], 0, 0
    else:
        x, y, z = bx, by, bz
    # The box before; of the first one nothing is kept, so any numbers other than its own do.
    xb, yb, zb = x - 1, y - 1, z - 1
    for j in range(count):
        stage = g % STAGES
        phase = (g // STAGES) & 1
        q = q_s.index(stage).reshape([N, D])
        do = do_s.index(stage).reshape([N, D])
        mbarrier.wait(q_ready.index(stage), phase)
        s_run = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(do_ready.index(stage), phase)
        dp_run = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
        lse = lse_s.index(stage).reshape([N]).load(gl.SliceLayout(0, S))
        s = warpgroup_mma_wait(1, deps=(s_run,))
        level = lse[None, :]
        if len(biases) > 0:
            level = level - bias[:, None]
        p = gl.exp2(s * scale_log2 - level)
        if HIDES:
            if len(lists) > 0:
                if j < tested:
                    seen = visible(x, y, z, low, width, S, C, AXES)
                    if len(lists) > 6:
                        seen |= visible(x, y, z, (low_2,), (width_2,), S, C, AXES)
                    p = gl.where(seen, p, 0.0)
            elif whole(x, y, z, last_low, first_up, C, AXES) == 0:
                p = gl.where(visible(x, y, z, low, width, S, C, AXES), p, 0.0)
        weights = gl.convert_layout(p.to(q_s.dtype), A)
        # As in the forward: a barrier that is past keeps the exponentials before the wait.
        mbarrier.wait(do_ready.index(stage), phase)
        dp = warpgroup_mma_wait(0, deps=(dp_run,))
        dv_run = warpgroup_mma(weights, do, dv, is_async=True)
        delta = delta_s.index(stage).reshape([N]).load(gl.SliceLayout(0, S))
        ds = (p * (dp - delta[None, :])).to(q_s.dtype)
        slot = g % DEPTH
        mbarrier.wait(ds_free.index(slot), ((g // DEPTH) & 1) ^ 1)
        ds_s.index(WHICH * DEPTH + slot).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_ready.index(WHICH * DEPTH + slot), count=1)
        if not APART:
            # dQ of the box before: the other consumer may lag behind by one.
            slot = (g + DEPTH - 1) % DEPTH
            mbarrier.wait(ds_ready.index(OTHER * DEPTH + slot), ((g - 1) // DEPTH) & 1, pred=j > 0)
            dq_run = part_of_dq(ds_s, k_s, slot, WHICH * H, H, DEPTH)
        dk_run = warpgroup_mma(gl.convert_layout(ds, A), q, dk, is_async=True)
        if APART:
            dv = warpgroup_mma_wait(1, deps=(dv_run,))
            mbarrier.arrive(do_free.index(stage), count=1)
        else:
            dv, dq = warpgroup_mma_wait(1, deps=(dv_run, dq_run))
            mbarrier.arrive(do_free.index(stage), count=1)
            mbarrier.arrive(ds_free.index(slot), count=1, pred=j > 0)
            put(dq, buffer)
            if j > 0:
                add_rows(dq_desc, line, xb, yb, zb, WHICH * H, buffer, AXES)
        dk = warpgroup_mma_wait(0, deps=(dk_run,))
        mbarrier.arrive(q_free.index(stage), count=1)
        xb, yb, zb = x, y, z
        if len(lists) > 0:
            x = gl.load(p_list + (HEADER + gl.minimum(j + 1, count - 1))) * C[0]
        elif AXES == 1:
            x += C[0]
        else:
            x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
        g += 1
    if not APART:
        slot = (g + DEPTH - 1) % DEPTH
        mbarrier.wait(ds_ready.index(OTHER * DEPTH + slot), ((g - 1) // DEPTH) & 1, pred=count > 0)
        dq = part_of_dq(ds_s, k_s, slot, WHICH * H, H, DEPTH)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        mbarrier.arrive(ds_free.index(slot), count=1, pred=count > 0)
        put(dq, buffer)
        if count > 0:
            add_rows(dq_desc, line, xb, yb, zb, WHICH * H, buffer, AXES)
    return dk, dv, g


@gluon.jit
def accumulate_item(
    WHICH: gl.constexpr, turn, g, k, v, row, k_s, v_s, k_ready, v_ready, k_free, v_free,
    q_s, do_s, lse_s, delta_s, q_ready, do_ready, q_free, do_free,
    ds_s, ds_ready, ds_free, dq_s, item_done, dk_desc, dv_desc, dq_desc, p_bounds, p_spoilt, lists,
    X, Y, Z, heads, groups, shared, total, scale_log2, scale, parts, split, biases,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    DEPTH: gl.constexpr, HIDES: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """A work item of a consumer: dK and dV of its box of keys.  Returns how many boxes there were so far."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    D: gl.constexpr = q_s.shape[-1]
    S: gl.constexpr = product_layout(N)
    O: gl.constexpr = product_layout(D)
    t, first, stop = taken(turn, total, split)
    bx, by, ny, bz, nz, y0, z0 = 0, 0, 1, 0, 1, 0, 0
    y1, z1, count, position = 0, 0, 0, 0
    last_low, first_up, low, width, low_2, width_2 = (), (), (), (), (), ()
    if len(lists) > 0:
        n, head, position = place_listed(t, lists, heads, shared)
        x0 = gl.load(list_at(lists, n, head * groups, position)) * (W * R[0])
    else:
        n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, False)
        starts, counts = boxes(p_bounds, X, Y, Z, x0, y0, z0, W, R, C, AXES, 4)
        bx, by, bz = starts
        nx, ny, nz = counts
        y1 = by + ny * C[1]
        z1 = bz + nz * C[2]
        count = nx * ny * nz
        if len(split) > 0:
            bx += first * C[0]
            count = stop - first
    x0 += WHICH * R[0]
    if HIDES:
        last_low, first_up = seen_whole(p_bounds, X, Y, Z, x0, y0, z0, R)
        low, width = seen_by_rows(p_bounds, X, Y, Z, x0, y0, z0, row, R)
        if len(lists) > 6:
            low_2, width_2 = row_bounds(lists[6], 0, X, x0, row, 1, R[0])
    dk = gl.zeros([M, D], gl.float32, O)
    dv = gl.zeros([M, D], gl.float32, O)
    none = gl.zeros([M, N], gl.float32, S)
    for w in gl.static_range(W):
        mbarrier.wait(k_ready.index(w), turn & 1)
    mbarrier.wait(v_ready.index(WHICH), turn & 1)
    for member in range(groups):
        dk, dv, g = accumulate_member(
            WHICH, g, member, dk, dv, k, v, none, row, n, head, (x0, y0, z0), (bx, by, bz), count,
            (y1, z1, position), (last_low, first_up, low, width, low_2, width_2),
            k_s, q_s, do_s, lse_s, delta_s, q_ready, do_ready, q_free, do_free,
            ds_s, ds_ready, ds_free, dq_s, dq_desc, lists, X, Y, Z, heads, groups, scale_log2, biases,
            W, R, C, AXES, STAGES, DEPTH, HIDES, APART,
        )  # fmt: skip
    if not APART:
        mbarrier.arrive(item_done, count=1)
    if HIDES:
        rx, ry, rz, inside = row_places(row, x0, y0, z0, X, Y, Z, R)
        spoilt = (gl.sum(dk * 0.0, 1) + gl.sum(dv * 0.0, 1) != 0.0).to(gl.int8)
        at = (n.to(gl.int64) * heads + head) * (X * Y * Z) + ((rx * Y + ry) * Z + rz)
        gl.store(p_spoilt + at, gl.convert_layout(spoilt, gl.SliceLayout(1, S)), mask=inside)
    if len(split) == 0 or count == split[0]:
        store_rows(dv_desc, n, x0, y0, z0, head, dv, v_s.index(WHICH), AXES)
    else:
        at = part_slot(turn, total, split) * W + WHICH
        store_part(parts[1], at, dv)
        store_part(parts[0], at, dk * scale)
    # K is read for dQ until then.
    mbarrier.wait(item_done, turn & 1)
    if len(split) == 0 or count == split[0]:
        store_rows(dk_desc, n, x0, y0, z0, head, dk * scale, k_s.index(WHICH), AXES)
    store_wait(0)
    mbarrier.arrive(k_free.index(WHICH), count=1)
    mbarrier.arrive(v_free.index(WHICH), count=1)
    return g


@gluon.jit
def accumulate(
    WHICH: gl.constexpr, k_s, v_s, k_ready, v_ready, k_free, v_free,
    q_s, do_s, lse_s, delta_s, q_ready, do_ready, q_free, do_free,
    ds_s, ds_ready, ds_free, dq_s, item_done, dk_desc, dv_desc, dq_desc, p_bounds, p_spoilt, lists,
    X, Y, Z, heads, groups, shared, total, scale_log2, scale, parts, split, biases,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    DEPTH: gl.constexpr, HIDES: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """A consumer: dK and dV of its box of keys of every work item, and unless apart its columns of dQ.

    S and dP are computed transposed, so that P and dS feed the next products from registers.
    """
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    S: gl.constexpr = product_layout(N)
    row = gl.arange(0, M, gl.SliceLayout(1, S))
    k = k_s.index(WHICH).reshape([M, k_s.shape[-1]])
    v = v_s.index(WHICH).reshape([M, v_s.shape[-1]])
    g = 0
    for turn in range(turns(total, split)):
        g = accumulate_item(
            WHICH, turn, g, k, v, row, k_s, v_s, k_ready, v_ready, k_free, v_free,
            q_s, do_s, lse_s, delta_s, q_ready, do_ready, q_free, do_free,
            ds_s, ds_ready, ds_free, dq_s, item_done, dk_desc, dv_desc, dq_desc, p_bounds, p_spoilt, lists,
            X, Y, Z, heads, groups, shared, total, scale_log2, scale, parts, split, biases,
            W, R, C, AXES, STAGES, DEPTH, HIDES, APART,
        )  # fmt: skip


@gluon.jit
def run_partitions(
    consumer: gl.constexpr, consumed, adder: gl.constexpr, added,
    producer: gl.constexpr, produced, APART: gl.constexpr,
):  # fmt: skip
    """Two consumers and a producer; the adder beside them if apart."""
    if APART:
        gl.warp_specialize(
            [
                (numbered, (0, consumer, consumed)),
                (numbered, (1, consumer, consumed)),
                (alone, (adder, added)),
                (alone, (producer, produced)),
            ],
            [4, 4, 1],
            [200, 88, 24],
        )
    else:
        gl.warp_specialize(
            [
                (numbered, (0, consumer, consumed)),
                (numbered, (1, consumer, consumed)),
                (alone, (producer, produced)),
            ],
            [4, 1],
            [240, 24],
        )


@gluon.jit
def tile_attend_backward_joint(
    k_desc, v_desc, q_desc, do_desc, lse_desc, delta_desc, dk_desc, dv_desc, dq_desc,
    p_bounds, p_spoilt, lists, X, Y, Z, heads, groups, shared, total, scale_log2, scale, parts, split,
    biases, W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """dK and dV, and dQ / scale added to the sums behind dq_desc, fp32 [N Hq, *grid, D].

    heads counts key heads, groups queries per key head; W is 2.  p_spoilt int8 [N, Hkv, keys]: where dK
    or dV is not finite; written where pairs are hidden.  `lists` as in hopper_lists, of tiles of 2 R
    keys and C queries, or () for a walk along boxes; behind them the second interval of each key [2 X], if
    keys see two.  `biases` added to the scores per key are (values
    [N or 1, heads, keys], strides of batch and head, query heads per head of them) or ().  A box of dQ
    has all columns of D if APART, else half of them.
    """
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    DEPTH: gl.constexpr = 2
    k_s = gl.allocate_shared_memory(k_desc.dtype, [W] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [W] + k_desc.block_type.shape, v_desc.layout)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_s = gl.allocate_shared_memory(
        q_desc.dtype, [STAGES] + q_desc.block_type.shape, do_desc.layout
    )
    lse_s = gl.allocate_shared_memory(
        gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout
    )
    delta_s = gl.allocate_shared_memory(
        gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout
    )
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, N], k_desc.dtype)
    ds_s = gl.allocate_shared_memory(k_desc.dtype, [W * DEPTH, M, N], DS)
    PARTS: gl.constexpr = 1 if APART else W
    dq_s = gl.allocate_shared_memory(gl.float32, [PARTS] + dq_desc.block_type.shape, dq_desc.layout)
    k_ready = barriers(W, 1)
    v_ready = barriers(W, 1)
    k_free = barriers(W, 1)
    v_free = barriers(W, 1)
    q_ready = barriers(STAGES, 1)
    do_ready = barriers(STAGES, 1)
    q_free = barriers(STAGES, W)
    do_free = barriers(STAGES, W)
    ds_ready = barriers(W * DEPTH, 1)
    ds_free = barriers(DEPTH, 1 if APART else W)
    item_done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(item_done, PARTS)
    run_partitions(
        accumulate,
        (
            k_s, v_s, k_ready, v_ready, k_free, v_free, q_s, do_s, lse_s, delta_s, q_ready,
            do_ready, q_free, do_free, ds_s, ds_ready, ds_free, dq_s, item_done,
            dk_desc, dv_desc, dq_desc, p_bounds, p_spoilt, lists, X, Y, Z,
            heads, groups, shared, total, scale_log2, scale, parts, split, biases,
            W, R, C, AXES, STAGES, DEPTH, HIDES, APART,
        ),
        sum_dq,
        (
            k_s, k_ready, ds_s, ds_ready, ds_free, dq_s, item_done, dq_desc, p_bounds, lists, X, Y, Z,
            heads, groups, shared, total, split, W, R, C, AXES, DEPTH,
        ),
        load_queries,
        (
            (k_desc, v_desc), (k_s, v_s), (k_ready, v_ready), (k_free, v_free),
            (q_desc, do_desc), (q_s, do_s), (lse_desc, delta_desc), (lse_s, delta_s),
            (q_ready, do_ready), (q_free, do_free),
            p_bounds, lists, X, Y, Z, heads, shared, total, groups, split, W, R, C, AXES, STAGES,
        ),
        APART,
    )  # fmt: skip


@triton.jit
def tile_attend_backward_round(
    p_sum, p_dq, p_spoilt, scale, length, heads,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq [N, L, heads, D] = scale times the sums [N heads, L, D]; p_spoilt int8 [N heads, L] or None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, HEAD_PAD)
    inside = (row < length)[:, None] & (column < HEAD_DIM)[None, :]
    at = (line * length + row)[:, None] * HEAD_DIM + column[None, :]
    dq = tl.load(p_sum + at, mask=inside, other=0.0) * scale
    if p_spoilt is not None:
        spoilt = (tl.sum(dq * 0.0, 1) != 0.0).to(tl.int8)
        tl.store(p_spoilt + line * length + row, spoilt, mask=row < length)
    token = (line // heads * length + row) * heads + line % heads
    at = token[:, None] * HEAD_DIM + column[None, :]
    tl.store(p_dq + at, dq.to(p_dq.dtype.element_ty), mask=inside)
