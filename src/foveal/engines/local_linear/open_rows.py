# mypy: ignore-errors
"""Which rows a solve has left open, listed, so that the next steps meet no others."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.early import gdc_launch_dependents, gdc_wait

UNSOLVED = tl.constexpr(3.0e38)
"""What `reached` holds of rows that are not solved."""


@triton.jit
def local_linear_open_rows(
    p_reached, p_rows, p_counts, X, Y, Z,
    R: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Tokens of the rows of a head whose `reached` [N, heads, tokens] is UNSOLVED, box R by box; how many.

    rows int32 [N, heads, tokens], counts int32 [N, heads].
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    ROWS: tl.constexpr = R[0] * R[1] * R[2]
    plane = tl.program_id(0).to(tl.int64) * (X * Y * Z)
    ny, nz = tl.cdiv(Y, R[1]), tl.cdiv(Z, R[2])
    total = tl.cdiv(X, R[0]) * ny * nz * ROWS
    count = 0
    for first in range(0, total, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        box, row = slot // ROWS, slot % ROWS
        x = box // (ny * nz) * R[0] + row // (R[1] * R[2])
        y = box // nz % ny * R[1] + row // R[2] % R[1]
        z = box % nz * R[2] + row % R[2]
        inside = (x < X) & (y < Y) & (z < Z)
        token = (x * Y + y) * Z + z
        reached = tl.load(p_reached + plane + token, mask=inside, other=0.0)
        left = (reached >= UNSOLVED).to(tl.int32)
        place = count + tl.cumsum(left, 0) - left
        tl.store(p_rows + plane + place, token, mask=left > 0)
        count += tl.sum(left, 0)
    tl.store(p_counts + tl.program_id(0), count)
