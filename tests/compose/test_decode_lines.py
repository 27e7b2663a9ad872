"""decode() of scores that fit lines: attend() on what the cache holds, sequence by sequence."""

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
    Offloaded,
    Paged,
    Shared,
    VirtualContiguous,
)

B, L, HKV, HQ, D, DV = 3, 41, 2, 4, 6, 5


def rows(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def shape(batch: int = B) -> KVShape:
    return KVShape(batch, HKV, D, DV, torch.float64)


def filled(
    cache: Cache, source: torch.Generator, tokens: int = L, counts: list[int] | None = None
) -> Cache:
    batch = cache.shape.batch
    k, v = rows(source, batch, tokens, HKV, D), rows(source, batch, tokens, HKV, DV)
    cache.append(k, v, counts=counts)
    return cache


def evicted(source: torch.Generator) -> Cache:
    cache = filled(Contiguous(shape(), max_tokens=L, per_head=True), source)
    kept = torch.full((B, HKV, 9), -1)
    for b in range(B):
        for h in range(HKV):
            n = 3 * b + h + 1
            kept[b, h, :n] = torch.randperm(L, generator=source)[:n].sort().values
    cache.keep(kept)
    return cache


CACHES: dict[str, Callable[[torch.Generator], Cache]] = {
    "pages": lambda source: filled(Paged(shape(), pages=40, page_size=7), source),
    "lengths": lambda source: filled(Paged(shape(), pages=40), source, counts=[L, 0, 13]),
    "heads": evicted,
    "virtual": lambda source: filled(VirtualContiguous(shape(), max_tokens=L), source),
    "joined": lambda source: Joined(
        [filled(Paged(shape(), pages=9), source), filled(Paged(shape(), pages=9), source, 3)]
    ),
    "shared": lambda source: Shared(
        filled(Paged(shape(1), pages=9), source),
        filled(Paged(shape(), pages=9), source, 4, [4, 2, 3]),
    ),
}


def truth(q: Tensor, cache: Cache, score: fv.Score, pattern: fv.Pattern) -> tuple[Tensor, Tensor]:
    k, v = cache.dense()
    o, lse = q.new_zeros(*q.shape[:3], DV), q.new_zeros(q.shape[:3])
    for b, lengths in enumerate(cache.host_lengths):
        per_list = HQ // len(lengths)
        for head in range(HQ):
            n, key_head = lengths[head // per_list], head // (HQ // HKV)
            own: fv.Score
            if isinstance(score, fv.Parallax):
                own = fv.Parallax(score.r[b : b + 1, :, head : head + 1])
            else:
                assert isinstance(score, fv.LocalLinear)
                assert isinstance(score.ridge, Tensor)
                own = fv.LocalLinear(score.ridge[head : head + 1])
            keys, values = (x[b : b + 1, :n, key_head : key_head + 1] for x in (k, v))
            one = q[b : b + 1, :, head : head + 1]
            found = fv.attend(
                one, keys, values, pattern, own, return_lse=True, implementation="reference"
            )
            o[b, :, head], lse[b, :, head] = found[0][0, :, 0], found[1][0, :, 0]
    return o, lse


@pytest.mark.parametrize("Lq", [1, 3])
@pytest.mark.parametrize("name", CACHES)
def test_a_decode_is_attention_on_what_is_stored(
    name: str, Lq: int, source: torch.Generator
) -> None:
    cache = CACHES[name](source)
    q = rows(source, B, Lq, HQ, D)
    patterns: list[fv.Pattern] = [fv.Causal(), fv.Dense()]
    if name != "heads":
        patterns += [fv.Sliding(6), fv.Sliding(6, 0, 2)]
    ridge = 0.3 + torch.rand(HQ, generator=source, dtype=torch.float64)
    for score in (fv.LocalLinear(ridge), fv.Parallax(0.3 * rows(source, B, Lq, HQ, D))):
        for pattern in patterns:
            found = fv.decode(q, cache, score, pattern=pattern, return_lse=True)
            for x, exact in zip(found, truth(q, cache, score, pattern), strict=True):
                torch.testing.assert_close(x, exact, rtol=1e-7, atol=1e-7)


def test_gradients_reach_q_and_the_ridge(source: torch.Generator) -> None:
    cache = filled(Paged(shape(), pages=40), source, counts=[L, 7, 13])
    q, ridge = rows(source, B, 2, HQ, D).requires_grad_(), torch.ones(HQ, dtype=torch.float64)
    ridge.requires_grad_()
    fv.decode(q, cache, fv.LocalLinear(ridge)).square().sum().backward()
    k, v = cache.dense()
    expected = []
    for b, (n,) in enumerate(cache.host_lengths):
        one = q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]
        expected.append(fv.attend(*one, fv.Causal(), fv.LocalLinear(ridge)).square().sum())
    exact = torch.autograd.grad(sum(expected, q.new_zeros(())), (q, ridge))
    assert q.grad is not None
    assert ridge.grad is not None
    for found, gradient in zip((q.grad, ridge.grad), exact, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-7)


def test_nan_in_one_sequence_stays_there(source: torch.Generator) -> None:
    cache = Paged(shape(), pages=40)
    k, v = rows(source, B, L, HKV, D), rows(source, B, L, HKV, DV)
    k[1], v[1] = torch.nan, torch.inf
    cache.append(k, v)
    o = fv.decode(rows(source, B, 1, HQ, D), cache, fv.LocalLinear(1.0))
    assert o[[0, 2]].isfinite().all()
    assert o[1].isnan().all()


def test_the_explanation_names_what_runs(source: torch.Generator) -> None:
    cache = filled(Paged(shape(), pages=40), source, counts=[L, 0, 13])
    found = fv.explain_decode(rows(source, B, 1, HQ, D), cache, fv.LocalLinear(1.0))
    assert found.implementation == "cpu"
    assert found.keys == (L + 13) * HKV
    assert found.bytes == 3 * found.keys * (D + DV) * 8
    assert "triton" in str(found)


def test_what_does_not_fit_is_named(source: torch.Generator) -> None:
    cache, q = filled(Paged(shape(), pages=40), source), rows(source, B, 1, HQ, D)
    with pytest.raises(fv.errors.ScoreError, match="ridge"):
        fv.decode(q, cache, fv.LocalLinear(torch.ones(3)))
    with pytest.raises(fv.errors.ScoreError, match="shape of q"):
        fv.decode(q, cache, fv.Parallax(rows(source, B, 2, HQ, D)))
    with pytest.raises(fv.errors.PatternError, match="Sliding"):
        fv.decode(q, cache, fv.LocalLinear(), pattern=fv.Strided(3))
    with pytest.raises(fv.errors.RefusedError, match="CUDA"):
        fv.decode(q, cache, fv.LocalLinear(), implementation="triton")
    with pytest.raises(fv.errors.PatternError, match="eviction"):
        fv.decode(q, evicted(source), fv.LocalLinear(), pattern=fv.Sliding(6))
    far = filled(Offloaded(shape(), max_tokens=64, slots=4, page_size=8, recent=16), source)
    with pytest.raises(fv.errors.CacheError, match="one device"):
        fv.decode(q, far, fv.LocalLinear())
