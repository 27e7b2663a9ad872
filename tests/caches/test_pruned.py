"""Rows that keep their largest entries, in both kinds of storage."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.caches import KVShape, Pruned
from foveal.caches.bitmap import BitmapCodec
from foveal.caches.channels import ChannelCodec

STORAGES = ("bitmap", "channels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "kept"), [(128, 39), (20, 8), (20, 20), (256, 1), (7, 3)])
def test_both_codecs_keep_the_same_entries(
    dim: int, kept: int, dtype: torch.dtype, source: torch.Generator
) -> None:
    x = torch.randn(50, dim, generator=source).to(dtype)
    x[0], x[1, 0], x[2, -1] = 0, torch.nan, -torch.inf
    held = [
        codec.decode(codec.encode(x), torch.float64)
        for codec in (BitmapCodec(dim, dtype, kept), ChannelCodec(dim, dtype, kept))
    ]
    assert torch.equal(held[0].nan_to_num(99.0), held[1].nan_to_num(99.0))
    assert bool(held[0][1, 0].isnan())
    largest = x[3:].abs().double().sort(-1, descending=True).values[:, :kept]
    assert torch.equal(held[0][3:].abs().sort(-1, descending=True).values[:, :kept], largest)
    assert int((held[0] != 0).sum(-1).max()) <= kept


def test_entries_of_a_row_alternate_between_distant_channels() -> None:
    codec = ChannelCodec(128, torch.float32, 40)
    _, channels = codec.encode(torch.arange(1.0, 129.0)[None])
    assert channels.view(5, 8)[:, 0].tolist() == [88, 89, 90, 91, 92]
    assert channels.view(5, 8)[0].tolist() == [88, 93, 98, 103, 108, 113, 118, 123]


@pytest.mark.parametrize("storage", STORAGES)
def test_bytes_are_those_of_the_entries(storage: fv.caches.pruned.Storage) -> None:
    cache = Pruned(KVShape(1, 2, 128), pages=20, group=64, storage=storage)
    k, v = torch.randn(2, 1, 672, 2, 128).bfloat16()
    cache.append(k, v)
    assert cache.body.host_lengths == [[640]]
    row = 40 * 2 + (16 if storage == "bitmap" else 40)
    assert cache.body.bytes() == 640 * 2 * 2 * row + 10 * 4


@pytest.mark.parametrize("storage", STORAGES)
def test_old_groups_do_not_change(
    storage: fv.caches.pruned.Storage, source: torch.Generator
) -> None:
    cache = Pruned(KVShape(1, 1, 16), pages=9, group=64, recent=8, storage=storage)
    k = torch.randn(1, 300, 1, 16, generator=source).bfloat16()
    cache.append(k[:, :100], k[:, :100])
    before = cache.dense()[0][:, :64].clone()
    for start in range(100, 300, 50):
        cache.append(k[:, start : start + 50], k[:, start : start + 50])
    held = cache.dense()[0]
    assert torch.equal(held[:, :64], before)
    assert torch.equal(held[:, -8:], k[:, -8:])


def test_bad_storage_is_named() -> None:
    with pytest.raises(fv.errors.CacheError, match="storage"):
        Pruned(KVShape(1, 1, 16), pages=9, storage="list")  # type: ignore[arg-type]
    with pytest.raises(fv.errors.CacheError, match="256"):
        Pruned(KVShape(1, 1, 512), pages=9, storage="channels")
