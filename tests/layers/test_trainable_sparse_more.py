"""Types of keys, predicted maps, layers that few tokens pass, blocks chosen by means: how they train."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import foveal as fv
from foveal.layers import (
    CausalAttention,
    CoreContextAttention,
    LessTokens,
    MeanBlockAttention,
    MonarchAttention,
    NeuralAttentionSearch,
    PolarAttention,
    SeaMap,
    SparseKAttention,
    SparseLinearMapAttention,
    SuperlinearAttention,
    block_information,
    information_loss,
    map_loss,
    map_targets,
    router_loss,
)
from foveal.layers.hybrid import sparse_linear_stack
from foveal.layers.trainable_sparse_depth import kept_blocks, lemo_attention
from foveal.layers.trainable_sparse_maps import kept_cells, sea_attention
from foveal.layers.trainable_sparse_means import infllm_v2
from foveal.layers.trainable_sparse_types import nats_attention


def double(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def inputs(source: torch.Generator, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        double(source, 2, length, 4, 4),
        double(source, 2, length, 2, 4),
        double(source, 2, length, 2, 3),
    )


@pytest.mark.parametrize("heads", [1, 2])
def test_types_learn_with_the_weights_of_plain_attention(
    heads: int, source: torch.Generator
) -> None:
    length, window = 13, 2
    q, k, v = inputs(source, length)
    kinds = torch.randint(0, 3, (2, length, heads), generator=source)
    types = nn.functional.one_hot(kinds, 3).double().requires_grad_()
    do = double(source, 2, length, 4, 3)
    (got,) = torch.autograd.grad(nats_attention(q, k, v, types, window=window), types, do)
    expected = torch.zeros_like(types)
    for b in range(2):
        for h in range(4):
            own = kinds[b, :, h // 2 if heads > 1 else 0].tolist()
            following = [[i for i in range(j + 1, length) if own[i] == 0] for j in range(length)]
            ends = [
                (length, after[0] if after else length, j + window)
                for j, after in enumerate(following)
            ]
            for t in range(length):
                s = k[b, :, h // 2] @ q[b, t, h] / 2.0
                seen = [j for j in range(t + 1) if t <= ends[j][own[j]]]
                o = torch.softmax(s[seen], 0) @ v[b, seen, h // 2]
                p, delta = torch.softmax(s[: t + 1], 0), do[b, t, h] @ o
                for j in range(t + 1):
                    change = p[j] * (do[b, t, h] @ v[b, j, h // 2] - delta)
                    for kind in range(3):
                        if t <= ends[j][kind]:
                            expected[b, j, h // 2 if heads > 1 else 0, kind] += change
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_types_are_reached_by_the_loss(training: bool, source: torch.Generator) -> None:
    torch.manual_seed(0)
    layer = NeuralAttentionSearch(16, 4, window=3).double().train(training)
    layer(double(source, 2, 20, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_maps_look_at_no_later_token(source: torch.Generator) -> None:
    torch.manual_seed(0)
    layer = SparseLinearMapAttention(16, 2, keys=3, cells=8, features=8).double()
    x = double(source, 2, 20, 16)
    changed = x.clone()
    changed[:, 12:] += 1
    torch.testing.assert_close(layer(changed)[:, :12], layer(x)[:, :12])


def test_maps_learn_from_the_attention_of_a_teacher(source: torch.Generator) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 24, 2, 8, generator=source) for _ in range(3))
    net = SeaMap(2, 8, cells=6, features=16, hidden=32)
    target = map_targets(q, k, 6)
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 2, 24))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = map_loss(net(q, k, v)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert float(map_loss(target, target)) == 0.0


def test_heads_share_one_budget_of_cells(source: torch.Generator) -> None:
    shares = torch.softmax(double(source, 1, 3, 10, 4), -1)
    kept = kept_cells(shares, 2, True, 10)
    counts = [max(1, math.floor(3 * 2 * 4 / t + 0.5)) for t in range(1, 11)]
    assert kept.sum((1, 3))[0].tolist() == [min(n, 12) for n in counts]


def test_layers_pass_what_is_dropped(source: torch.Generator) -> None:
    torch.manual_seed(0)
    layer = LessTokens(CausalAttention(8, 2), 8, block=4, keep=0.5).double()
    x = double(source, 2, 18, 8).requires_grad_()
    y = layer(x)
    token, real = kept_blocks(layer.scores(x), 18, 4, 0.5)
    passed = torch.ones(2, 18, dtype=torch.bool)
    for n in range(2):
        passed[n, token[n][real[n]]] = False
    assert torch.equal(y[passed], x[passed])
    y.sum().backward()
    assert torch.equal(x.grad[passed], torch.ones_like(x.grad[passed]))
    assert all(p.grad is None for p in layer.predictor.parameters())


def test_predictors_learn_which_blocks_are_read(source: torch.Generator) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32, 8, generator=source)
    x[:, 8:16] += 2.0  # a block that all queries look at
    layer = LessTokens(CausalAttention(8, 2), 8, block=8, keep=0.25)
    heads = x[:, :, None]
    information = block_information(heads, heads, 8)
    torch.testing.assert_close(information.sum(-1), torch.ones(4))
    optimizer = torch.optim.AdamW(layer.predictor.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = information_loss(layer.scores(x), information)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def mean_blocks_layer() -> MeanBlockAttention:
    made = MeanBlockAttention(
        16, 4, kv_heads=2, blocks=3, block=4, local=1, length=4, stride=2, dense_length=6
    ).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def test_pieces_and_packs_of_chosen_blocks_are_the_whole(source: torch.Generator) -> None:
    torch.manual_seed(0)
    made, x = mean_blocks_layer(), double(source, 2, 31, 16)
    state, pieces = None, []
    for start, stop in ((0, 9), (9, 10), (10, 24), (24, 31)):
        y, state = made(x[:, start:stop], state, return_state=True)
        pieces.append(y)
    # Pieces that end below dense_length see all: the first one is longer.
    torch.testing.assert_close(torch.cat(pieces, 1), made(x), rtol=1e-9, atol=1e-9)
    packed = made(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 31, 62], dtype=torch.int32))
    torch.testing.assert_close(packed[0].unflatten(0, (2, 31)), made(x), rtol=1e-9, atol=1e-9)


def test_the_stack_of_sala_takes_the_sparse_layer(source: torch.Generator) -> None:
    torch.manual_seed(0)
    stack = sparse_linear_stack(16, 4, 4, sparse=mean_blocks_layer).double()
    assert stack(double(source, 1, 20, 16)).shape == (1, 20, 16)


def test_short_texts_stay_dense(source: torch.Generator) -> None:
    q, k, v = inputs(source, 20)
    options = {"blocks": 2, "block": 4, "local": 1, "length": 4, "stride": 2}
    dense = fv.attend(q, k, v, fv.Causal())
    assert torch.equal(infllm_v2(q, k, v, dense_length=20, **options), dense)
    assert not torch.allclose(infllm_v2(q, k, v, dense_length=19, **options), dense)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: SuperlinearAttention(16, 2, first=1, anchors=2),
        lambda: CoreContextAttention(16, 2, group=3, window=4),
        lambda: SparseKAttention(16, 2, keys=4, window=2, slope=0.01),
        lambda: MonarchAttention(16, 2, rows=2, columns=3),
    ],
    ids=["superlinear", "core_context", "sparsek", "monarch_rt"],
)
def test_every_parameter_of_a_layer_learns(
    layer: Callable[[], nn.Module], source: torch.Generator
) -> None:
    torch.manual_seed(0)
    made = layer().double()
    made(double(source, 2, 24, 16)).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_routers_learn_which_heads_are_large(source: torch.Generator) -> None:
    torch.manual_seed(0)
    layer = PolarAttention(16, 4, kept=2, hidden=16)
    with torch.no_grad():
        layer.qkv.weight[32:40] *= 100.0  # the values of the first two heads
    x = torch.randn(8, 12, 16, generator=source)
    optimizer = torch.optim.AdamW(layer.router.parameters(), lr=1e-2)
    for _ in range(40):
        loss = router_loss(layer.scores(x), layer.sizes(x), 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (layer.scores(x).topk(2).indices.sort(-1).values == torch.tensor([0, 1])).all()
    q, k, v = layer.split(x)
    o = fv.attend(q, k, v, fv.Causal())
    o[:, :, 2:] = 0
    torch.testing.assert_close(layer(x), layer.join(o))
    with pytest.raises(fv.errors.SelectionError, match="kept"):
        PolarAttention(16, 4, kept=5)


def test_wrong_sizes_are_named(source: torch.Generator) -> None:
    q, k, v = inputs(source, 12)
    with pytest.raises(fv.errors.ShapeError, match="types"):
        nats_attention(q, k, v, torch.zeros(2, 11, 1, 3))
    with pytest.raises(fv.errors.ShapeError, match="shares"):
        sea_attention(q, k, v, torch.zeros(2, 2, 12, 4))
    with pytest.raises(fv.errors.ShapeError, match="scores"):
        lemo_attention(q, k, v, torch.zeros(2, 4), block=4)
    with pytest.raises(fv.errors.SelectionError, match="keep"):
        lemo_attention(q, k, v, torch.zeros(2, 3), block=4, keep=0.0)
    with pytest.raises(fv.errors.SelectionError, match="blocks"):
        infllm_v2(q, k, v, blocks=1, block=4, local=1, dense_length=0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda q: SeaMap(2, 6, places=3), "places: got 3"),
        (lambda q: SeaMap(2, 6, cells=0), "cells: got 0"),
        (lambda q: SeaMap(2, 6, dilation=0), "dilation: got 0"),
        (lambda q: SeaMap(3, 6)(q, q, q), "q: got [1, 5, 2, 6]"),
        (lambda q: SeaMap(2, 6)(q, q[:, :4], q), "k: got [1, 4, 2, 6]"),
        (lambda q: SeaMap(2, 6)(q.double(), q, q), "q: got torch.float64"),
        (lambda q: map_targets(q, q, 0), "cells: got 0"),
        (lambda q: map_targets(q, q.double(), 3), "k: got torch.float64"),
        (lambda q: map_loss(q, q[:, :4]), "targets: got [1, 4, 2, 6]"),
    ],
)
def test_what_does_not_fit_a_map_is_named(call: Callable[..., object], said: str) -> None:
    with pytest.raises(fv.errors.FovealError) as raised:
        call(torch.zeros(1, 5, 2, 6))
    assert said in str(raised.value)
