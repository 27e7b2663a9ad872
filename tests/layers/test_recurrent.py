"""Layers with a recurrent state: a sequence in pieces is the sequence, and every weight learns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import foveal as fv
from foveal.layers import (
    BasedAttention,
    GatedDeltaNet,
    KimiDeltaAttention,
    LightningAttention,
    MLSTMLayer,
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "KimiDeltaAttention": lambda: KimiDeltaAttention(12, 2),
    "KimiDeltaAttention, sizes": lambda: KimiDeltaAttention(12, 2, head_dim=5, value_dim=3, conv=2),
    "GatedDeltaNet": lambda: GatedDeltaNet(16, 2),
    "LightningAttention": lambda: LightningAttention(12, 3),
    "MLSTMLayer": lambda: MLSTMLayer(12, 2),
    "MLSTMLayer, sigmoid": lambda: MLSTMLayer(12, 2, rule=fv.MLSTM("sigmoid", normalised=False)),
    "BasedAttention": lambda: BasedAttention(12, 2, feature_dim=4),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sizes", [(7, 1, 12), (1,) * 9])
def test_pieces_are_the_whole(name: str, sizes: tuple[int, ...], source: torch.Generator) -> None:
    torch.manual_seed(int(torch.randint(2**31, (), generator=source)))
    layer = LAYERS[name]().double()
    dim = 16 if "GatedDeltaNet" in name else 12
    x = torch.randn(2, sum(sizes), dim, generator=source, dtype=torch.float64)
    whole, last = layer(x, return_state=True)
    state, outputs = None, []
    for piece in x.split(list(sizes), dim=1):
        y, state = layer(piece, state, return_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_every_weight_gets_a_gradient(name: str, source: torch.Generator) -> None:
    layer = LAYERS[name]().double()
    dim = 16 if "GatedDeltaNet" in name else 12
    x = torch.randn(2, 9, dim, generator=source, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape
    y.sin().sum().backward()
    for weight, parameter in layer.named_parameters():
        assert parameter.grad is not None, weight
        assert float(parameter.grad.abs().max()) > 0, weight


def test_heads_must_divide() -> None:
    with pytest.raises(fv.errors.ShapeError, match="heads"):
        LightningAttention(12, 5)
