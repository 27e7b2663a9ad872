# mypy: ignore-errors
"""The decode kernel: every program walks its share of the stored keys of all sequences."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.early import gdc_launch_dependents
from foveal.engines.common.softmax import LOG2E, contained_product
from foveal.engines.decode.split import all_ends, share_start, tile_range

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def page_slots(p_row, start, stop, page_size, steps, TABLE: tl.constexpr, KV_TILE: tl.constexpr):
    """int64 slots [T] of stored tokens start, start + 1, ...; p_row is the row of the table.

    TABLE 0: one page, already counted, holds the sequence; 1: the tile lies in one page; 2: in several.
    """
    if TABLE == 0:
        return (start + tl.arange(0, KV_TILE)).to(tl.int64) * steps[2]
    if TABLE == 1:
        page = tl.load(p_row + start // page_size).to(tl.int64)
        token = start % page_size + tl.arange(0, KV_TILE)
        return page * steps[0] + token.to(tl.int64) * steps[2]
    j = start + tl.arange(0, KV_TILE)
    page = tl.load(p_row + j // page_size, mask=j < stop, other=0).to(tl.int64)
    return page * steps[0] + (j % page_size).to(tl.int64) * steps[2]


@triton.jit
def scaled_scores(
    s, q_sum, columns, slots, stored, j, row, terms,
    SCALED: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Scores [ROWS, T] in units of log 2 of the products s of queries and rows as they are kept."""
    scale, soft_cap, p_slopes, p_key_bias, _, p_bias, p_positions = terms
    head, q_pos, first_pos, bias_row = row
    if SCALED == 2:
        zero = tl.load(columns[2] + slots, mask=stored, other=0.0).to(tl.float32)
        s -= q_sum[:, None] * zero[None, :]
    if SCALED > 0:
        s *= tl.load(columns[1] + slots, mask=stored, other=0.0).to(tl.float32)[None, :]
    s *= scale
    if SOFT_CAP:
        e = tl.exp2(tl.abs(s) * (-2.8853900817779268 / soft_cap))
        t = (1.0 - e) / (1.0 + e)
        s = tl.where(s < 0.0, -t, t) * soft_cap
    if p_slopes is not None:
        k_pos = first_pos + j
        if p_positions is not None:
            k_pos = tl.load(p_positions + slots, mask=stored, other=0)
        slope = tl.load(p_slopes + head).to(tl.float32)
        s -= slope[:, None] * tl.abs(q_pos[:, None] - k_pos[None, :]).to(tl.float32)
    if p_key_bias is not None:
        p = p_key_bias + bias_row[:, None] + j[None, :]
        s += tl.load(p, mask=stored[None, :], other=0.0).to(tl.float32)
    if p_bias is not None:
        s += tl.load(p_bias + slots, mask=stored, other=0.0)[None, :]
    return s * LOG2E


@triton.jit
def running_step(s, largest, total):
    """Weights of scores [ROWS, T], the factor on what was summed before, the new maximum and sum."""
    found = tl.maximum(largest, tl.max(s, 1))
    base = tl.where(found == float("-inf"), 0.0, found)
    p = tl.exp2(s - base[:, None])
    factor = tl.exp2(largest - base)
    return p, factor, found, total * factor + tl.sum(p, 1)


@triton.jit
def load_queries(
    p_rows, inside, part, WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, PACK: tl.constexpr
):
    """The channels `part` of every word of PACK channels, [ROWS, WORDS_PAD]."""
    word = tl.arange(0, WORDS_PAD)
    p = p_rows[:, None] + (word * PACK + part)[None, :]
    return tl.load(p, mask=inside[:, None] & (word < WORDS)[None, :], other=0.0)


@triton.jit
def rescaled(acc0, acc1, acc2, acc3, factor, PACK: tl.constexpr):
    acc0 *= factor[:, None]
    if PACK > 1:
        acc1 *= factor[:, None]
    if PACK > 2:
        acc2 *= factor[:, None]
        acc3 *= factor[:, None]
    return acc0, acc1, acc2, acc3


@triton.jit
def store_channels(
    p_rows, inside, factor, shift, acc0, acc1, acc2, acc3,
    SCALED: tl.constexpr, PACK: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Writes (acc - shift) * factor of all channels of rows."""
    word = tl.arange(0, DV_PAD)
    mask = inside[:, None] & (word < DV // PACK)[None, :]
    if SCALED < 2:
        shift = tl.zeros_like(shift)
    for part in tl.static_range(PACK):
        acc = acc0 if part == 0 else acc1 if part == 1 else acc2 if part == 2 else acc3
        o = (acc - shift[:, None]) * factor[:, None]
        p = p_rows[:, None] + (word * PACK + part)[None, :]
        tl.store(p, o.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def key_products(q, words, s, LOADS: tl.constexpr, PACK: tl.constexpr, DTYPE: tl.constexpr):
    """s [ROWS, T] and the products of queries, in PACK parts, with words [T, D_PAD]."""
    for part in tl.static_range(PACK):
        k = LOADS.unpack(words, part, DTYPE)
        s = tl.dot(q[part], tl.trans(k), s, input_precision="ieee")
    return s


@triton.jit
def value_products(
    p, visible, words, acc0, acc1, acc2, acc3,
    LOADS: tl.constexpr, PACK: tl.constexpr, CONTAINED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Accumulators [ROWS, DV_PAD] of the channels of words, with p [ROWS, T] of them added."""
    acc0 = value_product(p, visible, LOADS.unpack(words, 0, DTYPE), acc0, CONTAINED)
    if PACK > 1:
        acc1 = value_product(p, visible, LOADS.unpack(words, 1, DTYPE), acc1, CONTAINED)
    if PACK > 2:
        acc2 = value_product(p, visible, LOADS.unpack(words, 2, DTYPE), acc2, CONTAINED)
        acc3 = value_product(p, visible, LOADS.unpack(words, 3, DTYPE), acc3, CONTAINED)
    return acc0, acc1, acc2, acc3


@triton.jit
def value_product(p, visible, v, acc, CONTAINED: tl.constexpr):
    if CONTAINED:
        return contained_product(p, visible, v, acc)
    return tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")


@triton.jit
def weighted(p, columns, slots, stored, shift, factor, SCALED: tl.constexpr):
    """Weights of value rows as they are kept, and what the zeros of the rows take from all channels."""
    if SCALED > 0:
        p = p * tl.load(columns[1] + slots, mask=stored, other=0.0).to(tl.float32)[None, :]
    if SCALED == 2:
        zero = tl.load(columns[2] + slots, mask=stored, other=0.0).to(tl.float32)
        shift = shift * factor + tl.sum(p * zero[None, :], 1)
    return p, shift


@triton.jit(
    do_not_specialize=["units", "Lq", "left", "sink_tokens", "programs", "lean"],
    do_not_specialize_on_alignment=["page_size"],
)
def decode_attend_forward(
    p_q, q_steps, p_table, table_steps, p_lengths, p_after, p_seen, page_size, steps,
    keys, values, terms, p_sink, p_o, p_lse, p_part, p_part_max, p_part_sum,
    units, Lq, left, sink_tokens, programs, lean,
    LOADS: tl.constexpr, SCALED: tl.constexpr, SOFT_CAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BOUNDARY: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    UNITS_PAD: tl.constexpr, UNITS_PER_SEQUENCE: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, KV_TILE: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, REST: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    PACK: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, STAGES: tl.constexpr,
    GUARDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """o and lse of segments that one program holds whole, parts of all others.

    EARLY lets the merge kernel start, and wait, beside this one.  A key has D words of PACK channels and
    REST channels behind them; with VALUE_WIDTH 0 its first DV channels are the values.  D_PAD and DV_PAD
    count words.
    Shapes: p_part [2 programs, ROWS, DV], p_part_max and p_part_sum [2 programs, ROWS].
    """
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    row_tiles = tl.cdiv(Lq * GROUPS, ROWS)
    segments = row_tiles * (HEADS // UNITS_PER_SEQUENCE)
    ends = all_ends(
        p_lengths, p_after, units, segments, Lq, left, sink_tokens,
        UNITS_PAD, UNITS_PER_SEQUENCE, WINDOW, KV_TILE,
    )  # fmt: skip
    work = tl.max(ends, 0)
    place = share_start(program, programs, work, lean)
    stop = share_start(program + 1, programs, work, lean)
    unit = tl.sum(tl.where(ends <= place, 1, 0), 0)
    begin = tl.max(tl.where(ends <= place, ends, 0), 0)
    dtype: tl.constexpr = p_q.dtype.element_ty

    while place < stop:
        n = unit // UNITS_PER_SEQUENCE
        length = tl.load(p_lengths + unit)
        after = 0
        if p_after is not None:
            after = tl.load(p_after + n)
        seen = tl.load(p_seen + n)
        sinks, first, tiles = tile_range(length, after, Lq, left, sink_tokens, WINDOW, KV_TILE)
        if place >= begin + tiles * segments:
            begin += tiles * segments
            unit += 1
        else:
            segment = (place - begin) // tiles
            t0 = (place - begin) % tiles
            t1 = tl.minimum(tiles, t0 + stop - place)
            place += t1 - t0
            row_tile = segment % row_tiles
            h = segment // row_tiles + unit % UNITS_PER_SEQUENCE

            r = row_tile * ROWS + tl.arange(0, ROWS)
            in_rows = r < Lq * GROUPS
            i = tl.where(in_rows, r, 0) // GROUPS
            head = h * GROUPS + tl.where(in_rows, r, 0) % GROUPS
            q_start = n.to(tl.int64) * q_steps[0]
            q_row = p_q + q_start + i.to(tl.int64) * q_steps[1] + head * q_steps[2]
            q0 = load_queries(q_row, in_rows, 0, D, D_PAD, PACK)
            q = (q0,)
            q_sum = tl.sum(q0.to(tl.float32), 1)
            if PACK > 1:
                q1 = load_queries(q_row, in_rows, 1, D, D_PAD, PACK)
                q = (q0, q1)
                q_sum += tl.sum(q1.to(tl.float32), 1)
            if PACK > 2:
                q2 = load_queries(q_row, in_rows, 2, D, D_PAD, PACK)
                q3 = load_queries(q_row, in_rows, 3, D, D_PAD, PACK)
                q = (q0, q1, q2, q3)
                q_sum += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
            if REST > 0:
                rest = tl.arange(0, REST)
                q_rest = tl.load(
                    q_row[:, None] + (D + rest)[None, :], mask=in_rows[:, None], other=0.0
                )
            i_first = row_tile * ROWS // GROUPS
            i_last = tl.minimum(row_tile * ROWS + ROWS, Lq * GROUPS) - 1
            i_last = i_last // GROUPS
            # Query i is at stored place `at + i`, counted as if nothing had been evicted before it.
            at = length + after - Lq
            first_pos = seen - after - length
            bias_row = tl.zeros([ROWS], tl.int64)
            if terms[3] is not None:
                bias_row += n.to(tl.int64) * terms[4][0] + h * terms[4][1]
                bias_row += head % GROUPS * terms[4][2]
            row = (head, seen - Lq + i, first_pos, bias_row)
            common_stop = length
            if CAUSAL:
                common_stop = tl.minimum(length, tl.maximum(at + i_first + 1, 0))
            common_start = 0
            if WINDOW:
                common_start = at + i_last - left
            head_slots = h.to(tl.int64) * steps[1]
            p_row = p_table + n.to(tl.int64) * table_steps[0] + h * table_steps[1]
            if TABLE == 0:
                head_slots += tl.load(p_row).to(tl.int64) * steps[0]

            largest = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            shift = tl.zeros([ROWS], tl.float32)
            # Of the first channel of every word, of the second, ...; those beyond PACK are never touched.
            acc0 = tl.zeros([ROWS, DV_PAD], tl.float32)
            acc1 = tl.zeros([ROWS, DV_PAD], tl.float32)
            acc2 = tl.zeros([ROWS, DV_PAD], tl.float32)
            acc3 = tl.zeros([ROWS, DV_PAD], tl.float32)
            needed = sinks + tl.maximum(tl.cdiv(common_stop, KV_TILE) - first, 0)
            for t in tl.range(t0, tl.minimum(t1, needed), num_stages=STAGES):
                start = t * KV_TILE
                if WINDOW:
                    start = tl.where(t < sinks, t, first + t - sinks) * KV_TILE
                j = start + tl.arange(0, KV_TILE)
                slots = head_slots + page_slots(
                    p_row, start, length, PAGE if PAGE else page_size, steps, TABLE, KV_TILE
                )
                seen_by_all = j < common_stop
                if WINDOW:
                    k_pos = first_pos + j
                    distance = j - at - i_last
                    if terms[6] is not None:
                        k_pos = tl.load(terms[6] + slots, mask=seen_by_all, other=0)
                        distance = k_pos - (seen - Lq) - i_last
                    seen_by_all = seen_by_all & ((distance >= -left) | (k_pos < sink_tokens))
                k = LOADS.load(
                    keys, slots, seen_by_all, KEY_WIDTH, 0, D, D_PAD, GUARDED or VALUE_WIDTH == 0
                )
                s = tl.zeros([ROWS, KV_TILE], tl.float32)
                if REST > 0:
                    k_rest = LOADS.load(keys, slots, seen_by_all, KEY_WIDTH, D, REST, REST, GUARDED)
                    s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision="ieee")
                s = key_products(q, k, s, LOADS, PACK, dtype)
                s = scaled_scores(
                    s, q_sum, keys, slots, seen_by_all, j, row, terms, SCALED, SOFT_CAP
                )
                s = tl.where(seen_by_all[None, :], s, float("-inf"))
                p, factor, largest, total = running_step(s, largest, total)
                acc0, acc1, acc2, acc3 = rescaled(acc0, acc1, acc2, acc3, factor, PACK)
                v = k
                if VALUE_WIDTH > 0:
                    v = LOADS.load(
                        values, slots, seen_by_all, VALUE_WIDTH, 0, DV // PACK, DV_PAD, True
                    )
                    p, shift = weighted(p, values, slots, seen_by_all, shift, factor, SCALED)
                acc0, acc1, acc2, acc3 = value_products(
                    p, seen_by_all, v, acc0, acc1, acc2, acc3, LOADS, PACK, False, dtype
                )

            if BOUNDARY:  # noqa: SIM102
                # Keys that some rows of the tile see and others do not: the program of the last tile
                # takes them all, with products that keep hidden NaN out.
                if t1 == tiles:
                    upper_stop = tl.minimum(length, at + i_last + 1)
                    lower_start = 0
                    lower_stop = 0
                    if WINDOW:
                        lower_start = tl.maximum(at + i_first - left, 0)
                        lower_stop = tl.maximum(tl.minimum(common_start, common_stop), lower_start)
                    lower_tiles = tl.cdiv(lower_stop - lower_start, KV_TILE)
                    upper_tiles = tl.cdiv(tl.maximum(upper_stop - common_stop, 0), KV_TILE)
                    for t in tl.range(0, lower_tiles + upper_tiles, num_stages=1):
                        lower = t < lower_tiles
                        start = tl.where(
                            lower,
                            lower_start + t * KV_TILE,
                            common_stop + (t - lower_tiles) * KV_TILE,
                        )
                        end = tl.where(lower, lower_stop, upper_stop)
                        j = start + tl.arange(0, KV_TILE)
                        stored = j < end
                        slots = head_slots + page_slots(
                            p_row, start, length, PAGE if PAGE else page_size, steps,
                            2 if TABLE else 0, KV_TILE,
                        )  # fmt: skip
                        k = LOADS.load(keys, slots, stored, KEY_WIDTH, 0, D, D_PAD, True)
                        s = tl.zeros([ROWS, KV_TILE], tl.float32)
                        if REST > 0:
                            k_rest = LOADS.load(keys, slots, stored, KEY_WIDTH, D, REST, REST, True)
                            s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision="ieee")
                        s = key_products(q, k, s, LOADS, PACK, dtype)
                        s = scaled_scores(
                            s, q_sum, keys, slots, stored, j, row, terms, SCALED, SOFT_CAP
                        )
                        visible = stored[None, :] & (j[None, :] <= at + i[:, None])
                        if WINDOW:
                            visible = visible & (
                                (j[None, :] >= at + i[:, None] - left)
                                | ((first_pos + j < sink_tokens)[None, :] & ~lower)
                            )
                            visible = visible & ~(lower & (first_pos + j < sink_tokens)[None, :])
                        s = tl.where(visible, s, float("-inf"))
                        p, factor, largest, total = running_step(s, largest, total)
                        acc0, acc1, acc2, acc3 = rescaled(acc0, acc1, acc2, acc3, factor, PACK)
                        v = k
                        if VALUE_WIDTH > 0:
                            v = LOADS.load(
                                values, slots, stored, VALUE_WIDTH, 0, DV // PACK, DV_PAD, True
                            )
                            p, shift = weighted(p, values, slots, stored, shift, factor, SCALED)
                        acc0, acc1, acc2, acc3 = value_products(
                            p, visible, v, acc0, acc1, acc2, acc3, LOADS, PACK, True, dtype
                        )

            if (t0 == 0) & (t1 == tiles):
                factor = tl.full([ROWS], 1.0, tl.float32)
                if p_sink is not None:
                    sink = tl.load(p_sink + head).to(tl.float32) * LOG2E
                    found = tl.maximum(largest, sink)
                    factor = tl.exp2(largest - found)
                    total = total * factor + tl.exp2(sink - found)
                    largest = found
                safe = tl.where(total == 0.0, 1.0, total)
                lse = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(safe)) * LN2)
                query = n.to(tl.int64) * Lq + i
                o_row = query * (HEADS * GROUPS) + head
                store_channels(
                    p_o + o_row * DV, in_rows, factor / safe, shift, acc0, acc1, acc2, acc3,
                    SCALED, PACK, DV, DV_PAD,
                )  # fmt: skip
                tl.store(p_lse + o_row, lse, mask=in_rows)
            else:
                part = program * 2 + tl.where(t0 == 0, 1, 0)
                place_in = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
                store_channels(
                    p_part + place_in * DV, in_rows, tl.full([ROWS], 1.0, tl.float32), shift,
                    acc0, acc1, acc2, acc3, SCALED, PACK, DV, DV_PAD,
                )  # fmt: skip
                tl.store(p_part_max + place_in, largest)
                tl.store(p_part_sum + place_in, total)
