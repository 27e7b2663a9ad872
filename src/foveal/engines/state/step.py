"""One token of a recurrence: every state is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads"])
def state_step_forward(
    p_q, p_k, p_v, p_decay, p_gate, p_initial, p_final, p_o,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    DELTA: tl.constexpr, DECAY: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, V_TILE: tl.constexpr,
):  # fmt: skip
    """o and the new state of one sequence, value head and tile of value channels; all in float32.

    p_decay: log decays [Hv], [N, Hv] or [N, Hv, DK] for DECAY 1, 2, 3.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    program = tl.program_id(0)
    tile = program % v_tiles
    h = program // v_tiles % heads
    n = tl.cast(program // v_tiles // heads, tl.int64)
    row = tl.arange(0, ROWS)
    column = tile * V_TILE + tl.arange(0, V_TILE)
    in_row = row < DK
    in_column = column < DV
    offset = (n * heads + h) * (DK * DV) + row[:, None] * DV + column[None, :]
    mask = in_row[:, None] & in_column[None, :]
    if p_initial is not None:
        s = tl.load(p_initial + offset, mask=mask, other=0.0)
    else:
        s = tl.zeros([ROWS, V_TILE], tl.float32)
    q = tl.load(p_q + n * q_stride_t + h // groups * q_stride_h + row, mask=in_row, other=0.0)
    k = tl.load(p_k + n * k_stride_t + h // groups * k_stride_h + row, mask=in_row, other=0.0)
    v = tl.load(p_v + n * v_stride_t + h * v_stride_h + column, mask=in_column, other=0.0)
    q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    if DECAY == 1:
        s = s * tl.exp(tl.load(p_decay + h).to(tl.float32))
    if DECAY == 2:
        s = s * tl.exp(tl.load(p_decay + n * heads + h).to(tl.float32))
    if DECAY == 3:
        log_decay = tl.load(p_decay + (n * heads + h) * DK + row, mask=in_row, other=0.0)
        s = s * tl.exp(log_decay.to(tl.float32))[:, None]
    if DELTA:
        v = v - tl.sum(s * k[:, None], 0)
    if p_gate is not None:
        v = v * tl.load(p_gate + n * heads + h).to(tl.float32)
    s += k[:, None] * v[None, :]
    o = tl.sum(s * q[:, None], 0) * scale
    tl.store(p_final + offset, s, mask=mask)
    p = p_o + (n * heads + h) * DV + column
    tl.store(p, o.to(p_o.dtype.element_ty), mask=in_column)
