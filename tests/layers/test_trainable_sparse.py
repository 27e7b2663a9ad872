"""Layers and gates of learned sparse attention: training moves them where it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import nn

import foveal as fv
from foveal.layers.trainable_sparse_blocks import (
    PyramidSparseAttention,
    SparseLinearAttention,
    pool_blocks,
    pyramid_sparse_attention,
    ranks,
    sampled_importance,
)
from foveal.layers.trainable_sparse_gates import (
    NosaImportance,
    SeerGate,
    block_targets,
    distil_gate,
    gate_blocks,
    gate_loss,
    nosa,
    rotate,
    seer_attention,
)
from foveal.layers.trainable_sparse_maps import SparseLinearMapAttention
from foveal.layers.trainable_sparse_tokens import (
    EvictionRouter,
    drop_tokens,
    learnable_token_eviction,
    representation_shift,
    sparse_k,
)
from foveal.testing import Sizes, qkv


def double(source: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def test_pooling_a_short_block_is_the_mean_of_what_is_there(source: torch.Generator) -> None:
    x = double(source, 1, 10, 2, 3)
    pooled = pool_blocks(x, 4)
    torch.testing.assert_close(pooled[:, 2], x[:, 8:].mean(1))
    torch.testing.assert_close(pooled[:, 0], x[:, :4].mean(1))


def test_ranks_give_ties_to_the_lower_index() -> None:
    assert ranks(torch.tensor([1.0, 2.0, 2.0, 0.0])).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("layer", [SparseLinearAttention, PyramidSparseAttention])
def test_every_parameter_gets_a_gradient(layer: type[nn.Module], source: torch.Generator) -> None:
    torch.manual_seed(0)
    if layer is SparseLinearAttention:
        module: nn.Module = SparseLinearAttention(16, 2, block=4, critical=0.3)
    else:
        module = PyramidSparseAttention(16, 2, q_block=8, kv_block=4, levels=((1, 0.5), (2, 1.0)))
    y = module(torch.randn(2, 30, 16, generator=source))
    y.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_training_of_sla_starts_at_its_sparse_part(source: torch.Generator) -> None:
    layer = SparseLinearAttention(8, 2, block=4, critical=0.4)
    x = torch.randn(1, 21, 8, generator=source)
    q, k, v = layer.split(x)
    from foveal.layers.trainable_sparse_blocks import sparse_linear_attention

    sparse = sparse_linear_attention(q, k, v, block=4, critical=0.4)
    torch.testing.assert_close(layer(x), layer.join(sparse))


def test_importance_is_zero_where_the_best_key_of_a_row_is(source: torch.Generator) -> None:
    q, k = double(source, 1, 16, 1, 4), double(source, 1, 16, 1, 4)
    importance = sampled_importance(q, k, 8, 4, 1.0, False, None)
    assert importance.shape == (1, 1, 2, 4)
    assert bool((importance <= 0).all())
    assert bool((importance.amax(-1) == 0).all())


def test_drawn_samples_repeat_with_their_generator(source: torch.Generator) -> None:
    q, k, v = (double(source, 1, 40, 1, 4) for _ in range(3))
    found = [
        pyramid_sparse_attention(
            q, k, v, q_block=8, kv_block=8, generator=torch.Generator().manual_seed(3)
        )
        for _ in range(2)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_rotation_depends_on_the_distance_only(source: torch.Generator) -> None:
    q, k = double(source, 1, 1, 1, 6), double(source, 1, 1, 1, 6)

    def product(a: int, b: int) -> float:
        left, right = rotate(q, torch.tensor([a])), rotate(k, torch.tensor([b]))
        return float((left * right).sum())

    assert product(9, 4) == pytest.approx(product(25, 20))


def test_targets_add_to_one_over_earlier_blocks(source: torch.Generator) -> None:
    q, k = double(source, 2, 21, 4, 6), double(source, 2, 21, 2, 6)
    target = block_targets(q, k, 4)
    assert target.shape == (2, 2, 21, 6)
    torch.testing.assert_close(target[:, :, 4:].sum(-1), torch.ones(2, 2, 17).double())
    assert not target[:, :, :4].any()
    assert not target[:, :, 7, 1:].any()


def test_the_loss_is_zero_where_the_gate_is_the_target(source: torch.Generator) -> None:
    gate_q, gate_k = double(source, 1, 12, 1, 4), double(source, 1, 3, 1, 4)
    target = gate_blocks(gate_q, gate_k, 12, 4)
    assert float(gate_loss(gate_q, gate_k, target, 12, 4)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda gate, q, k: gate(q[:, :, :2], k), "q: got [2, 9, 2, 6]"),
        (lambda gate, q, k: gate(q, k[:, :, :1]), "k: got [2, 9, 1, 6]"),
        (lambda gate, q, k: gate(q[:1], k), "k: got [2, 9, 2, 6]; [1, any, 2, 6]"),
        (lambda gate, q, k: gate(q.double(), k), "q: got torch.float64"),
        (lambda gate, q, k: gate(None, k), "q: got None"),
        (lambda gate, q, k: SeerGate(4, 2, 6, gate_dim=0), "gate_dim: got 0"),
        (lambda gate, q, k: SeerGate(4, 2, 6, base=0.0), "base: got 0.0"),
        (lambda gate, q, k: gate_blocks(q, k[:, :3], 9, 0), "block: got 0"),
        (lambda gate, q, k: gate_blocks(q[:1, :, :2], k[:, :3], 9, 4), "gate_k: got [2, 3, 2, 6]"),
        (lambda gate, q, k: block_targets(q, k, 0), "block: got 0"),
        (lambda gate, q, k: block_targets(q[:1], k, 4), "k: got [2, 9, 2, 6]"),
        (lambda gate, q, k: block_targets(q, k.double(), 4), "k: got torch.float64"),
        (
            lambda gate, q, k: gate_loss(*gate(q, k), torch.zeros(2, 2, 9, 2), 9, 4),
            "target: got [2, 2, 9, 2]; [2, 2, 9, 3]",
        ),
        (lambda gate, q, k: distil_gate(gate, [], rate=float("nan")), "rate: got nan"),
        (lambda gate, q, k: distil_gate(gate, [(q, k, q)]), "batches: got 3 tensors"),
        (lambda gate, q, k: distil_gate(gate, [(q, k, q[:, :5], k)]), "target: got [2, 2, 5, 3]"),
        (lambda gate, q, k: distil_gate(k, [(q, k, q, k)]), "gate: got a Tensor"),
    ],
)
def test_what_does_not_fit_a_gate_is_named(call: Callable[..., object], said: str) -> None:
    with pytest.raises(fv.errors.FovealError) as raised:
        call(
            SeerGate(4, 2, 6, gate_dim=4, block=4), torch.zeros(2, 9, 4, 6), torch.zeros(2, 9, 2, 6)
        )
    assert said in str(raised.value)


def test_a_gate_of_no_tokens() -> None:
    q, k = torch.zeros(2, 0, 4, 6), torch.zeros(2, 0, 2, 6)
    gates = SeerGate(4, 2, 6, gate_dim=4, block=4)(q, k)
    assert gates[1].shape == (2, 0, 2, 4)
    assert seer_attention(q, k, k, *gates, block=4).shape == q.shape


@pytest.mark.parametrize("kind", [SparseLinearAttention, SparseLinearMapAttention])
def test_tokens_that_do_not_fit_are_named(kind: Callable[..., nn.Module]) -> None:
    layer, x = kind(8, 2), torch.zeros(2, 5, 8)
    for given, said in (
        (x[..., :3], "x: got [2, 5, 3]"),
        (x.double(), "x: got torch.float64"),
        (x.long(), "x: got torch.int64"),
        ([1.0], "x: got a list"),
    ):
        with pytest.raises(fv.errors.FovealError) as raised:
            layer(given)
        assert said in str(raised.value)
    assert layer(x[:, :0]).shape == (2, 0, 8)


def test_distillation_teaches_a_gate_its_model(source: torch.Generator) -> None:
    torch.manual_seed(0)
    gate = SeerGate(2, 1, 8, gate_dim=16, block=4)
    q, k, v = qkv(Sizes((48,), None, 2, 2, 1, 8), source)
    q = 2 * q
    losses = distil_gate(gate, [(q, k, q, k)] * 120, rate=1e-2)
    assert losses[-1] < 0.6 * losses[0]
    exact = fv.attend(q, k, v, fv.Causal())

    def error(chosen: SeerGate) -> float:
        found = seer_attention(q, k, v, *chosen(q, k), block=4, budget=16)
        return float((found - exact).square().mean())

    torch.manual_seed(1)
    assert error(gate) < error(SeerGate(2, 1, 8, gate_dim=16, block=4))


def test_a_single_query_takes_the_lists_of_its_row(source: torch.Generator) -> None:
    q, k, v = (x.double() for x in qkv(Sizes((19,), None, 1, 4, 2, 8), source))
    gates = double(source, 1, 19, 2, 6), double(source, 1, 5, 2, 6)
    whole = seer_attention(q, k, v, *gates, block=4, budget=8)
    last = seer_attention(q[:, -1:], k, v, gates[0][:, -1:], gates[1], block=4, budget=8)
    torch.testing.assert_close(last, whole[:, -1:])


def test_nosa_learns_through_its_bias(source: torch.Generator) -> None:
    torch.manual_seed(0)
    layer = NosaImportance(2, 8)
    q, k, v = qkv(Sizes((40,), None, 1, 4, 2, 8), source)
    o = nosa(q, k, v, layer(v), block=8, budget=3, by_query=3, window=8, stride=4)
    o.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in layer.parameters())


def test_a_router_learns_from_the_values(source: torch.Generator) -> None:
    torch.manual_seed(0)
    router = EvictionRouter(2, 8, 8)
    q, k, v = qkv(Sizes((40,), None, 1, 4, 2, 8), source)
    scores = router(k, v)
    assert bool((router(torch.zeros_like(k), torch.zeros_like(v))[:, 4:-4] > 0).any())
    learnable_token_eviction(q, k, v, scores, window=8).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in router.parameters())


@pytest.mark.parametrize("score", ["relu", "sigmoid"])
def test_a_score_is_above_zero_where_the_net_is(
    score: Literal["relu", "sigmoid"], source: torch.Generator
) -> None:
    torch.manual_seed(0)
    router = EvictionRouter(2, 4, 4, score=score)
    with torch.no_grad():
        router.steps[-1].bias.zero_()  # type: ignore[union-attr, operator]
    k, v = (torch.randn(1, 40, 2, 4, generator=source) for _ in range(2))
    x = torch.cat([k, v], -1).flatten(2).transpose(1, 2)
    x = router.steps[1](torch.nn.functional.silu(router.steps[0](x)))
    z = router.steps[2](torch.nn.functional.silu(x)).transpose(1, 2)
    right = z.clamp(min=0) if score == "relu" else 1 / (1 + torch.exp(-z)) - 0.5
    torch.testing.assert_close(router(k, v), right, rtol=1e-4, atol=1e-6)
    assert torch.equal(router(k, v) > 0, z > 0)


def test_the_score_of_a_token_waits_for_three(source: torch.Generator) -> None:
    torch.manual_seed(0)
    router = EvictionRouter(1, 4, 4)
    k, v = torch.randn(1, 20, 1, 4, generator=source), torch.randn(1, 20, 1, 4, generator=source)
    changed = k.clone()
    changed[:, 13:] += 1.0
    torch.testing.assert_close(router(k, v)[:, :10], router(changed, v)[:, :10])


def test_sparse_k_is_hard_where_scores_are_apart(source: torch.Generator) -> None:
    u = torch.randperm(9, generator=source).double() * 1.01
    p = sparse_k(u, 4)
    assert sorted(p.tolist()) == [0.0] * 5 + [1.0] * 4
    assert torch.autograd.gradcheck(
        lambda x: sparse_k(x, 3), (double(source, 4, 8).requires_grad_(),)
    )


def test_tokens_that_moved_most_stay(source: torch.Generator) -> None:
    x = double(source, 2, 10, 4)
    after = x.clone()
    after[:, [2, 5, 7]] += 1.0
    kept, index = drop_tokens(x, representation_shift(x, after), 0.3)
    assert index.tolist() == [[2, 5, 7]] * 2
    torch.testing.assert_close(kept, x[:, [2, 5, 7]])


def test_bad_options_are_refused(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((12,), None, 1, 2, 1, 8), source)
    gates = torch.zeros(1, 12, 1, 4), torch.zeros(1, 3, 1, 4)
    with pytest.raises(fv.errors.SelectionError, match="budget"):
        seer_attention(q, k, v, *gates, block=4, budget=2)
    with pytest.raises(fv.errors.ShapeError, match="gate_k"):
        seer_attention(q, k, v, gates[0], gates[1][:, :2], block=4)
    with pytest.raises(fv.errors.SelectionError, match="levels"):
        pyramid_sparse_attention(q, k, v, levels=((3, 1.0),), kv_block=64)
    with pytest.raises(fv.errors.SelectionError, match="by_query"):
        nosa(q, k, v, torch.zeros(1, 12, 1), by_query=99)
