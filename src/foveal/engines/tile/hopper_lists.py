# mypy: ignore-errors
"""Walks along lists of key tiles in the Hopper kernels: where a work item's list is, and who loads it.

`lists` is (words, row tiles, pitch, heads per list, list stride, batch stride) of a `WalkLists`; where
the tested tiles hide what is no interval, behind it (bits, marks, column tiles): tile (i, j) hides the
pairs whose bit is 0 in bits[marks[i, j]], int32 [rows, columns / 32].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from foveal.engines.tile.hopper_walk import copy_box, copy_statistics
from foveal.engines.tile.lists import WalkLists

HEADER = gl.constexpr(WalkLists.HEADER)


@gluon.jit
def list_of(t, lists, heads, shared):
    """Batch, head and list of work item t: the longest first among `shared` heads."""
    tiles = lists[1]
    rest = t // (shared * tiles)
    groups = heads // shared
    n = rest // groups
    head = rest % groups * shared + t % shared
    line = n * lists[5] + head // lists[3] * lists[4] + t // shared % tiles
    return n, head, lists[0] + line.to(gl.int64) * lists[2]


@gluon.jit
def visits(p_list):
    """How many tiles of a list are visited: at least one, which is to be ignored if there is none."""
    return gl.maximum(gl.load(p_list + 2), 1)


@gluon.jit
def bit_rows(lists, tile, own, x, C: gl.constexpr, ROWS: gl.constexpr):
    """Where the bits of rows `own` of a tile start, for the columns from x on."""
    mark = gl.load(lists[7] + (tile * lists[8] + x // C[0]))
    return lists[6] + (mark * ROWS + own) * (C[0] // 32)


@gluon.jit
def listed_bits(lists, tile, own, x, LAYOUT: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr):
    """Which pairs of the rows and the columns from x on are visible.  [rows, columns]"""
    p_rows = bit_rows(lists, tile, own, x, C, ROWS)
    c = gl.arange(0, C[0], gl.SliceLayout(0, LAYOUT))
    words = gl.load(p_rows)[:, None]
    for i in gl.static_range(1, C[0] // 32):
        words = gl.where((c // 32 >= i)[None, :], gl.load(p_rows + i)[:, None], words)
    return ((words >> (c % 32)[None, :]) & 1) != 0


@gluon.jit
def load_listed(
    rows, row_s, row_ready, row_free, columns, column_s, column_ready, column_free,
    lists, heads, shared, total, groups, biases,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: the rows of every work item, then the tiles of columns of its list, in order."""
    g = 0
    turn = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        n, head, p_list = list_of(t, lists, heads, shared)
        x0 = gl.load(p_list) * (W * R[0])
        count = visits(p_list)
        x = gl.load(p_list + HEADER) * C[0]
        for c in gl.static_range(W):
            for i in gl.static_range(len(rows)):
                mbarrier.wait(row_free[i].index(c), (turn & 1) ^ 1)
                mbarrier.expect(row_ready[i].index(c), rows[i].block_type.nbytes)
                copy_box(
                    rows[i], n, x0 + c * R[0], 0, 0, head, row_ready[i].index(c), row_s[i].index(c), 1
                )  # fmt: skip
        for j in range(count):
            # Asked for before the waits, so that it is there when the next copy can start.
            after = gl.load(p_list + (HEADER + gl.minimum(j + 1, count - 1))) * C[0]
            stage = g % STAGES
            phase = (g // STAGES) & 1
            for i in gl.static_range(len(columns)):
                mbarrier.wait(column_free[i].index(stage), phase ^ 1)
                if (i == 0) & (len(biases) > 0):
                    copy_statistics(
                        biases[0], columns[0], n * biases[2] + head // biases[3], x, 0, 0,
                        column_ready[0].index(stage), biases[1].index(stage), 1,
                    )  # fmt: skip
                else:
                    mbarrier.expect(column_ready[i].index(stage), columns[i].block_type.nbytes)
                copy_box(
                    columns[i], n, x, 0, 0, head // groups,
                    column_ready[i].index(stage), column_s[i].index(stage), 1,
                )  # fmt: skip
            x = after
            g += 1
        turn += 1
