# mypy: ignore-errors
"""Jit functions: rows of a store, by the kind of its codec.

Rows in 8 or 4 bits are loaded as words of 16 bits, in which the matrix units read them without a detour,
and a product over D channels becomes PACK products over D / PACK words: of the first channel of every
word, of the second, and so on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl

from foveal.engines.common.hooks import Hooks


@dataclasses.dataclass(frozen=True)
class Loads(Hooks):
    """load(columns, slots [T], inside [T], WIDTH, FIRST, D, D_PAD, MASKED) gives channels or words FIRST
    to FIRST + D of rows of WIDTH as [T, D_PAD], 0 in the padding and, if MASKED, outside;
    unpack(x, PART, DTYPE) the channels PART of words.
    """

    load: Any
    unpack: Any


@triton.jit
def load_rows(
    columns, slots, inside, WIDTH: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows, or words of them, as they are kept."""
    channel = tl.arange(0, D_PAD)
    p = columns[0] + slots[:, None] * WIDTH + (FIRST + channel)[None, :]
    if D == D_PAD:
        if MASKED:
            return tl.load(p, mask=inside[:, None], other=0)
        return tl.load(p)
    if MASKED:
        return tl.load(p, mask=inside[:, None] & (channel < D)[None, :], other=0)
    return tl.load(p, mask=(channel < D)[None, :], other=0)


@triton.jit
def kept_ranks(octets, T: tl.constexpr, D_PAD: tl.constexpr):
    """Whether a channel is kept and how many kept ones come before it, [T, D_PAD], of bytes of bits."""
    # Bit i of a half byte to byte i of a word; the product with 0x01010101 sums bytes 0 to i in byte i.
    low = ((octets & 15) * 0x00204081 & 0x01010101) * 0x01010101
    high = ((octets >> 4) * 0x00204081 & 0x01010101) * 0x01010101 + (low >> 24) * 0x01010101
    count = high >> 24
    before = tl.cumsum(count, 1) - count
    bit = tl.arange(0, 8)[None, None, :]
    upto = (tl.where(bit < 4, low[:, :, None], high[:, :, None]) >> (bit % 4 * 8)) & 255
    kept = (octets[:, :, None] >> bit) & 1
    rank = before[:, :, None] + upto - kept
    return tl.reshape(kept, [T, D_PAD]) != 0, tl.reshape(rank, [T, D_PAD])


@triton.jit
def load_bitmap(
    columns, slots, inside, WIDTH: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of which WIDTH entries are kept, spread to their channels by the bits."""
    T: tl.constexpr = slots.shape[0]
    octet = tl.arange(0, D_PAD // 8)
    octet_width: tl.constexpr = (D + 7) // 8
    octets = tl.load(
        columns[1] + slots[:, None] * octet_width + octet[None, :],
        mask=inside[:, None] & (octet < octet_width)[None, :], other=0,
    ).to(tl.int32)  # fmt: skip
    kept, rank = kept_ranks(octets, T, D_PAD)
    return tl.load(columns[0] + slots[:, None] * WIDTH + rank, mask=kept, other=0.0)


@triton.jit
def unpack_plain(x, PART: tl.constexpr, DTYPE: tl.constexpr):
    return x


@triton.jit
def unpack_fp8(x, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Byte PART of words as e4m3: its bits are those of a float32 that is 2^-120 times as large."""
    octet = x.to(tl.int32) >> (8 * PART)
    bits = (octet & 0x80) << 24 | (octet & 0x7F) << 20
    return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)


@triton.jit
def unpack_int8(x, PART: tl.constexpr, DTYPE: tl.constexpr):
    octet = x.to(tl.int32) >> (8 * PART) & 0xFF
    return ((octet ^ 0x80) - 0x80).to(tl.float32).to(DTYPE)


@triton.jit
def unpack_int4(x, PART: tl.constexpr, DTYPE: tl.constexpr):
    return (x.to(tl.int32) >> (4 * PART) & 15).to(tl.float32).to(DTYPE)


@triton.jit
def unpack_fp8_bfloat16(x, PART: tl.constexpr, DTYPE: tl.constexpr):
    """As `unpack_fp8`, two words at a time: shifted to their places and multiplied by 2^120."""
    if PART == 0:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c; shl.b32 a, $1, 8; and.b32 a, a, 0x80008000;
            shl.b32 b, $1, 4; and.b32 b, b, 0x07f007f0; or.b32 a, a, b;
            mov.b32 b, 0x7b807b80; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, b, c; }""",
            "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c; and.b32 a, $1, 0x80008000;
        shr.u32 b, $1, 4; and.b32 b, b, 0x07f007f0; or.b32 a, a, b;
        mov.b32 b, 0x7b807b80; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, b, c; }""",
        "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def unpack_int8_bfloat16(x, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Two words at a time: 128 and the low seven bits, less 128 or, for negative numbers, 256."""
    if PART == 0:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c; and.b32 a, $1, 0x007f007f; or.b32 a, a, 0x43004300;
            and.b32 b, $1, 0x00800080; or.b32 b, b, 0x43004300;
            mov.b32 c, 0xbf80bf80; fma.rn.bf16x2 $0, b, c, a; }""",
            "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c; shr.u32 b, $1, 8; and.b32 a, b, 0x007f007f;
        or.b32 a, a, 0x43004300; and.b32 b, b, 0x00800080; or.b32 b, b, 0x43004300;
        mov.b32 c, 0xbf80bf80; fma.rn.bf16x2 $0, b, c, a; }""",
        "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def unpack_int4_bfloat16(x, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Two words at a time: four bits below 128, less 128."""
    shifted = (
        x.to(tl.uint16, bitcast=True) >> (4 * PART) if PART > 0 else x.to(tl.uint16, bitcast=True)
    )
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c; and.b32 a, $1, 0x000f000f; or.b32 a, a, 0x43004300;
        mov.b32 b, 0x3f803f80; mov.b32 c, 0xc300c300; fma.rn.bf16x2 $0, a, b, c; }""",
        "=r,r", [shifted], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


PACKED = {"plain": 1, "bitmap": 1, "fp8": 2, "int8": 2, "int4": 4}
"""Channels in one word of a kind."""
_UNPACK = {"fp8": unpack_fp8, "int8": unpack_int8, "int4": unpack_int4}
_UNPACK_BFLOAT16 = {
    "fp8": unpack_fp8_bfloat16,
    "int8": unpack_int8_bfloat16,
    "int4": unpack_int4_bfloat16,
}


def loads_of(kind: str, fast: bool) -> tuple[Loads, int]:
    """The loads of a kind; 0, 1 for rows with a scale, 2 for scale and zero.

    fast: products are in bfloat16 on an NVIDIA GPU.
    """
    if PACKED[kind] == 1:
        return Loads(load_bitmap if kind == "bitmap" else load_rows, unpack_plain), 0
    unpack = (_UNPACK_BFLOAT16 if fast else _UNPACK)[kind]
    return Loads(load_rows, unpack), 2 if kind == "int4" else 1
