"""What every policy owes: what it keeps of attention made by hand, what it frees, what it leaves alone."""

import dataclasses
from typing import Any

import pytest
import torch

import foveal as fv
from foveal import errors
from foveal.caches.policies import (
    ARKV,
    AVL,
    POLICIES,
    Counts,
    Decision,
    DiffusionLayer,
    ElasticCache,
    FastGen,
    Held,
    KVCompose,
    KVMerger,
    LtriLLM,
    Mustafar,
    PagedEviction,
    Policy,
    Reading,
    S3Attention,
    ScaleKV,
    SnapKV,
    TaskKV,
)
from foveal.patterns import Causal
from foveal.scores import Softmax

L, HEADS, D = 64, 2, 8


def reading(needle: int | None = None, seed: int = 0, batch: int = 2, **more: Any) -> Reading:
    """Random q, k, v; every query looks at one key alone where a needle is named."""
    source = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, L, 2 * HEADS, D, generator=source)
    k, v = (torch.randn(batch, L, HEADS, D, generator=source) for _ in range(2))
    if needle is not None:
        direction = torch.nn.functional.normalize(torch.ones(D), dim=0)
        q = 10 * direction.expand_as(q).clone()
        k = 0.01 * k
        k[:, needle] = 30 * direction
    real = torch.ones(batch, HEADS, L, dtype=torch.bool)
    positions = torch.arange(L).expand(batch, HEADS, -1)
    options = {"scale": D**-0.5, "tokens": torch.zeros(batch, L, dtype=torch.int64)} | more
    return Reading(q=q, k=k, v=v, real=real, positions=positions, **options)


def decide(policy: Policy, given: Reading) -> Decision:
    return policy.settle([policy.vote(given)], L)[0]


SEEKING = {
    "snapkv": SnapKV(budget=16, window=4),
    "fastgen": FastGen(budget=16),
    "arkv": ARKV(budget=16, window=4),
    "task_kv": TaskKV(budget=16, window=4, share=0, least=0, sink_tokens=2, recent=4, top=4),
    "kv_compose": KVCompose(budget=16, window=4),
    "kv_merger": KVMerger(budget=16),
    "scale_kv": ScaleKV(budget=24),
    "a_vl": AVL(budget=16, image=1),
    "ltri_llm": LtriLLM(budget=16, window=4, recent=4, span=4, longest=4),
    "s3_attention": S3Attention(budget=16, window=4, recent=4, sink_tokens=1, span=1),
}


@pytest.mark.parametrize("name", SEEKING)
def test_the_one_token_that_all_attend_to_stays(name: str) -> None:
    decision = decide(SEEKING[name], reading(needle=20))
    at_hand = decision.keep if decision.idle is None else decision.keep & ~decision.idle
    assert bool(at_hand[..., 20].all())


@pytest.mark.parametrize("name", SEEKING)
def test_the_newest_token_stays(name: str) -> None:
    decision = decide(SEEKING[name], reading())
    at_hand = decision.keep if decision.idle is None else decision.keep & ~decision.idle
    assert bool(at_hand[..., -1].all()) or name == "scale_kv"


@pytest.mark.parametrize(
    "policy",
    [SnapKV(budget=16), KVCompose(budget=16), PagedEviction(budget=16), S3Attention(budget=16)],
    ids=lambda policy: type(policy).__name__,
)
def test_every_head_keeps_the_budget(policy: Policy) -> None:
    keep = decide(policy, reading()).keep
    assert bool((keep.sum(-1) == 16).all())
    assert bool(keep[..., -1].all())


@pytest.mark.parametrize("name", POLICIES)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    policy = SEEKING.get(name, POLICIES[name](budget=16))
    both, scale = reading(), D**-0.5
    one = Reading(
        both.q[1:], both.k[1:], both.v[1:], both.real[1:], both.positions[1:], scale,
        tokens=both.tokens[1:] if both.tokens is not None else None,
    )  # fmt: skip
    assert torch.equal(decide(policy, both).keep[1:], decide(policy, one).keep)


def test_layers_compete_for_the_budget() -> None:
    sharp, flat = reading(needle=20), reading(seed=1)
    policy = KVCompose(budget=16, window=4)
    flat = dataclasses.replace(flat, q=0 * flat.q)
    first, second, third = policy.settle([policy.vote(x) for x in (flat, sharp, flat)], L)
    kept = [int(x.keep.sum(-1)[0, 0]) for x in (first, second, third)]
    assert kept[0] == max(kept)
    assert sum(kept[1:]) <= 3 * 16


def test_half_of_arkv_is_in_eight_bits_when_a_layer_matters_less() -> None:
    policy = ARKV(budget=40, window=4)
    sharp = reading(needle=20)
    flat = dataclasses.replace(reading(seed=1), q=0 * reading().q)
    decisions = policy.settle([policy.vote(x) for x in (sharp, flat)], L)
    reduced = [int(d.reduced.sum()) for d in decisions if d.reduced is not None]
    assert max(reduced) > 0
    assert min(reduced) == 0


def test_pages_leave_as_they_fill() -> None:
    policy = PagedEviction(budget=32, page_size=8)
    assert not policy.due(Counts(1, 39, 100))
    assert policy.due(Counts(1, 40, 100))
    given = reading()
    one = dataclasses.replace(given, q=given.q[:, -1:])
    keep = decide(policy, one).keep.unflatten(-1, (-1, 8))
    assert bool((keep.all(-1) | ~keep.any(-1)).all())
    assert bool((keep.any(-1).sum(-1) == 4).all())
    assert bool(keep[..., -1, :].all())


def test_drafting_layers_hold_more() -> None:
    policy = ScaleKV(budget=20, drafters=(0,), ratio=4.0)
    capacities = [policy.capacity(n, 3, L) for n in range(3)]
    assert capacities == [40, 10, 10]


def test_equal_neighbours_merge_without_a_trace() -> None:
    given = reading()
    k, v = given.k.clone(), given.v.clone()
    k[:, 20:40], v[:, 20:40] = k[:, 20:21], v[:, 20:21]
    policy = KVMerger(budget=L - 19, heavy=0.0, recent=0.1)
    held = Held()
    held.append(k, v)
    held.settle(decide(policy, dataclasses.replace(given, k=k, v=v)))
    left, _values, real, _ = held.everything()
    assert bool((real.sum(-1) == L - 19).all())
    expected = torch.cat([k[:, :20], k[:, 39:]], dim=1)
    torch.testing.assert_close(left, expected)


def test_what_is_held_attends_as_the_kept_tokens_do() -> None:
    given = reading()
    held = Held()
    held.append(given.k, given.v)
    keep = torch.rand(2, HEADS, L, generator=torch.Generator().manual_seed(2)) < 0.4
    keep[0, 1] = False
    held.settle(Decision(keep))
    q = given.q[:, -3:]
    held.append(given.k[:, :3], given.v[:, :3])
    o = held.attend(q, Softmax())
    for b in range(2):
        for h in range(2 * HEADS):
            g = h // 2
            for i in range(3):
                rows = torch.cat([given.k[b, keep[b, g], g], given.k[b, : i + 1, g]])
                values = torch.cat([given.v[b, keep[b, g], g], given.v[b, : i + 1, g]])
                weights = (rows @ q[b, i, h] * D**-0.5).softmax(0)
                torch.testing.assert_close(o[b, i, h], weights @ values, rtol=1e-4, atol=1e-5)
    assert held.bytes() == int(keep.sum()) * (2 * D * 4 + 4) + 2 * 3 * HEADS * 2 * D * 4


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_reduced_tokens_attend_as_what_comes_back(sparsity: float) -> None:
    given, held = reading(), Held()
    held.append(given.k, given.v)
    keep = torch.rand(2, HEADS, L, generator=torch.Generator().manual_seed(2)) < 0.7
    reduced = torch.rand(2, HEADS, L, generator=torch.Generator().manual_seed(3)) < 0.5
    whole = held.bytes()
    held.settle(Decision(keep, reduced=reduced, sparsity=sparsity))
    assert held.bytes() < whole  # rows of 8 entries, of which bitmaps pad fewer to 8
    k, v, real, _ = held.everything()
    for x, before in ((k, given.k), (v, given.v)):
        near = x[:, :, 0][real[:, 0]]
        far = before[:, :, 0][keep[:, 0]]
        if sparsity == 0:
            torch.testing.assert_close(near, far, rtol=0.07, atol=0.02)
        else:
            assert bool(((near == far) | (near == 0)).all())
    q = given.q[:, -2:]
    products = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * D**-0.5
    hidden = ~real.repeat_interleave(2, 1)[:, :, None]
    weights = products.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(held.attend(q, Softmax()), expected, rtol=1e-4, atol=1e-5)


def test_pieces_are_caches_of_the_decode_engine() -> None:
    given, held = reading(), Held()
    held.append(given.k, given.v)
    held.settle(decide(FastGen(budget=12, recovery=0.6), given))
    (piece,) = held.pieces
    assert piece.lengths.shape == (2, HEADS)
    q = given.q[:, -3:]
    found = [fv.decode(q, piece, pattern=fv.Dense(), implementation=name) for name in ("cpu", None)]
    exact = fv.decode(q, piece, pattern=fv.Dense(), implementation="reference")
    for o in found:
        torch.testing.assert_close(o, exact, rtol=1e-4, atol=1e-5)
    k, v = piece.dense()
    assert torch.equal(k, held.everything()[0])
    assert v.shape == k.shape
    with pytest.raises(errors.CacheError, match="takes them"):
        piece.append(k, v)


def test_beams_take_their_tokens_along() -> None:
    given, held = reading(), Held()
    held.append(given.k, given.v)
    held.settle(decide(SnapKV(budget=16, window=4), given))
    held.append(given.k[:, :1], given.v[:, :1])
    before = held.everything()
    held.reorder(torch.tensor([1, 1, 0]))
    for old, new in zip(before, held.everything(), strict=True):
        assert torch.equal(new, old[[1, 1, 0]])


def test_tokens_that_came_since_can_be_taken_back() -> None:
    given, held = reading(), Held()
    held.append(given.k, given.v)
    held.settle(decide(SnapKV(budget=16, window=4), given))
    held.append(given.k[:, :5], given.v[:, :5])
    held.crop(3)
    assert (held.stored, held.seen) == (18, L + 2)
    with pytest.raises(errors.CacheError, match="at most the 2 tokens"):
        held.crop(3)
    assert (held.stored, held.seen) == (18, L + 2)


def test_spans_at_hand_change_and_nothing_is_lost() -> None:
    policy = LtriLLM(budget=16, window=4, recent=4, span=4, longest=8)
    given, held = reading(), Held()
    held.append(given.k, given.v)
    held.settle(decide(policy, given))
    total = L * 2 * HEADS * (2 * D * 4 + 4)
    assert held.bytes() + held.host_bytes() == total
    assert held.bytes() <= total / 4
    assert held.memo is not None
    k, v, _real, _positions = held.everything()
    assert torch.equal(k, given.k)
    assert torch.equal(v, given.v)


def test_nothing_is_pruned_before_it_is_old() -> None:
    policy = Mustafar(recent=8, sparsity=0.5)
    decision = decide(policy, reading())
    assert decision.reduced is not None
    assert int(decision.reduced[0, 0].sum()) == L - 8
    assert bool(decision.keep.all())


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.5, True])
def test_budgets_out_of_range(budget: Any) -> None:
    with pytest.raises(errors.SelectionError, match="budget"):
        SnapKV(budget=budget)


def network(layers: int, seed: int = 0) -> list[DiffusionLayer]:
    source = torch.Generator().manual_seed(seed)

    def layer() -> DiffusionLayer:
        w = [0.3 * torch.randn(8, 16, generator=source) for _ in range(3)]
        back = 0.3 * torch.randn(16, 8, generator=source)
        return DiffusionLayer(
            lambda x: tuple((x @ m).unflatten(-1, (2, 8)) for m in w),  # type: ignore[arg-type,return-value]
            lambda x, o: x + o.flatten(-2) @ back,
        )

    return [layer() for _ in range(layers)]


def test_elastic_cache_with_all_tokens_active_is_the_network() -> None:
    layers, x, y = network(3), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    _, state = ElasticCache(drift=-1).start(layers, x)
    found = ElasticCache(drift=-1).step(layers, y, torch.arange(9), state)
    torch.testing.assert_close(found, ElasticCache().start(layers, y)[0], rtol=1e-4, atol=1e-5)


def test_drift_decides_how_much_is_recomputed() -> None:
    layers, x = network(4), torch.randn(1, 32, 8)
    changed = torch.randn(1, 4, 8)
    counts = {}
    for drift in (-1.0, 1.0):
        elastic = ElasticCache(drift)
        _, state = elastic.start(layers, x)
        state.recomputed = 0
        elastic.step(layers, changed, torch.arange(4), state)
        counts[drift] = state.recomputed
        assert state.bytes() == 4 * 2 * 32 * 16 * 4
    assert counts[-1.0] == 4 * 4
    assert counts[1.0] == 4 + 3 * 32


def test_the_causal_window_is_as_attention_sees_it() -> None:
    """The sums of a window are what attention with one-hot values returns."""
    from foveal import attend
    from foveal.caches.policies.statistics import attention_sums, triangle_mass, window_weights

    given = reading()
    eye = torch.eye(L).expand(2, L, L)[:, :, None].expand(-1, -1, HEADS, -1)
    P = attend(given.q, given.k, eye, Causal()).transpose(1, 2)
    torch.testing.assert_close(window_weights(given, 5), P[:, :, -5:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention_sums(given), P.sum(2), rtol=1e-4, atol=1e-5)
    mass = triangle_mass(given, 4)
    j = 10
    expected = sum(P[:, :, i, j : i + 1].sum(-1) for i in range(j, j + 4))
    torch.testing.assert_close(mass[:, :, j], expected, rtol=1e-4, atol=1e-6)
