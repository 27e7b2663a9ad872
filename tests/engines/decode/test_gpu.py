"""Decoding on a CUDA device: a graph of a changing batch, and calls that are repetitions of others."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.caches import KVShape, Offloaded, Paged, Pruned, Quantised, Shared
from tests.engines.decode.problems import assert_agrees

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
B, HQ, HKV, D = 3, 8, 2, 64


def shape(batch: int = B) -> KVShape:
    return KVShape(batch, HKV, D, device="cuda")


def rows(tokens: int, heads: int = HKV, batch: int = B) -> torch.Tensor:
    return torch.randn(batch, tokens, heads, D, device="cuda", dtype=torch.bfloat16)


def test_a_graph_replays_a_changing_batch() -> None:
    cache = Paged(shape(), pages=60)
    cache.append(rows(200), rows(200), counts=(200, 33, 15))
    k, v, q = rows(1), rows(1), rows(1, HQ)
    cache.append(k, v)
    fv.decode(q, cache, implementation="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(k, v)
        o = fv.decode(q, cache, implementation="triton")
    for step in range(40):
        for x in (k, v, q):
            x.normal_()
        if step == 20:
            cache.free([1])
        cache.prepare()
        graph.replay()
    assert cache.lengths.flatten().tolist() == [241, 20, 56]
    again = fv.decode(q, cache, implementation="triton")
    assert torch.equal(o, again)
    assert_agrees(q, cache, implementation="triton")


def test_calls_of_one_kind_do_not_mix() -> None:
    for _ in range(3):
        caches = [Paged(shape(), pages=60) for _ in range(2)]
        for cache in caches:
            cache.append(rows(90), rows(90), counts=(90, 1, 40))
            assert_agrees(rows(1, HQ), cache, implementation="triton")
        assert_agrees(rows(1, HQ), caches[0], fv.Softmax(soft_cap=9.0), implementation="triton")
        assert_agrees(rows(1, HQ), caches[0], implementation="lean")


def test_a_shared_prefix() -> None:
    prefix, suffix = Paged(shape(1), pages=40), Paged(shape(), pages=40)
    prefix.append(rows(500, batch=1), rows(500, batch=1))
    suffix.append(rows(60), rows(60), counts=(60, 0, 7))
    assert_agrees(rows(2, HQ), Shared(prefix, suffix), implementation="triton")


@pytest.mark.parametrize(
    ("heads", "dims", "dtype", "Lq", "q_heads", "cap", "pattern"),
    [
        (HKV, (128, 128), torch.bfloat16, 1, 8, None, fv.Causal()),
        (HKV, (128, 128), torch.bfloat16, 3, 8, None, fv.Causal()),
        (HKV, (64, 96), torch.float16, 1, 6, None, fv.Dense()),
        (HKV, (128, 128), torch.bfloat16, 1, 8, 5.0, fv.Sliding(200, 0, 5)),
        (1, (256, 256), torch.bfloat16, 1, 4, None, fv.Causal()),
        (HKV, (128, 128), torch.bfloat16, 1, 32, None, fv.Causal()),
    ],
)
def test_entries_go_to_their_channels(
    heads: int, dims: tuple[int, int], dtype: torch.dtype, Lq: int, q_heads: int,
    cap: float | None, pattern: fv.Pattern,
) -> None:  # fmt: skip
    cache = Pruned(KVShape(B, heads, *dims, dtype, "cuda"), pages=60, group=64)
    k, v = (torch.randn(B, 900, heads, n, device="cuda", dtype=dtype) for n in dims)
    cache.append(k, v, counts=(900, 333, 70))
    q = torch.randn(B, Lq, q_heads, dims[0], device="cuda", dtype=dtype)
    score: fv.Score = fv.Softmax(soft_cap=cap)
    assert_agrees(q, cache, score, pattern, implementation="triton")
    if q_heads == 32:
        score = score + fv.Alibi(torch.rand(q_heads, device="cuda"))
        assert_agrees(q, cache, score, pattern, implementation="triton")


@pytest.mark.parametrize(
    ("heads", "dim", "Lq", "score", "pattern"),
    [
        (HKV, 128, 1, fv.Softmax(soft_cap=9.0), fv.Causal()),
        (HKV, 128, 1, fv.Softmax(), fv.Sliding(99, 0, 4)),
        (HKV, 128, 3, fv.Softmax(), fv.Dense()),
        (1, 256, 1, fv.Softmax(), fv.Causal()),
    ],
)
def test_four_bits(heads: int, dim: int, Lq: int, score: fv.Score, pattern: fv.Pattern) -> None:
    cache = Quantised(KVShape(B, heads, dim, device="cuda"), pages=150, bits="int4")
    k, v = (torch.randn(B, 700, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cache.append(k, v, counts=(700, 33, 0))
    q = torch.randn(B, Lq, 4 * heads, dim, device="cuda", dtype=torch.bfloat16)
    assert_agrees(q, cache, score, pattern, implementation="triton")
    sink = torch.randn(4 * heads, device="cuda")
    assert_agrees(q, cache, fv.Softmax(sink=sink), pattern, implementation="triton")


def test_a_bad_sequence_of_pruned_rows_reaches_no_other() -> None:
    cache = Pruned(shape(), pages=60, group=64)
    k, v = rows(500), rows(500)
    v[1, 40:] = float("nan")
    cache.append(k, v)
    o = fv.decode(rows(1, HQ), cache, implementation="triton")
    assert bool(o[[0, 2]].isfinite().all())
    assert bool(o[1].isnan().all())
    cache.free()
    cache.append(k[:, :70].abs(), k[:, :70], counts=(70, 65, 33))
    assert bool(fv.decode(rows(1, HQ), cache, implementation="triton").isfinite().all())


def test_calls_that_differ_in_dtype_are_two_kinds() -> None:
    q = rows(1, HQ)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        cache = Paged(shape(), pages=60)
        cache.append(rows(90), rows(90), counts=(90, 1, 40))
        score = fv.Softmax(sink=torch.randn(HQ, device="cuda", dtype=dtype))
        for _ in range(2):
            assert_agrees(q, cache, score, implementation="triton")


def test_pages_come_from_the_host() -> None:
    cache = Offloaded(shape(), max_tokens=2048, slots=12, recent=100)
    k, v = rows(1000), rows(1000)
    cache.append(k, v)
    q = rows(1, HQ)
    cache.select(torch.arange(6).expand(B, 1, -1))
    cache.prefetch(torch.arange(6, 12).expand(B, 1, -1))
    cache.select(torch.arange(3, 12).expand(B, 1, -1))
    assert cache.fetched == 0
    o = fv.decode(q, cache, implementation="triton")
    kept = torch.cat((torch.arange(3 * 64, 12 * 64), torch.arange(64 * cache.host_pages[0], 1000)))
    expected = fv.attend(
        *(x.float() for x in (q, k[:, kept], v[:, kept])), implementation="reference"
    )
    assert float((o.float() - expected).abs().max()) < 0.02
