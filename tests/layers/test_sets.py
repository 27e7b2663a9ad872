"""Layers without a recurrence: sets, landmarks, pooling, condensed histories, distances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import foveal as fv
from foveal.layers import (
    InducedSetAttention,
    KernelisedRelativeAttention,
    L2ViTAttention,
    NaLaAttention,
    PoNetMixer,
    SetAttentionBlock,
    SetPooling,
    SOFTAttention,
    TLinFormerBlock,
)
from foveal.layers.landmarks import box_means, soft
from foveal.layers.pooling import ponet

LINE: dict[str, Callable[[], nn.Module]] = {
    "SetAttentionBlock": lambda: SetAttentionBlock(8, 2),
    "InducedSetAttention": lambda: InducedSetAttention(8, 2, points=3),
    "PoNetMixer": lambda: PoNetMixer(8, 2, segment_length=4),
    "KernelisedRelativeAttention": lambda: KernelisedRelativeAttention(8, 2, longest=12),
    "KernelisedRelativeAttention, causal": lambda: KernelisedRelativeAttention(
        8, 2, longest=12, causal=True
    ),
}
GRID: dict[str, Callable[[], nn.Module]] = {
    "SOFTAttention": lambda: SOFTAttention(8, 2, ratio=2),
    "L2ViTAttention": lambda: L2ViTAttention(8, 2),
    "NaLaAttention": lambda: NaLaAttention(8, 2),
}


def made(make: Callable[[], nn.Module], source: torch.Generator) -> nn.Module:
    torch.manual_seed(int(torch.randint(2**31, (), generator=source)))
    return make().double()


def normal(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("name", [*LINE, *GRID])
def test_every_weight_gets_a_gradient(name: str, source: torch.Generator) -> None:
    layer = made((LINE | GRID)[name], source)
    x = normal(source, 2, 11, 8) if name in LINE else normal(source, 2, 4, 6, 8)
    y = layer(x)
    assert y.shape == x.shape
    y.sin().sum().backward()
    for weight, parameter in layer.named_parameters():
        assert parameter.grad is not None, weight
        assert float(parameter.grad.abs().max()) > 0, weight


@pytest.mark.parametrize("name", ["SetAttentionBlock", "InducedSetAttention"])
def test_sets_have_no_order(name: str, source: torch.Generator) -> None:
    layer, x = made(LINE[name], source), normal(source, 2, 9, 8)
    order = torch.randperm(9, generator=source)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    pool = made(lambda: SetPooling(8, 2, seeds=3), source)
    assert pool(x).shape == (2, 3, 8)
    torch.testing.assert_close(pool(x[:, order]), pool(x))


@pytest.mark.parametrize("name", ["InducedSetAttention", "SetPooling"])
def test_hidden_members_do_not_count(name: str, source: torch.Generator) -> None:
    makers = LINE | {"SetPooling": lambda: SetPooling(8, 2)}
    layer, x = made(makers[name], source), normal(source, 1, 7, 8)
    mask = torch.arange(9) < 7
    longer = torch.cat([x, normal(source, 1, 2, 8)], dim=1)
    found = layer(longer, key_mask=mask[None])[:, :7]
    torch.testing.assert_close(found, layer(x))


def test_newton_finds_the_inverse(source: torch.Generator) -> None:
    """With every token a landmark the product of the three kernels is the middle one."""
    x, v = 2 * normal(source, 2, 6, 2, 3), normal(source, 2, 6, 2, 4)
    o = soft(x, v, x, ridge=0.0, iterations=60, scale=1.0)
    distances = (x[:, :, None] - x[:, None]).square().sum(-1)  # [B, i, j, H]
    torch.testing.assert_close(
        o, torch.einsum("bijh,bjhd->bihd", torch.exp(-distances / 2), v), rtol=1e-7, atol=1e-7
    )


def test_landmarks_of_a_grid_are_means_of_boxes(source: torch.Generator) -> None:
    x = normal(source, 1, 5, 4, 1, 2)
    means = box_means(x, 2)
    assert means.shape == (1, 6, 1, 2)
    torch.testing.assert_close(means[0, 3, 0], x[0, 2:4, 2:4, 0].mean((0, 1)))
    torch.testing.assert_close(means[0, 5, 0], x[0, 4:, 2:4, 0].mean((0, 1)))


def test_pooling_leaves_padding_out(source: torch.Generator) -> None:
    parts = [normal(source, 1, 10, 2, 3) for _ in range(5)]
    mask = torch.arange(10) < 7
    whole = ponet(*parts, segment_length=4, key_mask=mask[None])
    alone = ponet(*(x[:, :7] for x in parts), segment_length=4)
    torch.testing.assert_close(whole[:, :7], alone)
    assert float(whole[:, 7:].abs().max()) == 0


@pytest.mark.parametrize("length", [0, 3, 9])
def test_a_window_grows_token_by_token(length: int, source: torch.Generator) -> None:
    block = made(lambda: TLinFormerBlock(8, 2, observed=4), source)
    history, window = normal(source, 2, length, 8), normal(source, 2, 5, 8)
    restored, whole = block(history, window)
    assert restored.shape == history.shape
    for t in range(1, 6):
        again, part = block(history, window[:, :t])
        torch.testing.assert_close(part, whole[:, :t])
        torch.testing.assert_close(again, restored)


def test_every_weight_of_a_condensed_block_learns(source: torch.Generator) -> None:
    block = made(lambda: TLinFormerBlock(8, 2, observed=4, depth=2), source)
    history, window = block(normal(source, 2, 9, 8), normal(source, 2, 5, 8))
    (history.sin().sum() + window.sin().sum()).backward()
    for weight, parameter in block.named_parameters():
        assert parameter.grad is not None, weight
        assert float(parameter.grad.abs().max()) > 0, weight


def test_bad_sizes_are_named(source: torch.Generator) -> None:
    with pytest.raises(fv.errors.ShapeError, match="at most 12"):
        made(LINE["KernelisedRelativeAttention"], source)(normal(source, 1, 13, 8))
    with pytest.raises(fv.errors.ShapeError, match="multiples of 2"):
        made(GRID["SOFTAttention"], source)(normal(source, 1, 5, 4, 8))
    with pytest.raises(fv.errors.ShapeError, match="segments"):
        ponet(*(normal(source, 1, 4, 1, 2) for _ in range(5)), segments=torch.zeros(3).long())
    for kind in (SetAttentionBlock, PoNetMixer, TLinFormerBlock, SOFTAttention):
        with pytest.raises(fv.errors.ShapeError, match="heads"):
            kind(8, 3)
