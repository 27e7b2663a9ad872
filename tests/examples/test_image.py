"""Non-local means by attention: the formula, and what it does to noise."""

import math

import pytest
import torch
from torch import Tensor

from examples.first_hour.image import denoise, patches, psnr, with_noise

SIGMA = 0.1


def explicit(noisy: Tensor, window: int, sigma: float, side: int) -> Tensor:
    """Non-local means pixel by pixel from the patch distances, in the dtype of the image."""
    p = patches(noisy, side)
    twins = 2 * sigma**2 * p.shape[-1]
    out = torch.empty_like(noisy)
    for x in range(noisy.shape[0]):
        for y in range(noisy.shape[1]):
            left = min(max(x - window // 2, 0), noisy.shape[0] - window)
            top = min(max(y - window // 2, 0), noisy.shape[1] - window)
            box = (slice(left, left + window), slice(top, top + window))
            distance = ((p[box] - p[x, y]) ** 2).sum(-1)
            distance[x - left, y - top] = twins
            weight = torch.exp(-distance / (0.3 * twins))
            out[x, y] = (weight[..., None] * noisy[box]).sum((0, 1)) / weight.sum()
    return out


def smooth_picture(height: int, width: int) -> Tensor:
    """A disc on a gradient, in colour, 0 to 1."""
    x = torch.linspace(0, 1, height)[:, None].expand(-1, width)
    y = torch.linspace(0, 1, width)[None].expand(height, -1)
    disc = (((x - 0.5) ** 2 + (y - 0.4) ** 2) < 0.08).float()
    return torch.stack((0.2 + 0.5 * x, 0.3 + 0.4 * disc, 0.8 - 0.5 * y), dim=-1)


@pytest.mark.parametrize(("window", "side"), [(5, 3), (7, 5), (6, 3)])
def test_attention_equals_the_explicit_filter(window: int, side: int) -> None:
    noisy = with_noise(smooth_picture(14, 17), SIGMA).double()
    torch.testing.assert_close(
        denoise(noisy, window, SIGMA, side), explicit(noisy, window, SIGMA, side)
    )


def test_single_precision_is_enough() -> None:
    noisy = with_noise(smooth_picture(14, 17), SIGMA)
    exact = explicit(noisy.double(), 7, SIGMA, 5)
    assert (denoise(noisy, 7, SIGMA) - exact).abs().max() < 1e-4


def test_noise_falls_by_three_decibels() -> None:
    clean = smooth_picture(40, 44)
    noisy = with_noise(clean, SIGMA)
    assert psnr(denoise(noisy, 13, SIGMA), clean) > psnr(noisy, clean) + 3


def test_noise_falls_on_a_photograph() -> None:
    pytest.importorskip("skimage", reason="the photograph comes with scikit-image, extra demo")
    from examples.first_hour.image import photograph

    clean = photograph()[100:148, 200:256]
    noisy = with_noise(clean, SIGMA)
    assert psnr(denoise(noisy, 13, SIGMA), clean) > psnr(noisy, clean) + 3


def test_patches_are_the_surroundings() -> None:
    image = torch.arange(5 * 6 * 2.0).view(5, 6, 2)
    p = patches(image, 3)
    assert p.shape == (5, 6, 18)
    expected = image[1:4, 2:5].permute(2, 0, 1).flatten()
    torch.testing.assert_close(p[2, 3], expected)


def test_decibels() -> None:
    clean = torch.full((4, 4, 3), 0.5)
    assert psnr(clean + 0.1, clean) == pytest.approx(-20 * math.log10(0.1), abs=1e-4)
