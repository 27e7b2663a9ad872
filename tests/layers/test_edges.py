"""Layers and feature maps at the edges: an empty batch, another default device, half precision spectra."""

import pytest
import torch
from torch import nn

import foveal as fv
from foveal import layers
from foveal.features import alibi_slopes, dct_matrix, gaussian_quantiles, orthogonal_projection

LAYERS: dict[str, tuple[type[nn.Module], dict[str, int], tuple[int, ...]]] = {
    "advisors": (layers.AdvisorAttention, {"heads": 2}, (9, 8)),
    "spectral": (layers.SpectralAttention, {"heads": 2}, (9, 8)),
    "feed-forward": (layers.FeedForwardKernelAttention, {"heads": 2}, (9, 8)),
    "frequencies": (layers.FrequencyFilter, {}, (4, 6, 8)),
    "linear map": (layers.SparseLinearMapAttention, {"heads": 2}, (9, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_gives_one(name: str) -> None:
    kind, options, shape = LAYERS[name]
    layer = kind(8, **options)
    x = torch.zeros(0, *shape, requires_grad=True)
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    assert y.shape == x.shape
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape


def test_an_empty_batch_of_images_between_axes() -> None:
    assert layers.CrossAxisAttention(8, 2)(torch.zeros(0, 8, 5, 6)).shape == (0, 8, 5, 6)


def test_an_empty_batch_of_lists() -> None:
    q = torch.zeros(0, 20, 2, 4)
    o = fv.system("infllm_v2").op(q, q, q, blocks=3, block=4, local=1, length=4, stride=2)
    assert o.shape == q.shape


def test_features_are_the_same_on_any_default_device() -> None:
    def constants() -> list[torch.Tensor]:
        source = torch.Generator().manual_seed(3)
        return [
            orthogonal_projection(5, 4, generator=source),
            gaussian_quantiles(4, source),
            dct_matrix(4),
            alibi_slopes(6),
        ]

    with torch.device("meta"):
        found = constants()
    assert all(map(torch.equal, found, constants()))


def test_a_spectrum_in_half_precision() -> None:
    op = fv.system("fourier_mixer_3d").op
    x = torch.randn(1, 4, 4, 4, 3, generator=torch.Generator().manual_seed(5))
    weight = torch.ones(3, 4, 4, 3, 2, dtype=torch.bfloat16)
    weight[..., 1] = 0
    y = op(x.bfloat16(), weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, x.bfloat16(), atol=0.05, rtol=0.05)
