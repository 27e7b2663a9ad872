"""Layers with fewer, smaller or factored projections."""

import pytest
import torch

from foveal import attend, errors
from foveal.layers import (
    CompressedConvolutionalAttention,
    GatedWindowAttention,
    HeadEmbeddingAttention,
    LowRankAttention,
    SlicedAttention,
)
from foveal.layers.causal import CausalAttention
from foveal.patterns import Causal

DIM, L = 24, 11


def inputs(source: torch.Generator) -> torch.Tensor:
    return torch.randn(2, L, DIM, generator=source, dtype=torch.float64)


def stateful() -> list[torch.nn.Module]:
    return [
        CompressedConvolutionalAttention(DIM, 4, head_dim=8, kv_heads=2).double(),
        GatedWindowAttention(DIM, 3, window=4, norm=True).double(),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_pieces_and_packed_sequences(number: int, source: torch.Generator) -> None:
    layer, x = stateful()[number], inputs(source)
    whole = layer(x)
    first, state = layer(x[:, :5], return_state=True)
    second, state = layer(x[:, 5:6], state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second, layer(x[:, 6:], state)], 1), whole)
    packed = torch.cat([x[0, :4], x[1, :7]])[None]
    offsets = torch.tensor([0, 4, 11], dtype=torch.int32)
    apart = torch.cat([layer(x[:1, :4])[0], layer(x[1:, :7])[0]])
    torch.testing.assert_close(layer(packed, cu_seqlens=offsets)[0], apart)


def test_later_tokens_play_no_part(source: torch.Generator) -> None:
    layers = [*stateful(), HeadEmbeddingAttention(DIM, 3).double()]
    layers += [
        SlicedAttention(DIM, 3, kind=k, length=L).double()
        for k in ("super", "efficient", "optimised")
    ]
    x = inputs(source)
    changed = x.clone()
    changed[:, 7:] += 1
    for layer in layers:
        torch.testing.assert_close(layer(x)[:, :7], layer(changed)[:, :7])


def test_a_gate_at_its_start_is_plain_attention(source: torch.Generator) -> None:
    plain = CausalAttention(DIM, 3, rotary_base=10000.0).double()
    gated = GatedWindowAttention(DIM, 3, window=L).double()
    for name in ("q", "k", "v", "out"):
        getattr(gated, name).weight.data.copy_(getattr(plain, name).weight)
    x = inputs(source)
    torch.testing.assert_close(gated(x), plain(x))


def test_full_rank_is_the_layer_of_the_weights(source: torch.Generator) -> None:
    weights = [torch.randn(DIM, DIM, generator=source, dtype=torch.float64) for _ in range(4)]
    x = inputs(source)
    layer = LowRankAttention.of(
        (weights[0], weights[1], weights[2]), weights[3], 3, latent_dim=8, causal=True, piece=4
    )
    q, k, v = ((x @ w.T).unflatten(-1, (3, -1)) for w in weights[:3])
    expected = attend(q, k, v, Causal()).flatten(-2) @ weights[3].T
    torch.testing.assert_close(layer(x), expected)


def test_lower_ranks_are_nearer_than_none(source: torch.Generator) -> None:
    weights = [torch.randn(DIM, DIM, generator=source, dtype=torch.float64) for _ in range(4)]
    x = 0.1 * inputs(source)
    triple = (weights[0], weights[1], weights[2])
    whole, half, quarter = (
        LowRankAttention.of(triple, weights[3], 3, latent_dim=rank)(x) for rank in (8, 6, 2)
    )
    assert (half - whole).norm() < (quarter - whole).norm() < whole.norm()


def test_a_latent_holds_fewer_numbers() -> None:
    layer = CompressedConvolutionalAttention(64, 8, head_dim=4, kv_heads=2)
    _, state = layer(torch.randn(1, 100, 64), return_state=True)
    kept = sum(x.numel() for x in state.tails[:2])
    assert kept == 100 * 2 * 2 * 4
    assert kept * 8 == 100 * 2 * 64


def test_parameters_of_the_smaller_layers() -> None:
    def count(layer: torch.nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters())

    full = 4 * 64 * 64
    assert count(SlicedAttention(64, 4, kind="optimised")) == full * 3 // 4
    assert count(SlicedAttention(64, 4, kind="efficient")) == full // 2
    assert count(HeadEmbeddingAttention(64, 4)) == 3 * 64 * 16 + 3 * 64 + 64 * 64


def test_bad_arguments() -> None:
    with pytest.raises(errors.ShapeError, match="kv_heads"):
        CompressedConvolutionalAttention(DIM, 4, head_dim=8, kv_heads=3)
    with pytest.raises(errors.ShapeError, match="kind"):
        SlicedAttention(DIM, 3, kind="best")
    with pytest.raises(errors.ShapeError, match="length"):
        SlicedAttention(DIM, 3)
    with pytest.raises(errors.ShapeError, match="window"):
        GatedWindowAttention(DIM, 3, window=0)
