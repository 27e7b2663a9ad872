"""Chunks of a few tokens at a time on a CPU, in buffers that stay in the caches.

Gates of a chunk are taken from its middle: with G_i their running sum and m that of the middle token, the
decay from token j to token i is exp(G_i - m) exp(m - G_j), so that one product of matrices has all pairs.
Every operation takes all chunks and heads of a segment and all threads: threads of Python's own would wait
for each other between operations as short as these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal._kept import kept
from foveal.engines.tile.workers import Scratch

CHUNK = 64
LONG = 256
"""Tokens per sequence from which this pays."""
REACH = 16.0
"""Decay of a chunk, in its logarithm, that one factor may undo: it costs 3 of float32's 24 bits."""
FEW = 4
"""Chunks that are not divided further to keep those that decay too steeply apart."""
_SEGMENT = 2**18
"""Elements of the keys that are worked on at a time."""


def segments(length: int, width: int, size: int = CHUNK) -> list[slice]:
    """Tokens that are worked on at a time, whole chunks of `size`; `width` elements of the keys per token."""
    tokens = max(_SEGMENT // width // size, 1) * size
    return [slice(first, min(first + tokens, length)) for first in range(0, length, tokens)]


def halved(rows: slice, size: int = CHUNK) -> tuple[slice, ...]:
    """The tokens in two parts of whole chunks; alone where they are few."""
    chunks = -(-(rows.stop - rows.start) // size)
    if chunks <= FEW:
        return (rows,)
    middle = rows.start + chunks // 2 * size
    return slice(rows.start, middle), slice(middle, rows.stop)


def chunks_of(rows: slice, size: int = CHUNK) -> slice:
    return slice(rows.start // size, -(-rows.stop // size))


class Factors(NamedTuple):
    """exp(G - m) and exp(m - G) [chunks, h, C, 1 or Dk], and of each chunk [chunks, h, 1 or Dk, 1] exp(m),
    exp(G_C - m) and exp(G_C - m + m'), m' of the next chunk."""

    near: Tensor
    far: Tensor
    first: Tensor
    last: Tensor
    joined: Tensor

    def part(self, chunks: slice) -> Factors:
        return Factors(*(x[chunks] for x in self))

    def ratio(self) -> Tensor:
        """What each chunk multiplies the state by, with m' = 0 behind the last."""
        return torch.cat([self.joined[:-1], self.last[-1:]])


def _factors(near: Tensor, far: Tensor, middle: Tensor, after: Tensor) -> Factors:
    """Of m and G_C - m [chunks, h, 1 or Dk]; float64 where a fixed decay has the same rounding everywhere."""
    joined = after.clone()
    joined[:-1] += middle[1:]
    of_chunks = (x.exp().to(near.dtype).unsqueeze(-1) for x in (middle, after, joined))
    return Factors(near, far, *of_chunks)


def factors_of_tokens(
    log_decay: Tensor, length: int, dtype: torch.dtype, size: int = CHUNK
) -> tuple[Factors, list[bool]]:
    """The factors of log_decay [h] or [L, h], and which chunks decay too steeply for them."""
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(length, -1)
    sums = numbers(log_decay, torch.float64, size) @ lower_ones(size, torch.float64).mT
    least, most = sums.flatten(1).aminmax(dim=1)
    steep = ~((least >= -REACH) & (most <= REACH))
    middle = sums[..., size // 2, None]
    near = (sums - middle).exp_()[..., None]
    far = near.reciprocal().to(dtype)
    return _factors(near.to(dtype), far, middle, sums[..., -1:] - middle), steep.tolist()


def factors_of_channels(log_decay: Tensor, buffers: Buffers) -> Factors | None:
    """The factors of log_decay [L, h, Dk]; None where it is too steep."""
    gates = buffers.filled("far", log_decay)
    sums = torch.cumsum(gates, dim=2, out=buffers.take("near", *gates.shape[2:]))
    least, most = torch.aminmax(sums)
    if not (float(least) >= -REACH and float(most) <= REACH):
        return None
    middle, whole = sums[:, :, CHUNK // 2].clone(), sums[:, :, -1].clone()
    near = sums.sub_(middle.unsqueeze(2)).exp_()
    return _factors(near, torch.reciprocal(near, out=gates), middle, whole.sub_(middle))


def numbers(x: Tensor, dtype: torch.dtype, size: int = CHUNK) -> Tensor:
    """[chunks, h, C] of x [L, h], zeros behind the last token."""
    length, heads = x.shape
    found = torch.zeros(heads, -(-length // size) * size, dtype=dtype)
    found[:, :length] = x.mT
    chunks: Tensor = found.unflatten(1, (-1, size)).transpose(0, 1).contiguous()
    return chunks


class Buffers:
    """Memory for the chunks of segments of one length, [chunks, h, C, D], with zeros behind the last token.

    What is asked for again, memory and its views, is handed out again: making views takes as long as work on
    a few chunks.
    """

    def __init__(
        self, length: int, heads: int, dtype: torch.dtype, scratch: Scratch, size: int = CHUNK
    ) -> None:
        self._scratch, self._dtype, self._heads, self._size = scratch, dtype, heads, size
        self._whole, self._rest = divmod(length, size)
        self.chunks = self._whole + (self._rest > 0)
        self._taken: dict[tuple[str | int, ...], Tensor] = {}
        self._views: dict[tuple[str, int], tuple[Tensor, Any]] = {}

    def take(self, name: str, *shape: int, more: int = 0) -> Tensor:
        """[chunks + more, h, *shape], with anything inside; shares its memory with all of that name."""
        key: tuple[str | int, ...] = (name, more, *shape)
        if key not in self._taken:
            whole = (self.chunks + more, self._heads, *shape)
            self._taken[key] = self._scratch.take(name, whole, self._dtype)
        return self._taken[key]

    def flat(self, x: Tensor) -> Tensor:
        """[chunks h, ., .] of what was taken."""
        flat: Tensor = self._seen("flat", x, lambda x: x.flatten(0, 1))
        return flat

    def turned(self, x: Tensor) -> Tensor:
        """The transposes of `flat`."""
        turned: Tensor = self._seen("turned", x, lambda x: x.flatten(0, 1).mT)
        return turned

    def steps(self, x: Tensor) -> tuple[Tensor, ...]:
        """[h, ., .] of each chunk of what was taken."""
        steps: tuple[Tensor, ...] = self._seen("steps", x, lambda x: x.unbind())
        return steps

    def turned_steps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The transposes of `steps`."""
        steps: tuple[Tensor, ...] = self._seen("turned steps", x, lambda x: x.mT.unbind())
        return steps

    def _seen(self, kind: str, x: Tensor, make: Callable[[Tensor], Any]) -> Any:
        seen = self._views.get((kind, id(x)))
        if seen is None:
            seen = self._views[kind, id(x)] = x, make(x)
        return seen[1]

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """a b of [chunks h, ., .], into `out` [chunks, h, ., .]."""
        torch.bmm(a, b, out=self.flat(out))
        return out

    def inverse(self, lower: Tensor) -> Tensor:
        """(I + A)^-1 [chunks, h, CHUNK, CHUNK], A what `lower` has below the diagonal.

        LAPACK takes one matrix after the other, products all at once: it is left with small corners.
        """
        at: _Corners = self._seen("corners", lower, self._corners)
        at.corners.copy_(at.given)
        torch.linalg.solve_triangular(
            at.corners.mT, at.ones.mT, upper=True, left=False, unitriangular=True, out=at.solved.mT
        )
        at.below.copy_(at.given_below)
        at.found.zero_()
        at.found_corners.copy_(at.solved)
        for join in at.joins:
            torch.bmm(join.last, join.below, out=join.product)
            torch.bmm(join.product, join.first, out=join.other_product)
            torch.neg(join.found_product, out=join.found)
        return at.found

    def _corners(self, lower: Tensor) -> _Corners:
        corner, half = CHUNK // 4, CHUNK // 2
        flat = lower.flatten(0, 1)
        found = self.take("inverse", CHUNK, CHUNK)
        flat_found = found.flatten(0, 1)
        corners, solved = (
            self.take(name, 4, corner, corner).flatten(0, 1) for name in ("corners", "solved")
        )
        ones = torch.eye(corner, dtype=lower.dtype).expand_as(corners)
        below = self.take("below", 2, corner, corner).flatten(0, 1)
        first, last = solved.view(-1, 2, corner, corner).unbind(1)
        in_quarters = _diagonal(flat_found, half)[:, :, corner:, :corner]
        joins = (
            self._join(first, below.flatten(0, 1), last, in_quarters),
            self._join(
                flat_found[:, :half, :half], flat[:, half:, :half], flat_found[:, half:, half:],
                flat_found[:, half:, :half],
            ),
        )  # fmt: skip
        return _Corners(
            _diagonal(flat, corner), corners, ones, solved, _diagonal(flat, half)[:, :, corner:, :corner],
            below, found, _diagonal(flat_found, corner), joins,
        )  # fmt: skip

    def _join(self, first: Tensor, below: Tensor, last: Tensor, found: Tensor) -> _Join:
        each, size = len(below) // (self.chunks * self._heads), below.shape[-1]
        product, other = self.take(f"products {size}", 2 * each, size, size).view(2, -1, size, size)
        return _Join(first, below, last, product, other, other.view(found.shape), found)

    def filled(self, name: str, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """[chunks, h, C, D] of x [L, h, D], times a factor of chunks."""
        return self.fill(self.take(name, self._size, x.shape[-1]), x, factor)

    def fill(self, found: Tensor, x: Tensor, factor: Tensor | None) -> Tensor:
        for own, tokens in self._halves(found, x):
            if factor is None:
                own.copy_(tokens)
            else:
                torch.mul(tokens, self._like(own, factor), out=own)
        if self._rest:
            found[self._whole, :, self._rest :] = 0
        return found

    def empty_into(self, x: Tensor, found: Tensor, factor: Tensor | None = None) -> None:
        """Writes chunks [chunks, h, C, D], times a factor of chunks, to tokens [L, h, D]."""
        for own, tokens in self._halves(found, x):
            if factor is None:
                tokens.copy_(own)
            else:
                torch.mul(own, self._like(own, factor), out=tokens)

    def _halves(self, chunks: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of the same tokens in chunks [n, h, C, D] and in x [L, h, D]: whole chunks, and the last."""
        split = self._whole * self._size
        if not self._rest:
            return [(chunks, x.unflatten(0, (self._whole, self._size)).transpose(1, 2))]
        found = [(chunks[self._whole :, :, : self._rest], x[split:].transpose(0, 1)[None])]
        if self._whole:
            tokens = x[:split].unflatten(0, (self._whole, self._size)).transpose(1, 2)
            found.append((chunks[: self._whole], tokens))
        return found

    def _like(self, own: Tensor, factor: Tensor) -> Tensor:
        if not self._rest:
            return factor
        whole = len(own) == self._whole and own.shape[2] == self._size
        return factor[: self._whole] if whole else factor[self._whole :, :, : self._rest]


class _Join(NamedTuple):
    """Views for `Buffers.inverse`: -(last below first) goes to `found`."""

    first: Tensor
    below: Tensor
    last: Tensor
    product: Tensor
    other_product: Tensor
    found_product: Tensor
    found: Tensor


class _Corners(NamedTuple):
    """Views for `Buffers.inverse`: the four corners on the diagonal of each matrix [n, 4, C / 4, C / 4],
    what lies below them [n, 2, C / 4, C / 4], and how corners are joined, then halves."""

    given: Tensor
    corners: Tensor
    ones: Tensor
    solved: Tensor
    given_below: Tensor
    below: Tensor
    found: Tensor
    found_corners: Tensor
    joins: tuple[_Join, _Join]


def _diagonal(x: Tensor, size: int) -> Tensor:
    """The parts on the diagonal of x [n, C, C], [n, C / size, size, size]."""
    parts: Tensor = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return parts.diagonal(dim1=1, dim2=3).movedim(-1, 1)


@kept(8)
def lower_ones(size: int, dtype: torch.dtype) -> Tensor:
    """Ones at i >= j."""
    return torch.ones(size, size, dtype=dtype).tril_()
