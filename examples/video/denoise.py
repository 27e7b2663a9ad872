"""Non-local means on video: a pixel is the mean of the pixels, of its own and of nearby frames, whose
surroundings look alike.

The weight of pixel j for pixel i is exp(-|p_i - p_j|^2 / h^2), p the patch around a pixel in its frame.
As |p_i|^2 is the same for every j, that is the softmax of (2 p_i.p_j - |p_j|^2) / h^2 over the
neighborhood [frames, rows, columns] of pixel i: patches are queries and keys, pixels are values, and a
bias per key carries -|p_j|^2 / h^2.

Paper: Nonlocal image and movie denoising (Buades, Coll, Morel; IJCV 2008).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

import foveal as fv

# h^2 in units of 2 sigma^2 D, the distance at which two noisy copies of one clean patch lie.
_BANDWIDTH = 0.3


def patches(video: Tensor, side: int) -> Tensor:
    """The surroundings of every pixel in its frame, mirrored: [T, X, Y, C] to [T, X, Y, C side^2]."""
    mirrored = pad(video.movedim(-1, 1), (side // 2,) * 4, mode="reflect")
    shifted = mirrored.unfold(2, side, 1).unfold(3, side, 1)  # [T, C, X, Y, side, side]
    return shifted.permute(0, 2, 3, 1, 4, 5).flatten(3)


def denoise(
    noisy: Tensor, window: tuple[int, int, int], sigma: float, side: int = 5, causal: bool = False
) -> Tensor:
    """Non-local means of a colour video.

    Shapes: noisy [T, X, Y, C], returned likewise.
    Options: window, frames, rows and columns that are searched; sigma, standard deviation of the noise
    in units of the video; side of the patches, odd; causal looks at no later frame, as a live
    filter must.
    """
    p = patches(noisy - noisy.mean(), side)
    twins = 2 * sigma**2 * p.shape[-1]
    h2 = _BANDWIDTH * twins
    length = torch.einsum("txyd,txyd->txy", p, p) / h2
    score = fv.Softmax(scale=2 / h2) + fv.KeyBias(-length.flatten()[None, None])
    q, v = p[None, ..., None, :], noisy[None, ..., None, :]
    pattern = fv.Neighborhood(window, causal=(causal, False, False))
    mean, lse = fv.attend(q, q, v, pattern, score, return_lse=True)

    # A patch lies at distance 0 of itself, every other copy of it at `twins`: the pixel's own noise
    # would weigh exp(twins / h^2) too much.  Its weight is known from the lse and is taken back.
    own = torch.exp(length - lse[0, ..., 0])
    excess = (own * (1 - math.exp(-twins / h2)))[..., None]
    return (mean[0, ..., 0, :] - excess * noisy) / (1 - excess)


def moving_picture(frames: int = 8, height: int = 48, width: int = 64) -> Tensor:
    """A disc that crosses a gradient over a striped ground: [frames, height, width, 3] in 0 to 1."""
    t = torch.linspace(0, 1, frames)[:, None, None]
    x = torch.linspace(0, 1, height)[None, :, None]
    y = torch.linspace(0, width / height, width)[None, None]
    disc = ((x - 0.5) ** 2 + (y - 0.2 - 0.8 * t) ** 2 < 0.03).float()
    stripes = (torch.sin(40 * y) > 0).float().expand(frames, height, width)
    return torch.stack(
        (0.2 + 0.5 * x.expand_as(stripes), 0.3 + 0.4 * disc, 0.6 * stripes * (1 - disc) + 0.2),
        dim=-1,
    )


def psnr(video: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, both in 0 to 1."""
    return -10 * math.log10(float(((video.clamp(0, 1) - clean) ** 2).mean()))
