"""Non-local means on video by attention: the formula, and what it does to noise."""

import math

import pytest
import torch
from torch import Tensor

from examples.video.denoise import denoise, moving_picture, patches, psnr

SIGMA = 0.1


def explicit(noisy: Tensor, window: tuple[int, int, int], sigma: float, side: int) -> Tensor:
    """Pixel by pixel from the patch distances."""
    p = patches(noisy, side)
    twins = 2 * sigma**2 * p.shape[-1]
    out = torch.empty_like(noisy)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in noisy.shape[:3])).tolist():
        low = [
            min(max(i - w // 2, 0), n - w)
            for i, w, n in zip(place, window, noisy.shape[:3], strict=True)
        ]
        box = tuple(slice(start, start + w) for start, w in zip(low, window, strict=True))
        distance = ((p[box] - p[tuple(place)]) ** 2).sum(-1)
        distance[tuple(i - start for i, start in zip(place, low, strict=True))] = twins
        weight = torch.exp(-distance / (0.3 * twins))
        out[tuple(place)] = (weight[..., None] * noisy[box]).sum((0, 1, 2)) / weight.sum()
    return out


@pytest.mark.parametrize(("window", "side"), [((3, 5, 5), 3), ((2, 4, 3), 5)])
def test_attention_equals_the_explicit_filter(window: tuple[int, int, int], side: int) -> None:
    clean = moving_picture(4, 9, 10).double()
    noisy = clean + SIGMA * torch.randn(
        clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    expected = explicit(noisy, window, SIGMA, side)
    torch.testing.assert_close(denoise(noisy, window, SIGMA, side), expected)


def test_more_frames_remove_more_noise() -> None:
    clean = moving_picture(5, 32, 40)
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    alone, along = (psnr(denoise(noisy, (t, 7, 7), SIGMA), clean) for t in (1, 5))
    assert alone > psnr(noisy, clean) + 3
    assert along > alone + 0.5


def test_a_live_filter_looks_at_no_later_frame() -> None:
    noisy = moving_picture(4, 12, 12)
    before = denoise(noisy, (3, 5, 5), SIGMA, causal=True)[:2]
    changed = noisy.clone()
    changed[2:] = math.pi
    after = denoise(changed, (3, 5, 5), SIGMA, causal=True)[:2]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
