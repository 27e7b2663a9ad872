"""What every pattern promises, checked against its own definition `allows`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import FovealError
from foveal.patterns.base import FULL, SKIPPED, Extent, Pattern
from foveal.testing.bounds import check
from foveal.testing.inputs import Sizes, qkv

_IMPLEMENTATIONS = ("reference", "cpu")


def check_pattern(
    pattern: Pattern,
    extents: Sequence[Extent | tuple[int, ...] | int] = (),
    *,
    random_extents: int = 4,
    seed: int = 0,
) -> None:
    """Everything that the pattern says about itself agrees with `allows`, on each extent.

    Checked: `allows` itself (bool, any broadcasting, any subset of pairs), `key` and hash,
    `bounds`, `parts`, `tile_map`, `simplify` (and what the simplified pattern says),
    `allows_listed`, `offsets` within `reach`; then o, lse and the gradients of q, k and v of every
    implementation against a masked softmax in float64.
    Options: extents (a grid stands for queries and keys alike; an integer for a sequence);
    random_extents more are drawn from those that `pattern.validate` accepts, small ones, with
    Lq < Lk and Lq > Lk where it accepts that.
    Cost: a matrix [Lq, Lk] per extent, so keep them below a few thousand tokens.
    Raises AssertionError that names the promise and the first pair that breaks it.
    """
    source = torch.Generator().manual_seed(seed)
    chosen = [_extent(extent) for extent in extents]
    chosen += _random_extents(pattern, random_extents, source)
    if not chosen:
        raise AssertionError(f"{pattern!r}: no random extent fits; name some in `extents`")
    for extent in chosen:
        pattern.validate(extent)
        checked = _Checked(pattern, extent, source)
        for promise in _PROMISES:
            promise(checked)


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked softmax attention, written out and independent of the engines.

    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv], mask bool [Lq, Lk] or
    [B or 1, one of 1, Hkv, Hq, Lq, Lk]; returns o [B, Lq, Hq, Dv] and lse [B, Lq, Hq].
    """
    groups = q.shape[2] // k.shape[2]
    if mask.dim() == 4 and mask.shape[1] == k.shape[2]:
        mask = mask.repeat_interleave(groups, dim=1)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), dim=-1)
    lse = lse.masked_fill(empty.squeeze(-1), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse.transpose(1, 2)


@dataclass(frozen=True)
class _Checked:
    """One pattern on one extent."""

    pattern: Pattern
    extent: Extent
    source: torch.Generator

    @property
    def mask(self) -> Tensor:
        """bool [..., Lq, Lk], by the definition."""
        return self.pattern.allows(
            self.extent.q_positions()[:, None], self.extent.k_positions()[None], self.extent
        )

    def random(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, max(high, 1), shape, generator=self.source)

    def require(self, holds: bool, promise: str) -> None:
        if not holds:
            raise AssertionError(f"{self.pattern!r} on {self.extent}: {promise}")

    def require_equal(self, got: Tensor, mask: Tensor, promise: str) -> None:
        """Two masks [..., Lq, Lk] are equal."""
        wrong = torch.nonzero(got != mask)
        if len(wrong):
            *_, query, key = wrong[0].tolist()
            says = "sees" if bool(mask[tuple(wrong[0])]) else "does not see"
            raise AssertionError(
                f"{self.pattern!r} on {self.extent}: {promise}; {len(wrong)} pairs differ, "
                f"the first: by `allows`, query {query} {says} key {key}"
            )


def _extent(extent: Extent | tuple[int, ...] | int) -> Extent:
    if isinstance(extent, Extent):
        return extent
    grid = (extent,) if isinstance(extent, int) else extent
    return Extent(grid, grid)


def _random_extents(pattern: Pattern, wanted: int, source: torch.Generator) -> list[Extent]:
    found: list[Extent] = []
    for _ in range(50 * wanted):
        if len(found) == wanted:
            break
        extent = _random_extent(pattern.rank, source)
        try:
            pattern.validate(extent)
        except FovealError:
            continue
        found.append(extent)
    return found


def _random_extent(rank: int | None, source: torch.Generator) -> Extent:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=source))

    axes = rank or integer(1, 3)
    longest = {1: 60, 2: 13, 3: 6}[axes]
    grid = tuple(integer(1, longest) for _ in range(axes))
    if axes == 1 and integer(0, 1):
        return Extent((integer(1, longest),), grid)
    return Extent(grid, grid)


def _definition_is_pointwise(c: _Checked) -> None:
    mask = c.mask
    c.require(mask.dtype == torch.bool, "`allows` returns bool")
    c.require(mask.shape[-2:] == (c.extent.Lq, c.extent.Lk), "`allows` broadcasts its positions")
    rows, columns = c.random(c.extent.Lq, 50), c.random(c.extent.Lk, 50)
    pairs = c.pattern.allows(c.extent.q_positions()[rows], columns, c.extent)
    c.require(torch.equal(pairs, mask[..., rows, columns]), "`allows` judges each pair on its own")


def _key_is_a_name(c: _Checked) -> None:
    c.require(isinstance(c.pattern.key, str) and bool(c.pattern.key), "`key` is a written name")
    c.require(isinstance(hash(c.pattern), int), "a pattern is hashable")


def _bounds_are_the_set(c: _Checked) -> None:
    bounds = c.pattern.bounds(c.extent)
    if bounds is None:
        return
    at = bounds.extent
    c.require((at.Lq, at.Lk) == (c.extent.Lq, c.extent.Lk), "`bounds` keeps the number of tokens")
    for axis, (lo, hi) in enumerate(zip(bounds.lower, bounds.upper, strict=True)):
        length = at.kv_grid[axis]
        c.require(len(lo) == len(hi) == at.q_grid[axis], "`bounds` has one interval per query")
        c.require(bool((lo <= hi).all()), "lower <= upper in `bounds`")
        c.require(bool((lo >= 0).all() and (hi <= length).all()), "`bounds` stay on the axis")
        monotone = bool((lo.diff() >= 0).all() and (hi.diff() >= 0).all())
        c.require(monotone, "lower and upper never decrease in `bounds`")
    got = _box_mask(bounds.lower, bounds.upper, at.kv_grid)
    c.require_equal(got, c.mask, "`bounds` describe the pairs that `allows` allows")
    c.require(bounds.pairs == int(c.mask.sum()), "`bounds.pairs` counts the pairs")


def _box_mask(lower: Sequence[Tensor], upper: Sequence[Tensor], kv_grid: Sequence[int]) -> Tensor:
    total = torch.ones(1, 1, dtype=torch.bool)
    for lo, hi, length in zip(lower, upper, kv_grid, strict=True):
        place = torch.arange(length)
        axis = (place >= lo[:, None]) & (place < hi[:, None])
        total = (total[:, None, :, None] & axis[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return total


def _parts_are_the_set(c: _Checked) -> None:
    parts = c.pattern.parts(c.extent)
    if parts is None:
        return
    owners = torch.cat([part.q_tokens.flatten() for part in parts])
    c.require(
        torch.equal(owners.sort().values, torch.arange(c.extent.Lq)),
        "every query belongs to exactly one of `parts`",
    )
    got = torch.zeros(c.extent.Lq, c.extent.Lk, dtype=torch.int64)
    for part in parts:
        sizes = (part.extent.Lq, part.extent.Lk)
        c.require(
            (part.q_tokens.shape[1], part.k_tokens.shape[1]) == sizes,
            "the extent of a part fits its tokens",
        )
        inner = _set_of(part.pattern, part.extent).to(torch.int64)
        for q_tokens, k_tokens in zip(part.q_tokens, part.k_tokens, strict=True):
            got.index_put_((q_tokens[:, None], k_tokens[None]), inner, accumulate=True)
    c.require(bool((got <= 1).all()), "no query sees a key twice in `parts`")
    c.require_equal(got.bool(), c.mask, "`parts` hold the pairs that `allows` allows")


def _set_of(pattern: Pattern, extent: Extent) -> Tensor:
    """The mask of an inner pattern, which may be known by its bounds only."""
    bounds = pattern.bounds(extent)
    if bounds is not None:
        return _box_mask(bounds.lower, bounds.upper, bounds.extent.kv_grid)
    return pattern.allows(extent.q_positions()[:, None], extent.k_positions()[None], extent)


def _tile_map_never_lies(c: _Checked) -> None:
    mask = c.mask
    for q_tile, kv_tile in _tiles(c.pattern):
        states = c.pattern.tile_map(c.extent, q_tile, kv_tile)
        shape = (-(-c.extent.Lq // q_tile), -(-c.extent.Lk // kv_tile))
        c.require(states.shape[-2:] == shape, f"`tile_map` has {shape} tiles")
        c.require(states.dtype == torch.uint8, "`tile_map` returns uint8")
        spread = states.repeat_interleave(q_tile, dim=-2)[..., : c.extent.Lq, :]
        spread = spread.repeat_interleave(kv_tile, dim=-1)[..., : c.extent.Lk]
        skipped = (spread == SKIPPED).expand(mask.shape)
        tiles = f"tiles of {q_tile} x {kv_tile}"
        c.require_equal(mask & ~skipped, mask, f"no visible pair is in a skipped tile, {tiles}")
        full = (spread == FULL).expand(mask.shape)
        c.require_equal(mask | full, mask, f"no hidden pair is in a full tile, {tiles}")


def _tiles(pattern: Pattern) -> Iterator[tuple[int, int]]:
    unit = pattern.tile_unit()
    if unit is None:
        yield from ((1, 1), (5, 3), (16, 16), (64, 64))
    else:
        yield unit
        yield math.gcd(unit[0], 4), math.gcd(unit[1], 2)


def _simplify_keeps_the_set(c: _Checked) -> None:
    simple = c.pattern.simplify(c.extent)
    if simple is c.pattern:
        return
    q_pos, k_pos = c.extent.q_positions()[:, None], c.extent.k_positions()[None]
    got = simple.allows(q_pos, k_pos, c.extent)
    c.require_equal(got.expand(c.mask.shape), c.mask, f"`simplify` keeps the pairs ({simple!r})")
    simpler = _Checked(simple, c.extent, c.source)
    for promise in (_bounds_are_the_set, _parts_are_the_set, _tile_map_never_lies):
        promise(simpler)


def _listed_equals_allows(c: _Checked) -> None:
    mask = c.mask
    batch, heads = mask.shape[:-2] if mask.dim() == 4 else (2, 3)
    rows = c.random(c.extent.Lq, 7)
    columns = c.random(c.extent.Lk, batch, heads, 9)
    got = c.pattern.allows_listed(c.extent.q_positions()[rows], columns, c.extent)
    whole = mask.expand(batch, heads, -1, -1)[:, :, rows]
    expected = whole.gather(-1, columns[:, :, None].expand(batch, heads, 7, 9))
    c.require_equal(got.expand(expected.shape), expected, "`allows_listed` equals `allows`")


def _reach_covers_the_offsets(c: _Checked) -> None:
    pairs = c.mask if c.mask.dim() == 2 else c.mask.flatten(0, 1).any(0)
    rows, columns = torch.nonzero(pairs, as_tuple=True)
    offsets = c.pattern.offsets(c.extent.q_positions()[rows], columns, c.extent)
    reach = c.pattern.reach(c.extent)
    axes = len(c.extent.kv_grid)
    c.require(len(offsets) == len(reach) == axes, "`offsets` and `reach` speak of every axis")
    for axis, (offset, most) in enumerate(zip(offsets, reach, strict=True)):
        far = int(offset.abs().max()) if len(offset) else 0
        c.require(far <= most, f"axis {axis}: an offset of {far} lies beyond `reach`, {most}")


def _implementations_agree(c: _Checked) -> None:
    mask = c.mask
    batch, heads = mask.shape[:-2] if mask.dim() == 4 else (2, 2)
    sizes = Sizes(c.extent.q_grid, c.extent.kv_grid, batch, 2 * heads, heads, 4, 3)
    q, k, v = (x.requires_grad_() for x in qkv(sizes, c.source, torch.float64))
    do = torch.randn((*q.shape[:-1], 3), generator=c.source, dtype=torch.float64)
    dlse = torch.randn(q.shape[:-1], generator=c.source, dtype=torch.float64)
    flat_q, flat_k, flat_v = (x.flatten(1, -3) for x in (q, k, v))
    exact = _results(*definition(flat_q, flat_k, flat_v, mask), q, k, v, do, dlse)
    for implementation in _IMPLEMENTATIONS:
        found = attend(q, k, v, c.pattern, return_lse=True, implementation=implementation)
        got = _results(*found, q, k, v, do, dlse)
        for name, tensor in got.items():
            verdict = check(name, tensor, exact[name], exact[name])
            c.require(verdict.ok, f"implementation {implementation!r}: {verdict}")


def _results(o: Tensor, lse: Tensor, *tensors: Tensor) -> dict[str, Tensor]:
    """o, lse and the gradients of q, k, v for the weights do, dlse."""
    q, k, v, do, dlse = tensors
    weights = (do.reshape(o.shape), dlse.reshape(lse.shape))
    dq, dk, dv = torch.autograd.grad((o, lse), (q, k, v), weights)
    o, lse = o.detach().reshape(do.shape), lse.detach().reshape(dlse.shape)
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


_PROMISES: tuple[Callable[[_Checked], None], ...] = (
    _definition_is_pointwise,
    _key_is_a_name,
    _bounds_are_the_set,
    _parts_are_the_set,
    _tile_map_never_lies,
    _simplify_keeps_the_set,
    _listed_equals_allows,
    _reach_covers_the_offsets,
    _implementations_agree,
)
