# mypy: ignore-errors
"""The second decode kernel: one softmax out of the parts that programs left of a segment."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.early import gdc_wait
from foveal.engines.common.softmax import LOG2E
from foveal.engines.decode.attend import LN2
from foveal.engines.decode.split import all_ends, share_of, unit_tiles


@triton.jit(do_not_specialize=["units", "Lq", "left", "sink_tokens", "programs", "lean"])
def decode_merge_forward(
    p_lengths, p_after, p_sink, p_o, p_lse, p_part, p_part_max, p_part_sum,
    units, Lq, left, sink_tokens, programs, lean,
    WINDOW: tl.constexpr, UNITS_PAD: tl.constexpr, UNITS_PER_SEQUENCE: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, KV_TILE: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """o and lse of TOGETHER rows (a query and a query head each) of a key head.

    Rows of segments that one program held whole are there already.
    """
    rows = Lq * GROUPS
    blocks = tl.cdiv(rows, TOGETHER)
    r = tl.program_id(0) % blocks * TOGETHER + tl.arange(0, TOGETHER)
    h = tl.program_id(0) // blocks % HEADS
    n = tl.program_id(0) // blocks // HEADS
    unit = n if UNITS_PER_SEQUENCE == 1 else n * HEADS + h
    row_tiles = tl.cdiv(rows, ROWS)
    segments = row_tiles * (HEADS // UNITS_PER_SEQUENCE)
    ends = all_ends(
        p_lengths, p_after, units, segments, Lq, left, sink_tokens,
        UNITS_PAD, UNITS_PER_SEQUENCE, WINDOW, KV_TILE,
    )  # fmt: skip
    work = tl.max(ends, 0)
    tiles = unit_tiles(
        unit, True, p_lengths, p_after, Lq, left, sink_tokens, UNITS_PER_SEQUENCE, WINDOW, KV_TILE
    )
    end = tl.sum(tl.where(tl.arange(0, UNITS_PAD) == unit, ends, 0), 0)
    segment = r // ROWS if UNITS_PER_SEQUENCE > 1 else h * row_tiles + r // ROWS
    begin = end - tiles * segments + segment * tiles  # [TOGETHER]
    first = share_of(begin, programs, work, lean)
    last = share_of(begin + tiles - 1, programs, work, lean)
    count = tl.where(tiles == 0, 0, last - first + 1)
    unfinished = (r < rows) & (count != 1)
    if EARLY:  # every program: what comes after this kernel must find the other one finished
        gdc_wait()
    if tl.max(unfinished.to(tl.int32), 0) > 0:
        channel = tl.arange(0, DV_PAD)[None, None, :]
        index = tl.arange(0, PARTS)[:, None]
        head = h * GROUPS + r % GROUPS
        largest = tl.full([TOGETHER], float("-inf"), tl.float32)
        total = tl.zeros([TOGETHER], tl.float32)
        if p_sink is not None:
            largest = tl.load(p_sink + head, mask=unfinished, other=0.0).to(tl.float32) * LOG2E
            total += 1.0
        acc = tl.zeros([TOGETHER, DV_PAD], tl.float32)
        for start in range(0, tl.max(count, 0), PARTS):
            number = start + index
            there = (number < count[None, :]) & unfinished[None, :]
            part = (first[None, :] + number) * 2 + tl.where(number == 0, 1, 0)
            row = part.to(tl.int64) * ROWS + (r % ROWS)[None, :]
            m = tl.load(p_part_max + row, mask=there, other=float("-inf"))
            sums = tl.load(p_part_sum + row, mask=there, other=0.0)
            o = tl.load(
                p_part + row[:, :, None] * DV + channel,
                mask=there[:, :, None] & (channel < DV), other=0.0,
            )  # fmt: skip
            found = tl.maximum(largest, tl.max(m, 0))
            base = tl.where(found == float("-inf"), 0.0, found)
            weight = tl.exp2(m - base[None, :])
            factor = tl.exp2(largest - base)
            total = total * factor + tl.sum(weight * sums, 0)
            acc = acc * factor[:, None] + tl.sum(o * weight[:, :, None], 0)
            largest = found
        safe = tl.where(total == 0.0, 1.0, total)
        lse = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(safe)) * LN2)
        o_row = (n.to(tl.int64) * Lq + r // GROUPS) * (HEADS * GROUPS) + head
        tl.store(
            p_o + o_row[:, None] * DV + tl.arange(0, DV_PAD)[None, :],
            (acc / safe[:, None]).to(p_o.dtype.element_ty),
            mask=unfinished[:, None] & (tl.arange(0, DV_PAD) < DV)[None, :],
        )
        tl.store(p_lse + o_row, lse, mask=unfinished)
