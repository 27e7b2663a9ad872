"""Rows that are mapped on demand; on the CPU they are allocated whole."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.caches import KVShape, VirtualContiguous

B, HKV, D = 3, 2, 8


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_holds_and_decodes_as_pages_do(device: str, source: torch.Generator) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    shape = KVShape(B, HKV, D, dtype=torch.float32, device=device)
    virtual = VirtualContiguous(shape, max_tokens=50)
    k, v = (torch.randn(B, 40, HKV, D, generator=source).to(device) for _ in range(2))
    for start, counts in ((0, (10, 0, 7)), (10, (10, 3, 0)), (20, (20, 0, 20))):
        rows = slice(start, start + max(counts))
        virtual.append(k[:, rows], v[:, rows], counts=counts)
    assert virtual.host_lengths == [[40], [3], [27]]
    held = virtual.dense()
    assert torch.equal(held[0][0], k[0])
    assert torch.equal(held[1][2, 7:27], v[2, 20:])
    q = torch.randn(B, 2, 4, D, generator=source).to(device)
    o = fv.decode(q, virtual)
    expected = fv.attend(q[2:], held[0][2:, :27], held[1][2:, :27], fv.Causal())
    assert torch.allclose(o[2:], expected, rtol=0, atol=2e-6)
    virtual.fork(2, [1])
    virtual.append(k[:, :1], v[:, :1])
    assert torch.equal(virtual.dense()[0][1, :27], held[0][2, :27])
    kept = torch.tensor([0, 3, 5, 27]).expand(B, 1, -1)
    virtual.keep(kept)
    assert torch.equal(virtual.dense()[0][1, :3], held[0][2, [0, 3, 5]])


@pytest.mark.gpu
def test_memory_follows_the_tokens_and_is_kept_for_the_next(source: torch.Generator) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    shape = KVShape(2, 8, 128, device="cuda")
    cache = VirtualContiguous(shape, max_tokens=100_000)
    at_first = cache.mapped_bytes()
    k = torch.randn(2, 3000, 8, 128, device="cuda", dtype=torch.bfloat16)
    cache.append(k, k, counts=(3000, 1))
    per_granule = (2 << 20) // (8 * 128 * 2)
    granules = -(-3000 // per_granule) + 1
    assert cache.bytes() == 2 * granules * (2 << 20)
    cache.free([0])
    assert cache.mapped_bytes() == at_first + 2 * granules * (2 << 20)
    cache.release()
    assert cache.mapped_bytes() == at_first + 2 * (2 << 20)
    assert torch.equal(cache.dense()[0][1, 0], k[1, 0])
