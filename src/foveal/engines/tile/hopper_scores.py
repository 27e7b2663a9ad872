# mypy: ignore-errors
"""Scores in the Hopper kernels: a cap on products, terms per key and by distance, and where pairs stand.

`terms` are (), or log2(e) / scale_log2 and a bias per key (biases, strides of batch and head, query
heads per head of them) or a slope by distance (slopes, codes of queries and of keys [parts, .],
queries, keys, parts), the distance being the difference of codes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Lengths of `terms` that tell which they are.
KEY_BIAS = gl.constexpr(5)
ALIBI = gl.constexpr(7)


@gluon.jit
def scored(s, squash, CAPPED: gl.constexpr):
    """The score of products, in base 2 after a factor: cap tanh(x) by exponentials, x = squash s / 2."""
    if CAPPED:
        s = 1.0 - 2.0 / (gl.exp2(s * squash) + 1.0)
    return s


@gluon.jit
def row_places(row, x0, y0, z0, X, Y, Z, R: gl.constexpr):
    """Where the rows of a box stand on the grid, and whether they stand inside."""
    x = x0 + row // (R[1] * R[2])
    y = y0 + row // R[2] % R[1]
    z = z0 + row % R[2]
    return x, y, z, (x < X) & (y < Y) & (z < Z)


@gluon.jit
def box_columns(x, y, z, c, key_grid, C: gl.constexpr, AXES: gl.constexpr):
    """Places of the keys c of a box, and whether they stand on the grid."""
    kx = x + c // (C[1] * C[2])
    ky = y + c // C[2] % C[1]
    kz = z + c % C[2]
    if AXES == 1:
        held = kx < key_grid[1]
    elif AXES == 2:
        held = (kx < key_grid[1]) & (ky < key_grid[2])
    else:
        held = (kx < key_grid[0]) & (ky < key_grid[1]) & (kz < key_grid[2])
    return kx, ky, kz, held


@gluon.jit
def key_terms(terms, n, head, x, y, z, c, key_grid, C: gl.constexpr, AXES: gl.constexpr):
    """What the keys c of a box bring to `add_terms`: a bias, or where they stand."""
    kx, ky, kz, held = box_columns(x, y, z, c, key_grid, C, AXES)
    if AXES == 1:
        key = kx
    elif AXES == 2:
        key = kx * key_grid[2] + ky
    else:
        key = (kx * key_grid[1] + ky) * key_grid[2] + kz
    if len(terms) == KEY_BIAS:
        p_biases = terms[1] + n.to(gl.int64) * terms[2] + (head // terms[4]) * terms[3]
        brought = gl.load(p_biases + key, mask=held, other=0.0).to(gl.float32) * terms[0]
    else:
        p_codes = terms[3] + n % terms[6] * terms[5]
        brought = gl.load(p_codes + key, mask=held, other=0).to(gl.float32)
    return brought


@triton.jit
def tile_attend_biases(
    p_biases, p_scaled, heads, length, last, pitch, plane, stride_n, stride_h, factor,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """factor times biases [N, heads, length], fp32 [N, heads, plane]: lines of `last` take `pitch`."""
    line = tl.program_id(1)
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < length
    p_line = p_biases + (line // heads).to(tl.int64) * stride_n + line % heads * stride_h
    bias = tl.load(p_line + at, mask=inside, other=0.0).to(tl.float32)
    at = line.to(tl.int64) * plane + at // last * pitch + at % last
    tl.store(p_scaled + at, bias * factor, mask=inside)


@gluon.jit
def query_terms(terms, n, head, query, inside):
    """What queries bring to `add_terms`: a slope, and where they stand."""
    if len(terms) == ALIBI:
        slope = gl.load(terms[1] + head).to(gl.float32) * terms[0]
        p_codes = terms[2] + n % terms[6] * terms[4]
        at = gl.load(p_codes + query, mask=inside, other=0).to(gl.float32)
    else:
        slope = 0.0
        at = 0.0
    return slope, at


@gluon.jit
def add_terms(s, of_queries, of_keys, terms):
    """Scores [rows, columns] with of_queries [rows, 1] and of_keys [1, columns] or a number."""
    if len(terms) == KEY_BIAS:
        s += of_keys
    elif len(terms) == ALIBI:
        s -= of_queries[0] * gl.abs(of_keys - of_queries[1])
    return s
