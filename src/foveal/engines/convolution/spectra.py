"""The gradient of a spectrum: products of two spectra, summed over samples."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["samples", "elements"])
def convolution_spectra_backward(p_x, p_dy, p_found, samples, elements, BLOCK: tl.constexpr):
    """found [S, 2, elements] = sum_n conj(x) dy, both [S, samples n, 2, elements]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < elements
    own = tl.program_id(1).to(tl.int64)
    re = tl.zeros([BLOCK], tl.float32)
    im = tl.zeros([BLOCK], tl.float32)
    for sample in range(samples):
        begin = (own * samples + sample) * 2 * elements + place
        a = tl.load(p_x + begin, mask=there, other=0.0)
        b = tl.load(p_x + begin + elements, mask=there, other=0.0)
        c = tl.load(p_dy + begin, mask=there, other=0.0)
        d = tl.load(p_dy + begin + elements, mask=there, other=0.0)
        re += a * c + b * d
        im += a * d - b * c
    tl.store(p_found + own * 2 * elements + place, re, mask=there)
    tl.store(p_found + (own * 2 + 1) * elements + place, im, mask=there)
