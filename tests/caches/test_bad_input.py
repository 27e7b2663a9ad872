"""What no cache can use: the error names the argument, what came and what is needed; nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import foveal as fv
from foveal import errors
from foveal.caches import (
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
from foveal.caches.policies import ARKV, AVL, KVMerger, Mustafar, PagedEviction, SnapKV

SHAPE = KVShape(2, 2, 4, dtype=torch.float32)
X = torch.randn(2, 3, 2, 4)
SOME: Any = [1]  # in the place of a value of another type


def _given(bad: Any) -> Any:
    """Something else, where None means that nothing is given."""
    return "a" if bad is None else bad


def paged(**options: Any) -> Paged:
    cache = Paged(SHAPE, pages=8, page_size=4, **options)
    cache.append(X, X)
    return cache


def offloaded() -> Offloaded:
    cache = Offloaded(SHAPE, max_tokens=8, slots=1, page_size=2, recent=1)
    cache.append(X, X)
    return cache


BUILT: list[tuple[str, type[Exception], Callable[[Any], object]]] = [
    ("pages", errors.CacheError, lambda bad: Paged(SHAPE, pages=bad)),
    ("page_size", errors.CacheError, lambda bad: Paged(SHAPE, pages=2, page_size=bad)),
    ("max_tokens", errors.CacheError, lambda bad: Paged(SHAPE, pages=2, max_tokens=_given(bad))),
    ("shape", errors.CacheError, lambda bad: Paged(bad, pages=2)),
    ("shape", errors.CacheError, lambda bad: Contiguous(bad, max_tokens=2)),
    ("max_tokens", errors.CacheError, lambda bad: Contiguous(SHAPE, max_tokens=bad)),
    ("shape", errors.CacheError, lambda bad: VirtualContiguous(bad, max_tokens=2)),
    ("max_tokens", errors.CacheError, lambda bad: VirtualContiguous(SHAPE, max_tokens=bad)),
    ("ahead", errors.CacheError, lambda bad: VirtualContiguous(SHAPE, max_tokens=2, ahead=bad)),
    ("shape", errors.CacheError, lambda bad: Quantised(bad, pages=2)),
    ("bits", errors.CacheError, lambda bad: Quantised(SHAPE, pages=2, bits=bad)),
    ("shape", errors.CacheError, lambda bad: Pruned(bad, pages=2)),
    ("sparsity", errors.CacheError, lambda bad: Pruned(SHAPE, pages=2, sparsity=bad)),
    ("group", errors.CacheError, lambda bad: Pruned(SHAPE, pages=2, group=bad)),
    ("recent", errors.CacheError, lambda bad: Pruned(SHAPE, pages=2, recent=bad)),
    ("key_basis", errors.DtypeError, lambda bad: LowRank(SHAPE, bad, X, pages=2)),
    ("value_basis", errors.DtypeError, lambda bad: LowRank(SHAPE, X, bad, pages=2)),
    ("latent_dim", errors.CacheError, lambda bad: Latent(2, bad, 4, pages=2)),
    ("rope_dim", errors.CacheError, lambda bad: Latent(2, 4, bad, pages=2)),
    ("shape", errors.CacheError, lambda bad: Offloaded(bad, max_tokens=2, slots=1)),
    ("max_tokens", errors.CacheError, lambda bad: Offloaded(SHAPE, max_tokens=bad, slots=1)),
    ("slots", errors.CacheError, lambda bad: Offloaded(SHAPE, max_tokens=2, slots=bad)),
    ("members", errors.CacheError, lambda bad: Joined(bad)),
    ("members", errors.CacheError, lambda bad: Joined([bad])),
    ("prefix", errors.CacheError, lambda bad: Shared(bad, paged())),
    ("suffix", errors.CacheError, lambda bad: Shared(paged(), bad)),
    ("dtype", errors.DtypeError, lambda bad: KVShape(2, 2, 4, dtype=bad)),
    ("budget", errors.SelectionError, lambda bad: SnapKV(budget=bad)),
    ("window", errors.SelectionError, lambda bad: SnapKV(window=bad)),
    ("pool", errors.SelectionError, lambda bad: ARKV(pool=bad)),
    ("page_size", errors.SelectionError, lambda bad: PagedEviction(page_size=bad)),
    ("heavy", errors.SelectionError, lambda bad: KVMerger(heavy=bad)),
    ("sparsity", errors.SelectionError, lambda bad: Mustafar(sparsity=_given(bad))),
    ("period", errors.SelectionError, lambda bad: AVL(period=bad)),
]


@pytest.mark.parametrize("bad", ["a", None, SOME], ids=repr)
@pytest.mark.parametrize(("name", "error", "build"), BUILT)
def test_a_cache_or_policy_that_cannot_be(
    name: str, error: type[Exception], build: Callable[[Any], object], bad: Any
) -> None:
    with pytest.raises(error, match=rf"^{name}: got .*needed"):
        build(bad)


ASKED: list[tuple[str, type[Exception], Callable[[Paged, Any], object]]] = [
    ("k", errors.DtypeError, lambda cache, bad: cache.append(bad, X)),
    ("v", errors.DtypeError, lambda cache, bad: cache.append(X, bad)),
    ("counts", errors.CacheError, lambda cache, bad: cache.append(X, X, counts=_given(bad))),
    ("bias", errors.DtypeError, lambda cache, bad: cache.append(X, X, bias=_given(bad))),
    ("indices", errors.DtypeError, lambda cache, bad: cache.keep(bad)),
    ("indices", errors.DtypeError, lambda cache, bad: cache.rewrite(bad, X, X)),
    ("seen", errors.CacheError, lambda cache, bad: cache.crop(bad)),
    ("targets", errors.CacheError, lambda cache, bad: cache.fork(0, bad)),
    ("source", errors.CacheError, lambda cache, bad: cache.fork(bad, [1])),
    ("index", errors.CacheError, lambda cache, bad: cache.reorder(bad)),
    ("tokens", errors.CacheError, lambda cache, bad: cache.reserve(bad)),
    ("tokens", errors.CacheError, lambda cache, bad: cache.prepare(bad)),
    ("tokens", errors.CacheError, lambda cache, bad: cache.drop_first(bad)),
    ("window", errors.CacheError, lambda cache, bad: cache.trim(bad)),
]


@pytest.mark.parametrize("bad", ["a", None, 1.5, ["b", 1]], ids=repr)
@pytest.mark.parametrize(("name", "error", "ask"), ASKED)
def test_what_cannot_be_done_changes_nothing(
    name: str, error: type[Exception], ask: Callable[[Paged, Any], object], bad: Any
) -> None:
    cache = paged(biased=True)
    before, free = [x.clone() for x in cache.dense()], cache.free_pages
    with pytest.raises(error, match=rf"^{name}: got .*needed"):
        ask(cache, bad)
    assert all(map(torch.equal, cache.dense(), before))
    assert (cache.host_lengths, cache.host_seen, cache.free_pages) == ([[3], [3]], [3, 3], free)


@pytest.mark.parametrize("cache", [paged(), offloaded()], ids=["paged", "offloaded"])
def test_rows_of_another_dtype(cache: Paged | Offloaded) -> None:
    for name, k, v in (("k", X.double(), X.double()), ("k", X.half(), X), ("v", X, X.bfloat16())):
        with pytest.raises(errors.DtypeError, match=rf"^{name}: got torch.*float32, is needed"):
            cache.append(k, v)
    assert cache.host_seen == [3, 3]


def test_numbers_out_of_range() -> None:
    cache, far = paged(), offloaded()
    for ask, name in (
        (lambda: cache.append(X, X, counts=[1.5, 2]), "counts"),  # type: ignore[list-item]
        (lambda: cache.append(X, X, counts=[4, 2]), "counts"),
        (lambda: cache.crop([1]), "seen"),
        (lambda: cache.crop(-1), "seen"),
        (lambda: cache.free([2]), "sequences"),
        (lambda: cache.free([0.5]), "sequences"),  # type: ignore[list-item]
        (lambda: cache.fork(7, [1]), "sequences"),
        (lambda: cache.reserve([-1, 1]), "tokens"),
        (lambda: cache.reserve([1]), "tokens"),
        (lambda: cache.prepare(-1), "tokens"),
        (lambda: cache.keep(torch.zeros(2, 1, 1, device="meta", dtype=torch.int64)), "indices"),
        (lambda: cache.keep(torch.zeros(2, 1, 1)), "indices"),
        (lambda: cache.keep(torch.tensor([[[1, 0]], [[0, 1]]])), "indices"),
        (lambda: cache.keep(torch.tensor([[[0, 0]], [[0, 1]]])), "indices"),
        (lambda: cache.keep(torch.tensor([[[-1, 0]], [[0, 1]]])), "indices"),
        (lambda: far.select(torch.zeros(2, 1, 1)), "pages"),
        (lambda: far.crop(-1), "seen"),
        (lambda: far.crop([1]), "seen"),
        (lambda: far.reorder([0]), "index"),
        (lambda: far.grow(0), "max_tokens"),
        (lambda: SnapKV(window=0), "window"),
        (lambda: SnapKV(pool=4), "pool"),
        (lambda: KVShape(2, 2, 4, device="a"), "device"),
    ):
        with pytest.raises(errors.FovealError, match=rf"^{name}: got"):
            ask()
    assert cache.host_seen == far.host_seen == [3, 3]


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("elsewhere")
def test_a_default_device_that_is_another() -> None:
    """A cache lies where its shape says."""
    shape = KVShape(2, 2, 4, dtype=torch.float32)
    k = torch.ones(2, 5, 2, 4, device="cpu")
    for cache in (
        Paged(shape, pages=8, page_size=4, per_head=True),
        Contiguous(shape, max_tokens=9),
        VirtualContiguous(shape, max_tokens=9),
        Quantised(shape, pages=8, bits="int4"),
        Pruned(shape, pages=8),
        Offloaded(shape, max_tokens=8, slots=2, page_size=2, recent=1),
    ):
        cache.append(k, k, counts=[5, 3])
        if isinstance(cache, Offloaded):
            cache.select(torch.tensor([[[1]], [[0]]], device="cpu"))
        assert cache.dense()[0].device.type == "cpu"
        assert bool(fv.decode(k[:, :1], cache).isfinite().all())
        if isinstance(cache, Paged | Offloaded):
            cache.reorder([1, 0])
            cache.crop([2, 2])
        cache.free([0])
        assert cache.host_seen[0] == 0
