"""Pages on the host: what is selected is what a decode reads."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.caches import KVShape, Offloaded

B, HKV, D, SIZE = 2, 2, 8, 4
SHAPE = KVShape(B, HKV, D, dtype=torch.float64)


def filled(source: torch.Generator, slots: int = 9) -> tuple[Offloaded, torch.Tensor, torch.Tensor]:
    cache = Offloaded(SHAPE, max_tokens=40, slots=slots, page_size=SIZE, recent=6)
    k, v = (torch.randn(B, 41, HKV, D, generator=source, dtype=torch.float64) for _ in range(2))
    cache.append(k[:, :30], v[:, :30])
    for i in range(30, 41):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
    return cache, k, v


def test_all_pages_selected_is_attention(source: torch.Generator) -> None:
    cache, k, v = filled(source)
    pages = cache.host_pages[0]
    assert pages == 8
    assert torch.equal(cache.dense()[0], k)
    cache.select(torch.randperm(pages, generator=source).expand(B, 1, -1))
    q = torch.randn(B, 2, 4, D, generator=source, dtype=torch.float64)
    for pattern in (fv.Causal(), fv.Sliding(13)):
        o = fv.decode(q, cache, pattern=pattern)
        assert torch.allclose(o, fv.attend(q, k, v, pattern), rtol=0, atol=1e-12)


def test_heads_choose_for_themselves(source: torch.Generator) -> None:
    cache, k, v = filled(source, 3)
    chosen = torch.tensor([[[0, 5, 3], [7, -1, -1]], [[2, 6, -1], [1, 2, 3]]])
    cache.select(chosen)
    q = torch.randn(B, 1, 4, D, generator=source, dtype=torch.float64)
    o = fv.decode(q, cache)
    for b in range(B):
        for h in range(HKV):
            tokens = [p * SIZE + i for p in chosen[b, h].tolist() if p >= 0 for i in range(SIZE)]
            tokens += range(32, 41)
            one = slice(2 * h, 2 * h + 2)
            rows = (x[b : b + 1, tokens, h : h + 1] for x in (k, v))
            expected = fv.attend(q[b : b + 1, :, one], *rows)
            assert torch.allclose(o[b : b + 1, :, one], expected, rtol=0, atol=1e-12)


def test_only_what_is_missing_is_copied(source: torch.Generator) -> None:
    cache, _, _ = filled(source, 4)
    cache.select(torch.tensor([0, 1, 2]).expand(B, 1, -1))
    assert cache.fetched == 3 * B * HKV
    cache.select(torch.tensor([2, 1, 7]).expand(B, 1, -1))
    assert cache.fetched == B * HKV
    cache.prefetch(torch.tensor([6]).expand(B, 1, -1))
    assert cache.fetched == B * HKV
    cache.select(torch.tensor([6, 2]).expand(B, 1, -1))
    assert cache.fetched == 0
    cache.select(torch.tensor([0]).expand(B, 1, -1))
    assert cache.fetched == B * HKV  # 0 was named longest ago and is gone
    with pytest.raises(fv.errors.OutOfPagesError):
        cache.prefetch(torch.tensor([1, 2, 3, 4]).expand(B, 1, -1))


def test_bytes_on_the_device_do_not_grow(source: torch.Generator) -> None:
    cache, k, v = filled(source)
    before = cache.bytes()
    assert cache.host_bytes() == B * HKV * 32 * 2 * D * 8
    cache.free([0])
    assert cache.host_lengths[0] == [0, 0]
    assert cache.bytes() < before
    with pytest.raises(fv.errors.OutOfPagesError):
        cache.append(k[:, :20], v[:, :20], counts=(0, 20))
    assert cache.host_seen == [0, 41]
