"""Systems of `sparse` and `cache`: edges of options, and arguments that are refused before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal import attend, errors, system
from foveal._shares import share_of
from foveal.caches.policies import (
    ARKV,
    AVL,
    FastGen,
    KVCompose,
    KVMerger,
    S3Attention,
    ScaleKV,
    TaskKV,
    Vote,
)
from foveal.compose.native_sparse import SparseBranches, compress_mean, window_tokens
from foveal.patterns import Causal, Sliding
from foveal.selectors import Compressed, Levels, Tiling, TopRatio, VerticalSlash, cluster
from foveal.systems.sparse.heads import Head, Mode

L, HQ, HKV, D, DV = 40, 4, 2, 8, 6
Q, K, V = torch.randn(1, L, HQ, D), torch.randn(1, L, HKV, D), torch.randn(1, L, HKV, DV)


def draw(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def qkv(source: torch.Generator, length: int, heads: int = HQ) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(source, 1, length, heads, D),
        draw(source, 1, length, HKV, D),
        draw(source, 1, length, HKV, DV),
    )


@pytest.mark.parametrize("length", [1, 20, 35, 60])
def test_superlinear_on_texts_shorter_than_its_window(length: int, source: torch.Generator) -> None:
    q, k, v = qkv(source, length)
    o = system("superlinear").op(q, k, v)
    torch.testing.assert_close(o, attend(q, k, v, Sliding(79)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 5, 21, 40])
def test_windows_longer_than_the_text(length: int, source: torch.Generator) -> None:
    branches = SparseBranches(
        length=64, stride=4, block=8, best=2, sink_blocks=1, local_blocks=1, window=3
    )
    q, k, v = qkv(source, length)
    table = branches.windows(q, k)
    assert compress_mean(k, table).shape[1] == table.count
    assert window_tokens(k, table).shape[1:3] == (table.count, 64)
    gates = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(1, length, HQ, 3)
    o = system("nsa").op(q, k, v, gates, branches=branches)
    assert not o.any()  # no window has ended


def test_blocks_score_every_window_that_overlaps_them(source: torch.Generator) -> None:
    """Three strides long, two earlier windows reach into a block."""
    q, k = draw(source, 1, 48, HQ, D), draw(source, 1, 48, HKV, D)
    got = Compressed(12, 4, "max").scores(q, k, Tiling(48, 48, 1, 8, True))
    means = k.unfold(1, 12, 4).mean(-1).repeat_interleave(2, dim=2)
    s = torch.einsum("bihd,bwhd->bhiw", q, means) / math.sqrt(D)
    ended = torch.arange(means.shape[1]) * 4 + 11 <= torch.arange(48)[:, None]
    p = s.masked_fill(~ended, -torch.inf).softmax(-1).nan_to_num(0.0).unflatten(1, (HKV, 2)).sum(2)
    starts = torch.arange(means.shape[1]) * 4
    for j in range(6):
        own = p[..., (starts < 8 * j + 8) & (starts + 12 > 8 * j)]
        torch.testing.assert_close(got[..., j], own.amax(-1), rtol=1e-9, atol=1e-9)


def test_shares_of_counts_are_rounded_once() -> None:
    counts = torch.arange(0, 2001)
    for percent in (1, 7, 14, 28, 29, 30, 55, 56, 57, 58, 99, 100):
        right = -(-counts * percent // 100)
        assert torch.equal(share_of(counts, percent / 100), right)
        assert [share_of(int(n), percent / 100) for n in counts] == right.tolist()


@pytest.mark.parametrize("share", [0.07, 0.14, 0.3, 0.56])
def test_shares_keep_no_key_too_many(share: float) -> None:
    scores = torch.rand(1, 1, 1, 100)
    kept = TopRatio(share).keep(scores, Tiling(1, 100, 1, 1, False))
    assert int(kept.sum()) == round(100 * share)
    x = torch.randn(1, 100, 4)
    short = system("representation_shift").op(x, torch.randn(1, 100, 4), keep=share)
    assert short.shape[1] == round(100 * share)


def test_loki_keeps_its_share_of_the_visible_keys(source: torch.Generator) -> None:
    q, k, _ = qkv(source, 100)
    v = torch.eye(100, dtype=torch.float64)[None, :, None].expand(1, -1, HKV, -1)
    for percent in (7, 30, 60):
        weights = system("loki").op(q, k, v, share=percent / 100, rank_share=1.0)
        kept = (weights > 0).sum(-1)[0]
        right = -(-torch.arange(1, 101) * percent // 100)
        assert torch.equal(kept, right[:, None].expand_as(kept))


def test_more_first_columns_than_columns_are_the_first_ones() -> None:
    q, k = torch.randn(1, 96, 2, D), torch.randn(1, 96, 1, D)
    found = VerticalSlash(vertical=3, slash=2, sinks=30, local=100, queries=8, tile=1).select(q, k)
    o = system("minference").op(
        q, k, torch.eye(96)[None, :, None], vertical=3, slash=2, sinks=30, local=100, tile=1
    )
    seen = (o > 0)[0].transpose(0, 1)
    row, column = torch.arange(96)[:, None], torch.arange(96)
    right = (column <= row) & ((column < 3) | (row - column < 2))
    assert torch.equal(seen, right.expand_as(seen))
    assert found.starts.shape[1] == 2


def test_heads_that_are_all_skipped_have_gradients_of_zero(source: torch.Generator) -> None:
    inputs = [draw(source, 1, 12, 2, D).requires_grad_() for _ in range(3)]
    o = system("sparse_vdit").op(*inputs, frame=4, modes=("skip",))
    assert not o.any()
    for gradient in torch.autograd.grad(o.sum(), inputs):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_sparsek_may_be_wider(dtype: torch.dtype, source: torch.Generator) -> None:
    q, k, v = (x.to(dtype) for x in qkv(source, 24))
    scores = draw(source, 1, 24, HKV).float()
    o = system("sparsek").op(q, k, v, scores, keys=4)
    assert o.dtype == dtype
    exact = system("sparsek").op(q.double(), k.double(), v.double(), scores.double(), keys=4)
    assert float((o.double() - exact).abs().max()) < 8 * torch.finfo(dtype).eps * float(
        v.abs().max()
    )


def _gates(blocks: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, L, HKV, 6), torch.randn(1, blocks, HKV, 6)


def _clusters(keys: int) -> Any:
    return cluster(K[:, :keys], 3)


def case(name: str, argument: str, *tensors: Any, **options: Any) -> Any:
    given = tensors or (Q, K, V)
    plain = int, float, str, bool, tuple
    shown = ", ".join(
        f"{key}={value!r}"[:40] if isinstance(value, plain) and "tensor" not in repr(value) else key
        for key, value in options.items()
    )
    return pytest.param(name, argument, given, options, id=f"{name} {argument} {shown}"[:70])


SCORES = torch.randn(1, L, HKV)
FEW = torch.randn(1, 5, HKV, D), torch.randn(1, 5, HKV, DV)
BRANCHES = SparseBranches(length=8, stride=4, block=8, best=3, local_blocks=1, window=4)
HEADS = torch.randn(1, L, HQ + 1, D)
KINDS = torch.arange(L) % 2
QUERY = (Head("query", (Mode("dense"),) * 2),)
REFUSED = [
    # Taken in silence once: another result than the caller asked for.
    case("seer_attention_r", "threshold", Q, K, V, *_gates(5), block=8, budget=8, threshold=-0.1),
    case("seer_attention_r", "threshold", Q, K, V, *_gates(5), block=8, budget=8, threshold=2.0),
    case("seer_attention_r", "threshold", Q, K, V, *_gates(5), block=8, threshold=math.nan),
    case("nosa", "local_blocks", Q, K, V, SCORES, local_blocks=0),
    case("nosa", "window", Q, K, V, SCORES, window=-1),
    case("nosa", "importance", Q, K, V, SCORES[:, :30]),
    case("nosa", "importance", Q, K, V, SCORES[..., :1]),
    case("polar_sparsity", "scores", Q, K, V, torch.randn(1, HQ), heads=1),
    case("polar_sparsity", "k", HEADS, K, V, torch.randn(1, HKV), heads=1),
    case("sla", "critical", critical=-0.1),
    case("sla", "critical", critical=math.nan),
    case("sla", "negligible", negligible=1.1),
    case("sla", "feature", Q, K, V, torch.eye(DV), feature="gelu"),
    case("sla", "weight", Q, K, V, torch.eye(D)),
    case("pyramid_sparse", "levels", levels=((1, 0.5), (2, 0.3))),
    case("pyramid_sparse", "levels", levels=((1, 1.5),)),
    case("pyramid_sparse", "levels", levels=((0, 0.5),)),
    case("pyramid_sparse", "levels", levels=((1, math.nan),)),
    case("pyramid_sparse", "levels", levels=None),
    case("pyramid_sparse", "sample", sample=1.5),
    case("pyramid_sparse", "sample", sample=0),
    case("core_context", "q", Q[:, :20], K, V),
    case("core_context", "group", group=None),
    case("sparsek", "q", Q[:, :20], K, V, SCORES),
    case("sparsek", "scores", Q, K, V, torch.randn(1, L, HQ)),
    case("sparsek", "keys", Q, K, V, SCORES, keys=1.5),
    case("learnable_token_eviction", "q", Q[:, :20], K, V, SCORES),
    case("learnable_token_eviction", "scores", Q, K, V, torch.randn(1, L, HQ)),
    case("learnable_token_eviction", "scores", Q, K, V, torch.randn(L, HKV)),
    case("learnable_token_eviction", "scores", Q, K, V, None),
    case("nats", "types", Q, K, V, torch.randn(1, L, HKV, 2)),
    case("lemo", "scores", Q, K, V, torch.randn(2, 5), block=8),
    case("sea", "beta", Q, K, V, torch.rand(1, HQ, L, 5), None, torch.rand(1, L, 1)),
    case("sea", "shares", Q, K, V, torch.rand(1, HQ, L, 0)),
    case("superlinear", "anchors", anchors=0),
    case("superlinear", "backward", backward=-1.0),
    case("superlinear", "exponent", exponent=math.inf),
    case("superlinear", "search_q", Q, K, V, Q[:, :3]),
    case("monarch_rt", "k", Q, K.repeat(2, 1, 1, 1), V.repeat(2, 1, 1, 1), rows=2, columns=2),
    case("monarch_rt", "rows", rows=2.0, columns=5),
    case("minference", "sinks", sinks=-1),
    case("minference", "local", local=-1),
    case("minference", "k", HEADS, K, V),
    case("minference", "heads", heads=(1, 2, 3, 4)),
    case("mminference", "heads", heads=None),
    case("mminference", "kinds", Q, K, V, KINDS.float(), heads=QUERY),
    case("mminference", "kinds", Q, K, V, KINDS - 1, heads=(Head("query", (Mode("dense"),)),)),
    case("mminference", "modes", heads=QUERY),
    case("xattention", "stride", stride=0),
    case("xattention", "k", Q.double(), K, V),
    case("pbs_attention", "mass", mass=1.1),
    case("pbs_attention", "mass", mass=math.nan),
    case("pbs_attention", "queries", queries=0),
    case("sale", "threshold", threshold=-0.1),
    case("sale", "threshold", threshold=math.nan),
    case("vggt_block_sparse", "least", frame=20, least=1.2),
    case("vggt_block_sparse", "frame", frame=0),
    case("sparse_vdit", "frame", Q, Q, Q, frame=0),
    case("squeezed_attention", "threshold", Q[:, :5], K, V, threshold=-1.0),
    case("squeezed_attention", "clusters", Q[:, :5], K[:, :20], V[:, :20], _clusters(30)),
    case("squeezed_attention", "coarse", Q[:, :5], K, V, _clusters(30), coarse=_clusters(20)),
    case("squeezed_attention", "clusters", Q[:, :5], Q, Q, _clusters(30)),
    case("loki", "basis", Q, K, V, torch.randn(HQ, D, D)),
    case("spatten", "bits", bits=1),
    case("spatten", "importance", Q, K, V, torch.rand(1, 3)),
    case("delta_token_attention", "sinks", sinks=-1),
    case("delta_token_attention", "page", page=0),
    case("self_selected_span", "stops", Q, K, V, torch.zeros(1, L, 2, dtype=torch.long)),
    case("self_selected_span", "starts", Q, K, V, torch.zeros(1, L, 2), torch.zeros(1, L, 2)),
    case("infllm_v2", "length", length=0, dense_length=0),
    case("infllm_v2", "blocks", blocks=40.5, dense_length=0),
    case("infllm_v2", "k", HEADS, K, V, dense_length=0),
    case("nsa", "branches", branches=None),
    case("nsa", "compressed", Q, K, V, None, FEW, branches=BRANCHES),
    case("nsa", "compressed", Q, K, V, None, K, branches=BRANCHES),
    case("adasplash", "causal", causal="yes"),
    case("representation_shift", "after", torch.ones(1, 9, 4), torch.ones(1, 8, 4)),
    case("snapkv", "k", HEADS, K, V),
    case("snapkv", "q", torch.randn(1, 50, HQ, D), K, V),
    case("snapkv", "v", Q, K, V[:, :20]),
    case("a_vl", "image", image=-1),
    case("a_vl", "image", image=100),
    case("lean_attention", "tile", tile=1.5),
    case("dist_attention", "segments", segments=None),
    case("vattention", "v", Q, K, None),
    case("matryoshka_kv", "ranks", Q, K, V, torch.eye(D)[None], torch.eye(DV)[None], ranks=-1),
    case("retrieval_attention", "keys", keys=-1),
    case("louis_kv", "alike", alike=math.nan),
    case("louis_kv", "pages", pages=-1),
    case("elastic_cache", "new_k", Q[:, :5], K, V, K[:, :4], V[:, :4]),
    case("cca", "filter", Q, K, K, *(torch.ones(3, 6, D), torch.ones(6, D)),
         *(torch.ones(2, 6, D, D), torch.ones(6, D), torch.ones(HKV))),
    case("cca", "temperature", Q, K, K, *(torch.ones(2, 6, D), torch.ones(6, D)),
         *(torch.ones(2, 6, D, D), torch.ones(6, D), torch.ones(1))),
    case("head_embeddings", "k", Q[:, :, :1], K, K, *(torch.ones(HQ, D),) * 3),
    case("head_embeddings", "v_embedding", *(Q[:, :, :1],) * 3, *(torch.ones(HQ, D),) * 2,
         torch.ones(1, D)),
    case("super_attention", "x", Q, K),
    case("super_attention", "x", Q, Q[:, :7]),
    case("flash_svd", "k_map", *(Q,) * 3, torch.ones(HQ, D, 3), *(torch.ones(HQ, D, 4),) * 2),
    case("attention_editing", "gate", Q, K, V, torch.ones(1, L, HQ, 1)),
    case("attention_editing", "gate", Q, K, V, torch.ones(2, L, HQ, DV)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument", "tensors", "options"), REFUSED)
def test_what_does_not_fit_is_named(
    name: str, argument: str, tensors: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(errors.FovealError) as raised:
        system(name).op(*tensors, **options)
    said = str(raised.value)
    assert said.startswith(f"{argument}:"), said


POLICIES: list[Callable[[], Any]] = [
    lambda: FastGen(recovery=0.0),
    lambda: FastGen(recovery=1.1),
    lambda: FastGen(special=3),  # type: ignore[arg-type]
    lambda: ARKV(retain=0.0),
    lambda: ARKV(temperatures=(1.0, 1.0)),  # type: ignore[arg-type]
    lambda: ARKV(temperatures=(0.0, 1.0, 1.0)),
    lambda: TaskKV(share=1.1),
    lambda: ScaleKV(ratio=0.5),
    lambda: ScaleKV(drafters=3),  # type: ignore[arg-type]
    lambda: AVL(core=1.1),
    lambda: AVL(text=-0.1),
    lambda: KVMerger(heavy=-0.1),
    lambda: KVMerger(recent=1.1),
    lambda: KVMerger(sigma=0.0),
    lambda: S3Attention(span=4),
    lambda: Levels(((1, 0.5), (2, 0.3))),
    lambda: SparseBranches(length=32.0),  # type: ignore[arg-type]
    lambda: SparseBranches(window=None),  # type: ignore[arg-type]
    lambda: Head("none", (Mode("dense"), Mode("dense"))),
]


@pytest.mark.parametrize("make", POLICIES)
def test_values_out_of_range_cannot_be_made(make: Callable[[], Any]) -> None:
    with pytest.raises(errors.SelectionError):
        make()


def test_checks_leave_autocast_and_compiled_calls_alone() -> None:
    op = system("core_context").op
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = op(Q.bfloat16(), K, V, group=4, window=8)
    assert mixed.dtype == torch.bfloat16
    with pytest.raises(errors.DtypeError):
        op(Q.bfloat16(), K, V, group=4, window=8)
    causal = op(Q, K, V, group=4, window=L)
    torch.testing.assert_close(causal, attend(Q, K, V, Causal()))


def test_large_votes_of_layers_are_not_taken_for_equal() -> None:
    """Values as long as 50 and 5: with by_norm the second layer wins every rank but the first."""
    real = torch.ones(1, 2, 10, dtype=torch.bool)
    age = torch.arange(9, -1, -1).expand(1, 2, 10)
    votes = []
    for length in (5.0, 50.0):
        scores = length * (1 + torch.rand(1, 2, 10)).masked_fill(age == 0, torch.inf)
        votes.append(Vote(scores, real, age))
    first, second = KVCompose(budget=5, by_norm=True).settle(votes, 10)
    assert second.keep.sum(-1).tolist() == [[9, 9]]
    assert first.keep.sum(-1).tolist() == [[9, 9]]  # the first layer keeps as many as the largest
    second, first = KVCompose(budget=5, by_norm=True).settle(votes[::-1], 10)
    assert first.keep.sum(-1).tolist() == [[1, 1]]
    assert second.keep.sum(-1).tolist() == [[9, 9]]
