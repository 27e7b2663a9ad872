"""Caches whose old keys lie on the host: a step reads what its system reads, and fetches little."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.caches import KVShape, Offloaded
from foveal.compose import LouisCache, NosaCache, RetrievalCache
from foveal.layers.trainable_sparse_gates import nosa

B, HQ, HKV, D, DV = 2, 4, 2, 8, 6
SHAPE = KVShape(B, HKV, D, DV, dtype=torch.float64)
NAMES = ("retrieval_attention", "louis_kv", "nosa")
NOSA = {"block": 4, "window": 4, "stride": 2, "local_blocks": 2}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def drawn(source: torch.Generator, length: int) -> Inputs:
    """q, k, v and log-weights, which a cache keeps in float32."""
    sizes = (HQ, D), (HKV, D), (HKV, DV), (HKV,)
    q, k, v, c = (torch.randn(B, length, *x, generator=source, dtype=torch.float64) for x in sizes)
    return q, k, v, c.float().double()


def made(name: str, tokens: int, most: int = 80) -> Offloaded:
    """A cache that fetches up to `tokens` tokens for every query head beside those near it."""
    if name == "retrieval_attention":
        return RetrievalCache(SHAPE, q_heads=HQ, max_tokens=most, keys=tokens, sinks=3, window=5)
    if name == "louis_kv":
        options: dict[str, Any] = {"alike": 0.2, "page": 4, "window": 6}
        return LouisCache(SHAPE, max_tokens=most, pages=tokens // 4, **options)
    return NosaCache(SHAPE, max_tokens=most, budget=tokens // 4 + 2, by_query=4, **NOSA)


def definition(name: str, tokens: int) -> Callable[..., Tensor]:
    """The system of the catalogue with the same numbers, on (q, k, v, c)."""
    if name == "retrieval_attention":
        own = {"keys": tokens, "sinks": 3, "window": 5}
        return lambda q, k, v, c: fv.system(name).op(q, k, v, **own)
    if name == "louis_kv":
        own = {"alike": 0.2, "pages": tokens // 4, "page": 4, "window": 6}
        return lambda q, k, v, c: fv.system(name).op(q, k, v, **own)
    return lambda q, k, v, c: nosa(q, k, v, c, budget=tokens // 4 + 2, by_query=4, **NOSA)


def stored(cache: Offloaded, inputs: Inputs, start: int, stop: int, **options: Any) -> None:
    k, v, c = (x[:, start:stop] for x in inputs[1:])
    cache.append(k, v, bias=c if isinstance(cache, NosaCache) else None, **options)


def steps(cache: Any, inputs: Inputs, start: int) -> Tensor:
    """What the tokens from `start` on see, one by one."""
    stored(cache, inputs, 0, start)
    found = []
    for i in range(start, inputs[0].shape[1]):
        stored(cache, inputs, i, i + 1)
        found.append(cache.decode(inputs[0][:, i : i + 1]))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_rows_of_the_system(name: str, source: torch.Generator) -> None:
    for start in (1, 23):
        inputs = drawn(source, 47)
        found = steps(made(name, 12), inputs, start)
        expected = definition(name, 12)(inputs[0][:, start:], *inputs[1:])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_for_everything_is_attention(name: str, source: torch.Generator) -> None:
    inputs = drawn(source, 47)
    q, k, v, c = inputs
    found = steps(made(name, 80), inputs, 30)
    score = fv.Softmax() + fv.KeyBias(c.transpose(1, 2)) if name == "nosa" else fv.Softmax()
    expected = fv.attend(q[:, 30:], k, v, fv.Causal(), score)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_fall_with_the_budget(name: str, source: torch.Generator) -> None:
    """Queries that have nothing to do with each other: the most that can be fetched."""
    inputs = drawn(source, 70)
    row = (D + DV) * 8 + 4 * (name == "nosa")
    whole = row * 70 * B * HKV
    slots = []
    for tokens in (64, 32, 16, 8):
        cache = made(name, tokens, most=200)
        stored(cache, inputs, 0, 60)
        before = cache.fetched_bytes
        assert before == 0
        most = 0
        for i in range(60, 70):
            stored(cache, inputs, i, i + 1)
            cache.decode(inputs[0][:, i : i + 1])  # type: ignore[attr-defined]
            most = max(most, cache.fetched_bytes - before)
            before = cache.fetched_bytes
        groups = HQ // HKV if name == "retrieval_attention" else 1
        beside = {"retrieval_attention": 3, "louis_kv": 4, "nosa": 8}[name]  # sinks, a page, two
        assert 0 < most <= row * B * HKV * (groups * tokens + beside)
        assert cache.host_bytes() <= cache.stored_bytes <= whole
        slots.append(cache.bytes() - cache.near.bytes() - cache.summary_bytes())
    assert all(1.4 * b < a for a, b in itertools.pairwise(slots))


def test_what_does_not_depend_on_the_query_stays(source: torch.Generator) -> None:
    """NOSA's bound: by_query blocks per head and step, though many more are read."""
    inputs = drawn(source, 200)
    fetched: dict[int, list[int]] = {}
    for by_query in (4, 20):
        cache = NosaCache(SHAPE, max_tokens=220, budget=20, by_query=by_query, **NOSA)
        stored(cache, inputs, 0, 160)
        fetched[by_query] = []
        for i in range(160, 200):
            stored(cache, inputs, i, i + 1)
            cache.decode(inputs[0][:, i : i + 1])
            assert max(cache.host_lengths[0]) >= 20 * 4 - 3
            fetched[by_query].append(cache.fetched)
    first, *others = fetched[4]
    assert first == 18 * B * HKV  # two of the twenty are near
    assert max(others) <= 4 * B * HKV
    assert sum(others) < sum(fetched[20][1:])


def test_between_borders_nothing_is_fetched(source: torch.Generator) -> None:
    inputs = drawn(source, 60)
    turn = 1 - 2 * (torch.arange(60) >= 50).double()
    q = inputs[0][:, :1] * turn[None, :, None, None]
    cache = LouisCache(SHAPE, max_tokens=80, pages=3, page=4, window=6)
    stored(cache, inputs, 0, 40)
    seen = []
    for i in range(40, 60):
        stored(cache, inputs, i, i + 1)
        old = cache.host_pages[0]
        cache.decode(q[:, i : i + 1])
        seen.append((i, cache.fetched, cache.host_pages[0] - old))
    assert seen[0][1] == 3 * B * HKV
    became_old = [i for i in range(41, 50) if (i + 1 - 6) % 4 == 0]
    assert [i for i, n, _ in seen[1:10] if n] == became_old
    assert all(n <= B * HKV for _, n, _ in seen[1:10])
    assert seen[10][1] > B * HKV  # the query turned


def test_full_slots_are_a_border(source: torch.Generator) -> None:
    inputs = drawn(source, 60)
    q = inputs[0][:, :1].expand(-1, 60, -1, -1)
    cache = LouisCache(SHAPE, max_tokens=80, pages=2, page=4, window=6, slots=3)
    stored(cache, inputs, 0, 30)
    for i in range(30, 60):
        stored(cache, inputs, i, i + 1)
        cache.decode(q[:, i : i + 1])
        assert max(map(max, cache.host_lengths)) <= 3 * 4 + 6 + 3


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_other_lengths_and_sequences_that_begin_again(
    name: str, source: torch.Generator
) -> None:
    inputs, counts = drawn(source, 50), (45, 21)
    cache: Any = made(name, 12)
    stored(cache, inputs, 0, 45, counts=counts)
    q = inputs[0][:, 45:46]
    together = cache.decode(q)
    for b, n in enumerate(counts):
        own = tuple(x[b : b + 1, :n].expand(2, -1, -1, -1) for x in inputs[1:3])
        c = inputs[3][b : b + 1, :n].expand(2, -1, -1)
        expected = definition(name, 12)(q[b : b + 1].expand(2, -1, -1, -1), *own, c)[:1]
        torch.testing.assert_close(together[b : b + 1], expected, rtol=0, atol=1e-12)
    cache.free([1])
    stored(cache, inputs, 0, 45, counts=(0, 45))
    again = cache.decode(q)
    torch.testing.assert_close(again[:1], together[:1], rtol=0, atol=1e-12)
    expected = definition(name, 12)(q, *(x[:, :45] for x in inputs[1:]))[1:]
    torch.testing.assert_close(again[1:], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_one_sequence_stays_there(name: str, source: torch.Generator) -> None:
    inputs = drawn(source, 40)
    clean: Any = made(name, 12)
    expected = steps(clean, inputs, 36)
    for x in inputs[1:3]:
        x[0, 9:30] = torch.nan
    found = steps(made(name, 12), inputs, 36)
    assert torch.equal(found[1], expected[1])
    assert bool(found[0].isnan().any()) or name == "retrieval_attention"  # NaN is never nearest


@pytest.mark.parametrize("name", NAMES)
def test_no_room_on_the_host_leaves_it_as_it_was(name: str, source: torch.Generator) -> None:
    inputs = drawn(source, 60)
    cache: Any = made(name, 12, most=40)
    stored(cache, inputs, 0, 40)
    q = inputs[0][:, 39:40]
    before = cache.decode(q)
    with pytest.raises(fv.errors.OutOfPagesError, match="unchanged"):
        stored(cache, inputs, 40, 60)
    assert cache.host_seen == [40, 40]
    assert torch.equal(cache.decode(q), before)
    cache.free([0])
    stored(cache, inputs, 40, 60, counts=(20, 0))
    assert cache.host_seen == [20, 40]


def test_a_sink_and_a_soft_cap(source: torch.Generator) -> None:
    q, k, v, _ = inputs = drawn(source, 30)
    sink = torch.randn(HQ, generator=source, dtype=torch.float64)
    score = fv.Softmax(scale=0.5, soft_cap=3.0, sink=sink)
    expected = fv.attend(q[:, -1:], k, v, fv.Causal(), score)
    for name in NAMES[:2]:
        cache: Any = made(name, 80)
        stored(cache, inputs, 0, 30)
        torch.testing.assert_close(cache.decode(q[:, -1:], score), expected, rtol=0, atol=1e-12)


def test_misuse_is_an_error_that_says_what_to_do(source: torch.Generator) -> None:
    q, k, v, _ = drawn(source, 4)
    with pytest.raises(fv.errors.CacheError, match="q_heads"):
        RetrievalCache(SHAPE, q_heads=3, max_tokens=8)
    with pytest.raises(fv.errors.CacheError, match="pages of a choice"):
        LouisCache(SHAPE, max_tokens=8, pages=4, slots=3)
    with pytest.raises(fv.errors.CacheError, match="by_query"):
        NosaCache(SHAPE, max_tokens=8, budget=4, by_query=5)
    cache = NosaCache(SHAPE, max_tokens=8)
    with pytest.raises(fv.errors.CacheError, match="log-weight"):
        cache.append(k, v)
    with pytest.raises(fv.errors.ShapeError, match="one query"):
        cache.decode(q)
