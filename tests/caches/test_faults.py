"""Every store: what fails on the way, or finds no room, leaves it as it was, and it can go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.caches import (
    Cache,
    Contiguous,
    Joined,
    KVShape,
    Latent,
    LowRank,
    Offloaded,
    Paged,
    Pruned,
    Quantised,
    Shared,
    VirtualContiguous,
)

B, HKV, D = 2, 2, 16
SHAPE = KVShape(B, HKV, D, dtype=torch.float32)


def low_rank() -> Cache:
    basis = torch.linalg.qr(torch.randn(HKV, D, D, generator=torch.Generator().manual_seed(1)))[0]
    return LowRank(SHAPE, basis, basis, pages=6, page_size=4)


def shared() -> Cache:
    prefix = Paged(KVShape(1, HKV, D, dtype=torch.float32), pages=2, page_size=4)
    x = torch.randn(1, 5, HKV, D, generator=torch.Generator().manual_seed(1))
    prefix.append(x, x)
    return Shared(prefix, Paged(SHAPE, pages=6, page_size=4))


# Room for 12 units of tokens of each of two sequences, or a few more tokens.
STORES: dict[str, Callable[[], Cache]] = {
    "paged": lambda: Paged(SHAPE, pages=6, page_size=4),
    "per head": lambda: Paged(SHAPE, pages=12, page_size=4, per_head=True),
    "contiguous": lambda: Contiguous(SHAPE, max_tokens=12),
    "virtual": lambda: VirtualContiguous(SHAPE, max_tokens=12),
    "fp8": lambda: Quantised(SHAPE, pages=6, page_size=4, bits="fp8"),
    "int4": lambda: Quantised(SHAPE, pages=6, page_size=4, bits="int4"),
    "pruned": lambda: Pruned(SHAPE, sparsity=0.5, pages=4, group=64, recent=16),
    "low rank": low_rank,
    "offloaded": lambda: Offloaded(SHAPE, max_tokens=8, slots=2, page_size=4, recent=4),
    "joined": lambda: Joined([Paged(SHAPE, pages=6), Paged(SHAPE, pages=6, page_size=4)]),
    "shared": shared,
}


UNIT = {name: 16 if name == "pruned" else 1 for name in STORES}  # which keeps groups of 64


def rows(source: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(B, length, HKV, D, generator=source) for _ in range(2))
    return k, v


def answer(cache: Cache) -> Tensor:
    """What a decode finds, and how many tokens there are."""
    if isinstance(cache, Offloaded):
        pages = [[*range(n), -1, -1][:2] for n in cache.host_pages]
        cache.select(torch.tensor(pages)[:, None])
    q = torch.ones(B, 1, 2 * HKV, D)
    o = fv.decode(q, cache, pattern=fv.Dense())
    return torch.cat([o.flatten(), cache.seen.flatten(), cache.lengths.flatten()])


@pytest.mark.parametrize("name", STORES)
def test_no_room_changes_nothing_and_it_goes_on_when_there_is(
    name: str, source: torch.Generator
) -> None:
    unit = UNIT[name]
    cache, (k, v) = STORES[name](), rows(source, 12 * unit)
    some, more = 10 * unit, 9 * unit
    cache.append(k[:, :some], v[:, :some])
    before, taken = answer(cache), cache.bytes()
    with pytest.raises((fv.errors.OutOfPagesError, fv.errors.CacheError), match=r"free|fit"):
        cache.append(*rows(source, more))
    assert torch.equal(answer(cache), before)
    assert cache.bytes() == taken
    cache.append(k[:, some:], v[:, some:])
    with pytest.raises((fv.errors.OutOfPagesError, fv.errors.CacheError)):
        cache.append(*rows(source, more))
    cache.free([0])
    cache.append(k[:, :more], v[:, :more], counts=(more, 0))
    fresh = STORES[name]()
    fresh.append(k, v, counts=(more, 12 * unit))
    torch.testing.assert_close(answer(cache), answer(fresh), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STORES)
def test_a_write_that_fails_can_be_made_again(
    name: str, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = 10 * UNIT[name]
    cache, (k, v) = STORES[name](), rows(source, some + 1)
    cache.append(k[:, :some], v[:, :some])
    before = answer(cache)

    class Stopped(BaseException):
        pass

    def fails(*_: object, **__: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        for kind in (Paged, Quantised, LowRank, VirtualContiguous):
            if "_write" in vars(kind):
                patch.setattr(kind, "_write", fails)
        with pytest.raises(Stopped):
            cache.append(k[:, some:], v[:, some:])
    assert torch.equal(answer(cache), before)
    cache.append(k[:, some:], v[:, some:])
    fresh = STORES[name]()
    fresh.append(k, v)
    torch.testing.assert_close(answer(cache), answer(fresh), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STORES)
def test_nan_in_one_sequence_stays_there(name: str, source: torch.Generator) -> None:
    k, v = rows(source, 12 * UNIT[name])
    found = []
    for bad in (False, True):
        cache = STORES[name]()
        keys, values = k.clone(), v.clone()
        if bad:
            keys[0, 3], values[0, 3] = torch.nan, torch.inf
        cache.append(keys, values)
        if isinstance(cache, Offloaded):
            cache.select(torch.tensor([0, 1]).expand(B, 1, -1))
        found.append(fv.decode(torch.ones(B, 1, 2 * HKV, D), cache))
    assert torch.equal(found[0][1], found[1][1])
    assert not bool(found[1][0].isfinite().all())
    assert bool(found[0].isfinite().all())


def test_a_latent_row_that_finds_no_room(source: torch.Generator) -> None:
    cache = Latent(B, 12, 4, pages=6, page_size=4, dtype=torch.float32)
    c, p = (torch.randn(B, 12, 1, dim, generator=source) for dim in (12, 4))
    cache.append(c, p)
    score, q = fv.Softmax(scale=0.3), torch.ones(B, 1, 4, 16)
    before = fv.decode(q, cache, score)
    with pytest.raises(fv.errors.OutOfPagesError, match="unchanged"):
        cache.append(c[:, :1], p[:, :1])
    assert torch.equal(fv.decode(q, cache, score), before)
    cache.free([1])
    cache.append(c[:, :5], p[:, :5], counts=(0, 5))
    assert cache.host_lengths == [[12], [5]]
