"""Launches of the long convolution: how a transform is cut, tables of turns, spectra between launches."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from foveal.engines.common.early import starts_early
from foveal.engines.convolution.fourier import convolution_fourier_forward
from foveal.engines.convolution.launch_layout import swapped
from foveal.engines.convolution.spectra import convolution_spectra_backward

_WHOLE = 1024
"""Points that one program transforms, by twice 32."""
_INNER = 256
"""Points of the inner transforms of longer ones, up to its square; beyond, `_WHOLE`."""
_REGISTERS = 32
"""Largest transform in registers."""
_THREADS, _MANY = 256, 512
"""Threads of a program; where two times 32 points fill the registers, more of them read wider rows."""
_FEWEST = 16
_HELD = 1 << 27
"""Elements of spectra that the gradient of a filter holds at once."""


def points_of(length: int) -> int:
    """The power of two that a sequence is transformed as."""
    return max(1 << max(length - 1, 0).bit_length(), _FEWEST)


@dataclass(frozen=True)
class Cut:
    """Transforms in registers of `first`, then `second` points, of pieces of `size` of all points."""

    points: int
    size: int
    first: int
    second: int

    @property
    def step(self) -> int:
        return self.size // (self.first * self.second)

    @property
    def whole(self) -> bool:
        """Whether one program holds all points of its channels."""
        return self.points == self.first * self.second

    def tile(self, width: int, threads: int) -> tuple[int, int, int]:
        """Neighbouring tokens, channels and warps of a program: one value of a tuple for each thread."""
        rows = 1 if self.second == 1 else self.first
        channels = min(threads // rows, 32, 1 << max(width - 1, 0).bit_length())
        near = min(max(threads // (rows * channels), 1), self.step)
        return near, channels, max(min(rows * near * channels, threads) // 32, 1)


def cuts(points: int) -> tuple[Cut, ...]:
    """One launch there and back, or an outer transform and an inner one."""
    if points <= _WHOLE:
        return (Cut(points, points, *_factors(points)),)
    inner = _INNER if points <= _INNER**2 else _WHOLE
    outer = points // inner
    factors = (outer, 1) if outer <= _REGISTERS else _factors(outer)
    return Cut(points, points, *factors), Cut(points, inner, *_factors(inner))


def _factors(points: int) -> tuple[int, int]:
    bits = points.bit_length() - 1
    return 1 << (bits + 1) // 2, 1 << bits // 2


@functools.lru_cache(maxsize=64)
def _turns(size: int, parts: int, quarter: bool, device: torch.device) -> Tensor:
    """[2, 4 + parts / 4, size / parts]: cosine and sine of 2 pi p k / size for p < size / parts.

    k = 0, 1, 2, 3, with 1/4 more if `quarter`, and behind them the multiples of 4 below `parts`.
    """
    near = torch.arange(4, dtype=torch.float64) + (0.25 if quarter else 0.0)
    k = torch.cat([near, torch.arange(0, parts, 4, dtype=torch.float64)])
    angle = 2 * math.pi / size * k[:, None] * torch.arange(size // parts, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()]).float().to(device)


@dataclass(frozen=True)
class Ends:
    """What a transform reads from the grid and writes to it, all [B, length, C] and contiguous."""

    x: Tensor | None = None
    pre: Tensor | None = None
    y: Tensor | None = None
    post: Tensor | None = None
    plain: Tensor | None = None
    skip: Tensor | None = None


def spectrum_of(x: Tensor, pre: Tensor | None, points: int, early: bool = False) -> Tensor:
    """[B, 2, points, C], the transform of pre x [B, length, C] in digit-reversed order.

    `early`: the next launch starts before it is there, and waits for it.
    """
    z = x.new_empty(len(x), 2, points, x.shape[-1], dtype=torch.float32)
    for cut in cuts(points):
        ends = Ends(x, pre) if cut.size == points else Ends()
        _launch(cut, z, ends, forward=True, early=early)
    return z


def launch_convolution(ends: Ends, filter: Tensor) -> Tensor:
    """`launch_filtered` by a filter [S, C, taps]; returns its spectrum [S, 2, points, C]."""
    assert ends.x is not None
    points = points_of(ends.x.shape[1])
    # a launch waits for the one in front of it alone, which has to make the whole spectrum
    early = points <= _WHOLE and starts_early(filter.device)
    spectrum = spectrum_of(swapped(filter), None, points, early)
    launch_filtered(ends, spectrum, early=early)
    return spectrum


def launch_filtered(
    ends: Ends, spectrum: Tensor, conjugate: bool = False, early: bool = False
) -> None:
    """Writes y = post (filter * (pre x)) + skip x, and without gate and skip to plain where it is given.

    `early`: the launch in front makes the spectrum and nothing else that is read here.
    """
    x = ends.x
    assert x is not None
    outer, *inner = cuts(spectrum.shape[2])
    if not inner:
        _launch(outer, None, ends, spectrum, conjugate, forward=True, inverse=True, early=early)
        return
    z = x.new_empty(len(x), *spectrum.shape[1:], dtype=torch.float32)
    _launch(outer, z, Ends(x, ends.pre), forward=True)
    _launch(inner[0], z, Ends(), spectrum, conjugate, forward=True, inverse=True)
    own = x if ends.skip is not None else None
    back = Ends(own, None, ends.y, ends.post, ends.plain, ends.skip)
    _launch(outer, z, back, inverse=True)


def filter_gradient(
    x: Tensor, pre: Tensor | None, dy: Tensor, post: Tensor | None, count: int, each: bool
) -> Tensor:
    """[1 or B, C, count] in float32: for each tap, what it met times dy, over all samples unless `each`."""
    batch, length, width = x.shape
    points = points_of(length)
    elements = points * width
    part = max(_HELD // (4 * elements), 1)
    found: list[Tensor] = []
    for start in range(0, batch, part):
        rows = slice(start, start + part)
        seen, wanted = (
            spectrum_of(t[rows], None if gate is None else gate[rows], points)
            for t, gate in ((x, pre), (dy, post))
        )
        samples = 1 if each else len(seen)
        product = seen.new_empty(len(seen) // samples, *seen.shape[1:])
        convolution_spectra_backward[(triton.cdiv(elements, 1024), len(product))](
            seen, wanted, product, samples, elements,
            BLOCK=1024, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        if each or not found:
            found.append(product)
        else:
            found[0] += product
    z = torch.cat(found) if len(found) > 1 else found[0]
    taps = z.new_empty(len(z), count, width)
    for cut in reversed(cuts(points)):
        _launch(cut, z, Ends(y=taps) if cut.size == points else Ends(), inverse=True)
    return swapped(taps)


def _launch(
    cut: Cut, z: Tensor | None, ends: Ends, spectrum: Tensor | None = None,
    conjugate: bool = False, *, forward: bool = False, inverse: bool = False, early: bool = False,
) -> None:  # fmt: skip
    grid = ends.x if ends.y is None else ends.y
    like = z if grid is None else grid
    assert like is not None
    batch, width = len(like), like.shape[-1]
    waits = early and spectrum is not None
    # one filter is few programs, and the launch behind waits for the last: smaller ones are more
    few = early and not waits and batch == 1
    wide = cut.first == _REGISTERS and cut.second > 1 and forward and not few
    fits = _exchanged(cut, width, _MANY) <= _room(like.device)
    threads = _MANY if wide and fits else _THREADS
    near, channels, warps = cut.tile(width, threads)
    programs = triton.cdiv(width, channels) * (cut.step // near) * (cut.points // cut.size) * batch
    each = 0 if spectrum is None or len(spectrum) == 1 else spectrum.stride(0)
    convolution_fourier_forward[(programs,)](
        ends.x, ends.pre, z, spectrum, ends.skip, ends.post, ends.plain, ends.y,
        _turns(cut.size, cut.first, cut.size == cut.points, like.device),
        _turns(cut.size // cut.first, cut.second, False, like.device),
        0 if grid is None else grid.shape[1],
        WIDTH=width, EACH=each, POINTS=cut.points, SIZE=cut.size, FIRST=cut.first,
        SECOND=cut.second, NEAR=near, CHANNELS=channels, WARP=_warp(like.device),
        FORWARD=forward, INVERSE=inverse, CONJUGATE=conjugate,
        FROM_GRID=forward and ends.x is not None, TO_GRID=ends.y is not None,
        COPIED=forward and _copies(cut, channels, ends.post), EARLY=early,
        num_warps=warps, enable_fp_fusion=True,
        # the launch that makes the spectrum is an ordinary one: when it runs, all that this one reads before
        # it waits has been written, also where `swapped` launches nothing in front of it
        **({"launch_pdl": True} if waits else {}),
    )  # fmt: skip


def _exchanged(cut: Cut, width: int, threads: int) -> int:
    """Bytes of shared memory through which a program exchanges both halves of its values."""
    near, channels, _ = cut.tile(width, threads)
    return 2 * 4 * cut.first * cut.second * near * channels


def _copies(cut: Cut, channels: int, gate: Tensor | None) -> bool:
    """Whether a gate is copied to shared memory: by 16 bytes, and beside both halves of an exchange.

    1,024 points need 192 KB: an H100 and a B200 have them, an A100 does not.
    """
    if gate is None or not cut.whole or gate.dtype != torch.float32 or gate.shape[-1] % 4:
        return False
    return 3 * 4 * cut.points * channels <= _copy_room(gate.device)


@functools.lru_cache(maxsize=8)
def _copy_room(device: torch.device) -> int:
    """Bytes of shared memory of a program that copies to it (compute capability 8.0), none elsewhere."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    if torch.cuda.get_device_capability(device) < (8, 0):
        return 0
    return _room(device)


@functools.lru_cache(maxsize=8)
def _room(device: torch.device) -> int:
    """Bytes of shared memory of a program; the interpreter has any number."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) or 64 << 10


def _warp(device: torch.device) -> int:
    """Threads of a warp."""
    if device.type != "cuda":
        return 32
    return int(torch.cuda.get_device_properties(device).warp_size)
