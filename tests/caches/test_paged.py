"""What a cache holds: after appending, evicting, freeing, sharing, and when pages run out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.caches import Contiguous, KVShape, Paged

B, HKV, D = 3, 2, 4
SHAPE = KVShape(B, HKV, D, dtype=torch.float32)


def rows(source: torch.Generator, tokens: int, batch: int = B) -> Tensor:
    return torch.randn(batch, tokens, HKV, D, generator=source)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("per_head", [False, True])
def test_holds_what_was_appended(page_size: int, per_head: bool, source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=300, page_size=page_size, per_head=per_head)
    k, v = rows(source, 50), rows(source, 50)
    for start, stop in ((0, 1), (1, 20), (20, 20), (20, 50)):
        cache.append(k[:, start:stop], v[:, start:stop])
    assert all(torch.equal(a, b) for a, b in zip(cache.dense(), (k, v), strict=True))
    assert cache.lengths.tolist() == cache.host_lengths == [[50] * (2 if per_head else 1)] * B
    assert cache.seen.tolist() == cache.host_seen == [50] * B


@pytest.mark.parametrize("last", [False, True])
def test_counts_choose_the_first_or_the_last_rows(last: bool, source: torch.Generator) -> None:
    cache = Contiguous(SHAPE, max_tokens=9)
    k, v = rows(source, 9), rows(source, 9)
    cache.append(k, v, counts=(4, 0, 9), last=last)
    held = cache.dense()[0]
    assert torch.equal(held[0, :4], k[0, 5:] if last else k[0, :4])
    assert torch.equal(held[2], k[2])
    assert bool((held[1] == 0).all())


def test_bytes_follow_the_tokens(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=64, page_size=8)
    k = rows(source, 64)
    cache.append(k, k)
    full = cache.bytes()
    row = HKV * D * 4 * 2
    assert full == B * 64 * row + B * 8 * 4
    cache.keep(torch.arange(48, 64).expand(B, 1, -1))
    assert cache.free_pages == 64 - B * 2
    assert cache.bytes() == B * 16 * (row + HKV * 4) + B * 2 * 4  # and a position for each


def test_running_out_changes_nothing_and_can_go_on(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=6, page_size=4)
    k = rows(source, 8)
    cache.append(k, k)
    before = [x.clone() for x in (*cache.dense(), cache.lengths, cache.page_table)]
    with pytest.raises(fv.errors.OutOfPagesError, match="unchanged"):
        cache.append(k[:, :1], k[:, :1])
    after = (*cache.dense(), cache.lengths, cache.page_table)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    cache.free([1])
    cache.append(k[:, :3], k[:, :3], counts=(3, 0, 2))
    assert cache.host_lengths == [[11], [0], [10]]
    assert torch.equal(cache.dense()[0][0, 8:], k[0, :3])


@pytest.mark.parametrize("at", ["reserve", "_encoded"])
def test_an_interrupted_append_can_be_repeated(
    at: str, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Paged(SHAPE, pages=12, page_size=4)
    k = rows(source, 13)
    cache.append(k[:, :6], k[:, :6])
    before = [x.clone() for x in (*cache.dense(), cache.lengths, cache.seen)]

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.append(k[:, 6:], k[:, 6:])
    after = (*cache.dense(), cache.lengths, cache.seen)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    cache.append(k[:, 6:], k[:, 6:])
    assert torch.equal(cache.dense()[0], k)
    cache.free()
    assert cache.free_pages == 12


def test_a_sequence_longer_than_its_table_is_refused(source: torch.Generator) -> None:
    cache = Contiguous(SHAPE, max_tokens=5)
    with pytest.raises(fv.errors.CacheError, match="max_tokens"):
        cache.append(rows(source, 6), rows(source, 6))
    assert cache.host_lengths == [[0]] * B


@pytest.mark.parametrize("per_head", [False, True])
def test_evicted_tokens_are_gone_and_the_rest_is_as_it_was(
    per_head: bool, source: torch.Generator
) -> None:
    cache = Paged(SHAPE, pages=200, page_size=4, per_head=per_head)
    k, v = rows(source, 30), rows(source, 30)
    cache.append(k, v)
    heads = HKV if per_head else 1
    kept = torch.rand(B, heads, 30, generator=source).argsort(-1)[..., :11].sort(-1).values
    if per_head:
        kept[0, 1, 7:] = -1
    cache.keep(kept)
    q = torch.randn(B, 2, 4, D, generator=source)
    o = fv.decode(q, cache, pattern=fv.Dense())
    for b in range(B):
        for h in range(HKV):
            index = kept[b, h if per_head else 0]
            index = index[index >= 0]
            one = slice(2 * h, 2 * h + 2)
            expected = fv.attend(
                q[b : b + 1, :, one], k[b : b + 1, index, h : h + 1], v[b : b + 1, index, h : h + 1]
            )
            assert torch.allclose(o[b : b + 1, :, one], expected, rtol=0, atol=1e-6)
    assert cache.host_seen == [30] * B
    positions = cache.positions
    assert positions is not None
    assert torch.equal(positions[1], kept[1].int())
    cache.append(k[:, :2], v[:, :2])
    positions = cache.positions
    assert positions is not None
    assert positions[1, 0, 11:].tolist() == [30, 31]


def test_a_budget_that_covers_everything_changes_no_bit(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=40, page_size=4)
    k, v = rows(source, 30), rows(source, 30)
    cache.append(k, v)
    before = cache.bytes()
    cache.keep(torch.arange(30).expand(B, 1, -1))
    assert torch.equal(cache.dense()[0], k)
    assert cache.positions is None
    assert cache.bytes() == before


def test_a_window_counts_positions_behind_an_eviction(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=40, page_size=4)
    k, v = rows(source, 30), rows(source, 30)
    cache.append(k, v)
    kept = torch.tensor([0, 1, 12, 20, 21, 25, 29])
    cache.keep(kept.expand(B, 1, -1))
    q = torch.randn(B, 1, 2, D, generator=source)
    o = fv.decode(q, cache, pattern=fv.Sliding(8, 0, 1))
    seen = torch.tensor([0, 21, 25, 29])  # 29 - 8 and later, and the first token
    assert torch.allclose(o, fv.attend(q, k[:, seen], v[:, seen]), rtol=0, atol=1e-6)


def test_trim_frees_what_no_window_sees(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=40, page_size=4)
    k, v = rows(source, 30), rows(source, 30)
    cache.append(k, v)
    q = torch.randn(B, 1, 2, D, generator=source)
    before = fv.decode(q, cache, pattern=fv.Sliding(7))
    cache.trim(8)
    assert cache.host_lengths == [[10]] * B
    assert cache.free_pages == 40 - 3 * B
    assert torch.equal(fv.decode(q, cache, pattern=fv.Sliding(7)), before)
    score = fv.Softmax() + fv.Alibi(torch.ones(2))
    expected = fv.attend(q, k[:, 20:], v[:, 20:], fv.Causal(), score)
    assert torch.allclose(fv.decode(q, cache, score), expected, rtol=0, atol=1e-6)


def test_crop_takes_back_the_newest(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=40, page_size=4)
    k = rows(source, 30)
    cache.append(k, k)
    cache.crop([25, 30, 17])
    assert cache.host_seen == [25, 30, 17]
    assert cache.free_pages == 40 - 7 - 8 - 5
    cache.keep(torch.arange(10).expand(B, 1, -1))
    cache.append(k[:, :3], k[:, :3])
    cache.crop([27, 32, 19])
    assert cache.host_lengths == [[12]] * B
    with pytest.raises(fv.errors.CacheError, match="eviction"):
        cache.crop(10)


def test_forks_share_pages_until_they_write(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=12, page_size=4)
    k, v = rows(source, 10), rows(source, 10)
    cache.append(k, v, counts=(10, 0, 0))
    cache.fork(0, [1, 2])
    assert cache.free_pages == 12 - 3
    new = rows(source, 1)
    cache.append(new, new)
    assert cache.free_pages == 12 - 5  # the last page for each, one of them as it was
    held = cache.dense()[0]
    assert torch.equal(held[:, :10], k[:1].expand(B, -1, -1, -1))
    assert torch.equal(held[:, 10:], new)
    cache.free()
    assert cache.free_pages == 12


def test_beams_are_reordered(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=30, page_size=4)
    k, v = rows(source, 10), rows(source, 10)
    cache.append(k, v, counts=(10, 7, 3))
    cache.reorder([1, 1, 0])
    assert cache.host_lengths == [[7], [7], [10]]
    assert torch.equal(cache.dense()[0][2], k[0])
    assert torch.equal(cache.dense()[0][1, :7], k[1, :7])


def test_a_weight_moves_with_its_key(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=40, page_size=4, biased=True)
    k, v = rows(source, 12), rows(source, 12)
    bias = torch.randn(B, 12, HKV, generator=source)
    cache.append(k, v, bias=bias)
    q = torch.randn(B, 1, 2, D, generator=source)
    score = fv.KeyBias(bias.transpose(1, 2))
    assert torch.allclose(fv.decode(q, cache), fv.attend(q, k, v, score=score), rtol=0, atol=1e-6)
    cache.keep(torch.tensor([2, 5, 11]).expand(B, 1, -1))
    kept = fv.KeyBias(bias.transpose(1, 2)[..., [2, 5, 11]])
    expected = fv.attend(q, k[:, [2, 5, 11]], v[:, [2, 5, 11]], score=kept)
    assert torch.allclose(fv.decode(q, cache), expected, rtol=0, atol=1e-6)


def test_a_merged_token_stands_for_many(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=40, page_size=4, biased=True)
    k, v = rows(source, 12), rows(source, 12)
    k[:, 3:7] = k[:, 3:4]
    cache.append(k, v)
    q = torch.randn(B, 1, 2, D, generator=source)
    before = fv.decode(q, cache)
    weight = torch.full((B, 1, 1), 4.0).log()
    index = torch.full((B, 1, 1), 3)
    cache.rewrite(index, k[:, 3:4], v[:, 3:7].mean(1, keepdim=True), weight)
    cache.keep(torch.tensor([0, 1, 2, 3, 7, 8, 9, 10, 11]).expand(B, 1, -1))
    assert torch.allclose(fv.decode(q, cache), before, rtol=0, atol=1e-6)


def test_room_can_be_made_beforehand(source: torch.Generator) -> None:
    cache = Paged(SHAPE, pages=12, page_size=4)
    cache.reserve([5, 0, 1])
    assert cache.free_pages == 9
    k = rows(source, 5)
    cache.append(k, k, counts=(5, 0, 1))
    assert cache.free_pages == 9


BAD = {
    "k": lambda c, k: c.append(k[:, :, :1], k),
    "v": lambda c, k: c.append(k, k[:, :3]),
    "counts": lambda c, k: c.append(k, k, counts=(1, 2)),
    "bias": lambda c, k: c.append(k, k, bias=k[..., 0]),
    "indices": lambda c, k: c.keep(torch.zeros(B, HKV, 1, dtype=torch.int64)),
    "length": lambda c, k: c.keep(torch.full((B, 1, 1), 99)),
    "sequences": lambda c, k: c.free([B]),
    "pages": lambda c, k: Paged(SHAPE, pages=0),
    "head_dim": lambda c, k: KVShape(1, 1, 0),
}


@pytest.mark.parametrize("word", BAD)
def test_bad_input_is_named(word: str, source: torch.Generator) -> None:
    cache, k = Paged(SHAPE, pages=8), rows(source, 4)
    cache.append(k, k)
    with pytest.raises(fv.errors.FovealError, match=word):
        BAD[word](cache, k)
