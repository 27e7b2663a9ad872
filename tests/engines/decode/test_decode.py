"""decode() against attend() on the stored keys, and what it does with hard input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.caches import (
    Contiguous,
    Joined,
    KVShape,
    Latent,
    LowRank,
    Paged,
    Pruned,
    Quantised,
    Shared,
)
from foveal.engines.decode import cpu
from tests.engines.decode.problems import assert_agrees

B, L, HKV, HQ, D, DV = 3, 61, 2, 4, 12, 20
COUNTS = (61, 17, 0)
IMPLEMENTATIONS = ("cpu", "reference")


def rows(source: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=source).to(dtype)


def kv(source: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return rows(source, B, L, HKV, D, dtype=dtype), rows(source, B, L, HKV, DV, dtype=dtype)


def shape(dtype: torch.dtype = torch.float32, batch: int = B) -> KVShape:
    return KVShape(batch, HKV, D, DV, dtype)


SCORES = {
    "plain": lambda source: fv.Softmax(),
    "cap and sink": lambda source: fv.Softmax(soft_cap=2.0, sink=rows(source, HQ)),
    "key bias": lambda source: fv.Softmax(0.3) + fv.KeyBias(rows(source, 1, HKV, L)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
@pytest.mark.parametrize("Lq", [1, 5])
def test_pages_of_any_size_are_attention(
    implementation: str, page_size: int, Lq: int, source: torch.Generator
) -> None:
    cache = Paged(shape(), pages=150, page_size=page_size)
    cache.append(*kv(source), counts=COUNTS)
    assert_agrees(rows(source, B, Lq, HQ, D), cache, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    "pattern", [fv.Causal(), fv.Dense(), fv.Sliding(9), fv.Sliding(9, 0, 3)], ids=str
)
def test_scores_and_patterns(
    implementation: str, name: str, pattern: fv.Pattern, source: torch.Generator
) -> None:
    cache = Contiguous(shape(), max_tokens=L)
    cache.append(*kv(source))
    score = SCORES[name](source)
    assert_agrees(rows(source, B, 3, HQ, D), cache, score, pattern, implementation)


def test_slopes_count_positions(source: torch.Generator) -> None:
    cache = Paged(shape(), pages=50)
    cache.append(*kv(source))
    score = fv.Softmax() + fv.Alibi(torch.rand(HQ, generator=source))
    assert_agrees(rows(source, B, 3, HQ, D), cache, score)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, source: torch.Generator) -> None:
    cache = Paged(shape(dtype), pages=50)
    cache.append(*kv(source, dtype))
    assert_agrees(rows(source, B, 2, HQ, D, dtype=dtype), cache)


def caches(source: torch.Generator) -> dict[str, fv.caches.Cache]:
    found: dict[str, fv.caches.Cache] = {
        bits: Quantised(shape(), pages=90, bits=bits, page_size=5)
        for bits in ("fp8", "int8", "int4")
    }
    for storage in ("bitmap", "channels"):
        found[storage] = Pruned(
            shape(), pages=20, sparsity=0.6, recent=3, group=64, storage=storage
        )
    found["joined"] = Joined(
        [Quantised(shape(), pages=90), Contiguous(shape(), max_tokens=9), Paged(shape(), pages=90)]
    )
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "bitmap", "channels", "joined"])
def test_other_rows_are_attention_on_what_they_hold(
    name: str, implementation: str, source: torch.Generator
) -> None:
    cache = caches(source)[name]
    k, v = rows(source, B, 90, HKV, D), rows(source, B, 90, HKV, DV)
    if isinstance(cache, Joined):
        cache.members[0].append(k[:, :30], v[:, :30])
        cache.members[1].append(k[:, 30:35], v[:, 30:35], counts=(5, 0, 2))
        cache.append(k[:, 35:60], v[:, 35:60])
    else:
        cache.append(k, v)
    score = fv.Softmax(sink=rows(source, HQ))
    assert_agrees(rows(source, B, 2, HQ, D), cache, score, implementation=implementation)


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("rank", [5, D])
def test_coefficients_are_attention_on_projected_rows(
    rank: int, with_mean: bool, source: torch.Generator
) -> None:
    basis = torch.linalg.qr(rows(source, HKV, D, D).double())[0][..., :rank]
    wide = torch.linalg.qr(rows(source, HKV, DV, DV).double())[0]
    means = (rows(source, HKV, D), rows(source, HKV, DV)) if with_mean else (None, None)
    cache = LowRank(
        shape(torch.float64), basis, wide, pages=90, key_mean=means[0], value_mean=means[1]
    )
    k, v = kv(source, torch.float64)
    cache.append(k, v, counts=COUNTS)
    held = cache.dense()
    if rank == D:
        assert torch.allclose(held[0][0], k[0], rtol=0, atol=1e-12)
    assert torch.allclose(held[1][0], v[0], rtol=0, atol=1e-12)
    score = fv.Softmax(sink=rows(source, HQ).double())
    assert_agrees(rows(source, B, 2, HQ, D).double(), cache, score)


def test_a_mean_and_a_soft_cap_are_refused(source: torch.Generator) -> None:
    basis = torch.eye(D).expand(HKV, D, D)
    wide = torch.eye(DV).expand(HKV, DV, DV)
    cache = LowRank(shape(), basis, wide, pages=9, key_mean=torch.ones(HKV, D))
    with pytest.raises(fv.errors.ScoreError, match="soft cap"):
        fv.decode(rows(source, B, 1, HQ, D), cache, fv.Softmax(soft_cap=2.0))


def test_a_latent_row_is_key_and_value(source: torch.Generator) -> None:
    cache = Latent(B, 12, 4, pages=40, page_size=5, dtype=torch.float32)
    latent, positional = rows(source, B, L, 1, 12), rows(source, B, L, 1, 4)
    cache.append(latent, positional, counts=COUNTS)
    assert_agrees(rows(source, B, 2, HQ, 16), cache, fv.Softmax(0.2))


@pytest.mark.parametrize("Lq", [1, 4])
def test_absorbed_queries_are_expanded_heads(Lq: int, source: torch.Generator) -> None:
    latent_dim, rope_dim, dim, value_dim = 10, 4, 6, 8
    c, p = rows(source, B, L, 1, latent_dim).double(), rows(source, B, L, 1, rope_dim).double()
    up_k = rows(source, HQ, dim, latent_dim).double()
    up_v = rows(source, HQ, value_dim, latent_dim).double()
    q, q_p = rows(source, B, Lq, HQ, dim).double(), rows(source, B, Lq, HQ, rope_dim).double()
    k = torch.cat((torch.einsum("hdr,blor->blhd", up_k, c), p.expand(-1, -1, HQ, -1)), -1)
    v = torch.einsum("hdr,blor->blhd", up_v, c)
    score = fv.Softmax((dim + rope_dim) ** -0.5)
    expected = fv.attend(torch.cat((q, q_p), -1), k, v, fv.Causal(), score)
    cache = Latent(B, latent_dim, rope_dim, pages=40, dtype=torch.float64)
    cache.append(c, p)
    absorbed = torch.cat((torch.einsum("hdr,blhd->blhr", up_k, q), q_p), -1)
    o = torch.einsum("hdr,blhr->blhd", up_v, fv.decode(absorbed, cache, score))
    assert torch.allclose(o, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("Lq", [1, 3])
@pytest.mark.parametrize("pattern", [fv.Causal(), fv.Dense(), fv.Sliding(30)], ids=str)
def test_a_shared_prefix_is_a_prefix_of_each(
    pattern: fv.Pattern, Lq: int, source: torch.Generator
) -> None:
    k, v = kv(source)
    prefix = Contiguous(shape(batch=1), max_tokens=40)
    prefix.append(k[:1, :40], v[:1, :40])
    suffix = Paged(shape(), pages=30)
    suffix.append(k, v, counts=(21, 4, 0))
    score = fv.Softmax(soft_cap=3.0, sink=rows(source, HQ))
    cache = Shared(prefix, suffix)
    assert_agrees(rows(source, B, Lq, HQ, D), cache, score, pattern)
    assert_agrees(rows(source, B, Lq, HQ, D), cache, fv.Softmax() + fv.Alibi(torch.ones(HQ)))
    with pytest.raises(fv.errors.PatternError, match="sink tokens"):
        fv.decode(rows(source, B, 1, HQ, D), cache, pattern=fv.Sliding(30, 0, 2))


def test_chunks_of_a_prefill_are_the_prefill(source: torch.Generator) -> None:
    k, v = kv(source)
    q = rows(source, B, L, HQ, D)
    expected = fv.attend(q, k, v, fv.Sliding(20, 0, 2))
    cache = Paged(shape(), pages=50)
    found = []
    for start in range(0, L, 13):
        piece = slice(start, min(start + 13, L))
        cache.append(k[:, piece], v[:, piece])
        found.append(fv.decode(q[:, piece], cache, pattern=fv.Sliding(20, 0, 2)))
    assert torch.allclose(torch.cat(found, 1), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_stored_gives_nothing(implementation: str, source: torch.Generator) -> None:
    cache = Paged(shape(), pages=4)
    o, lse = fv.decode(
        rows(source, B, 2, HQ, D), cache, return_lse=True, implementation=implementation
    )
    assert bool((o == 0).all())
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bad_sequence_reaches_no_other(implementation: str, source: torch.Generator) -> None:
    k, v = kv(source)
    q = rows(source, B, 1, HQ, D)
    clean, dirty = Paged(shape(), pages=50), Paged(shape(), pages=50)
    clean.append(k, v)
    k[1, 3], v[1, 4] = torch.nan, torch.inf
    dirty.append(k, v)
    one, other = (fv.decode(q, x, implementation=implementation) for x in (clean, dirty))
    assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert bool(other[1].isnan().all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pages_with_old_nan_are_clean_when_taken_again(
    implementation: str, source: torch.Generator
) -> None:
    k, v = kv(source)
    cache = Paged(shape(), pages=12)
    cache.append(torch.full_like(k, torch.nan), torch.full_like(v, torch.nan))
    cache.free()
    cache.append(k, v, counts=(50, 1, 0))
    o = fv.decode(rows(source, B, 3, HQ, D), cache, implementation=implementation)
    assert bool(o.isfinite().all())


def test_a_kernel_that_fails_leaves_the_cache_as_it_was(
    source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Paged(shape(), pages=50)
    cache.append(*kv(source))
    before = [x.clone() for x in (*cache.dense(), cache.lengths, cache.seen)]
    q = rows(source, B, 1, HQ, D)

    def failing(*arguments: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(cpu, "decode", failing)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            fv.decode(q, cache, implementation="cpu")
    after = (*cache.dense(), cache.lengths, cache.seen)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert_agrees(q, cache, implementation="cpu")


def test_a_future_nan_is_not_seen(source: torch.Generator) -> None:
    k, v = kv(source)
    v[:, -1] = torch.nan
    cache = Paged(shape(), pages=50)
    cache.append(k, v)
    o = fv.decode(rows(source, B, 3, HQ, D), cache)
    assert bool(o[:, :2].isfinite().all())
    assert bool(o[:, 2].isnan().all())


def test_the_gradient_of_q_is_that_of_attend(source: torch.Generator) -> None:
    k, v = (x.double() for x in kv(source))
    q = rows(source, B, 2, HQ, D).double().requires_grad_()
    cache = Paged(shape(torch.float64), pages=50)
    cache.append(k, v)
    (found,) = torch.autograd.grad(fv.decode(q, cache).square().sum(), q)
    (expected,) = torch.autograd.grad(fv.attend(q, k, v, fv.Causal()).square().sum(), q)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


BAD = {
    "q rank": (lambda q: fv.decode(q[0], good()), fv.errors.ShapeError, "q"),
    "q heads": (lambda q: fv.decode(q[:, :, :3], good()), fv.errors.ShapeError, "heads"),
    "q dtype": (lambda q: fv.decode(q.double(), good()), fv.errors.DtypeError, "q"),
    "pattern": (
        lambda q: fv.decode(q, good(), pattern=fv.Strided(3)),
        fv.errors.PatternError,
        "pattern",
    ),
    "bias": (
        lambda q: fv.decode(q, good(), fv.Bias(torch.zeros(1, 1, 1, 8))),
        fv.errors.ScoreError,
        "score",
    ),
    "key bias": (
        lambda q: fv.decode(q, good(), fv.KeyBias(torch.zeros(1, 1, 7))),
        fv.errors.ScoreError,
        "KeyBias",
    ),
    "name": (
        lambda q: fv.decode(q, good(), implementation="gpu"),
        fv.errors.UnknownNameError,
        "implementation",
    ),
    "refusal": (
        lambda q: fv.decode(q, good(), implementation="triton"),
        fv.errors.RefusedError,
        "CUDA",
    ),
}


def good() -> Paged:
    cache = Paged(shape(), pages=4)
    cache.append(torch.zeros(B, 8, HKV, D), torch.zeros(B, 8, HKV, DV))
    return cache


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, kind, word = BAD[name]
    with pytest.raises(kind, match=word):
        call(torch.zeros(B, 1, HQ, D))


def test_the_explanation_counts_what_is_read(source: torch.Generator) -> None:
    cache = Paged(shape(), pages=50)
    cache.append(*kv(source), counts=COUNTS)
    found = fv.explain_decode(rows(source, B, 1, HQ, D), cache)
    assert found.implementation == "cpu"
    assert found.keys == sum(COUNTS) * HKV
    assert found.bytes == found.keys * (D + DV) * 4
    assert found.storage_bytes == cache.bytes()
    assert "CUDA" in str(found)


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_masses_of_pages_are_the_weights_of_their_keys(
    page_size: int, source: torch.Generator
) -> None:
    cache = Paged(shape(torch.float64), pages=250, page_size=page_size)
    k, v = kv(source, torch.float64)
    cache.append(k, v)
    q = rows(source, B, 2, HQ, D, dtype=torch.float64)
    score = fv.Softmax(soft_cap=2.0, sink=rows(source, HQ).double())
    _, _, mass = fv.page_mass(q, cache, score)
    pages = -(-L // page_size)
    unit = torch.zeros(B, L, HKV, pages, dtype=torch.float64)
    unit[:, torch.arange(L), :, torch.arange(L) // page_size] = 1
    expected = fv.attend(q, k, unit, fv.Causal(), score).sum(1)
    assert torch.allclose(mass, expected, rtol=0, atol=1e-12)
