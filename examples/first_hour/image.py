"""Non-local means as attention: a pixel is the mean of the pixels whose surroundings look alike.

The weight of pixel j for pixel i is exp(-|p_i - p_j|^2 / h^2), where p is the patch around a pixel.
Since |p_i|^2 is the same for every j, that is the softmax of (2 p_i.p_j - |p_j|^2) / h^2: patches
are queries and keys, pixels are values, and a bias per key carries -|p_j|^2 / h^2.

Paper: A non-local algorithm for image denoising (Buades, Coll, Morel; CVPR 2005).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import foveal as fv
from examples.first_hour.folder import Result, RunFolder
from foveal.bench.measure import Budget, measure, peak_memory

WINDOWS = (7, 13, 21)
SIGMA = 0.1
PATCH = 5
CROP = (slice(60, 220), slice(140, 300))

# h^2 in units of 2 sigma^2 D, the distance at which two noisy copies of one clean patch lie: the best
# of 0.2, 0.3, 0.45 and 0.6 on the photograph with a window of 13.
_BANDWIDTH = 0.3
# h in units of sigma, as in the example of scikit-image's documentation for its fast mode.
_SKIMAGE_BANDWIDTH = 0.6


def patches(image: Tensor, side: int) -> Tensor:
    """The surroundings of every pixel, mirrored at the border: [X, Y, C] to [X, Y, C side^2]."""
    mirrored = pad(image.permute(2, 0, 1), (side // 2,) * 4, mode="reflect")
    shifted = mirrored.unfold(1, side, 1).unfold(2, side, 1)  # [C, X, Y, side, side]
    return shifted.permute(1, 2, 0, 3, 4).flatten(2)


def denoise(noisy: Tensor, window: int, sigma: float, side: int = PATCH) -> Tensor:
    """Non-local means of a colour image.

    Shapes: noisy [X, Y, C], returned likewise.
    Options: window pixels per axis that are searched; sigma, standard deviation of the noise in units
    of the image; side of the patches, odd.
    """
    p = patches(noisy - noisy.mean(), side)
    twins = 2 * sigma**2 * p.shape[-1]
    h2 = _BANDWIDTH * twins
    length = torch.einsum("xyd,xyd->xy", p, p) / h2
    score = fv.Softmax(scale=2 / h2) + fv.KeyBias(-length.flatten()[None, None])
    q, v = p[None, :, :, None], noisy[None, :, :, None]
    mean, lse = fv.attend(q, q, v, fv.Neighborhood((window, window)), score, return_lse=True)

    # A patch lies at distance 0 of itself, every other copy of it at `twins`: the pixel's own noise
    # would weigh exp(twins / h^2) too much.  Its weight is known from the lse and is taken back.
    own = torch.exp(length - lse[0, :, :, 0])
    excess = (own * (1 - math.exp(-twins / h2)))[..., None]
    return (mean[0, :, :, 0] - excess * noisy) / (1 - excess)


def psnr(image: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, both in 0 to 1."""
    return -10 * math.log10(float(((image.clamp(0, 1) - clean) ** 2).mean()))


def photograph() -> Tensor:
    """The astronaut of scikit-image, which comes inside its wheel: [512, 512, 3] in 0 to 1."""
    from skimage import data

    pixels = data.astronaut()  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels).float() / 255


def with_noise(clean: Tensor, sigma: float) -> Tensor:
    """White noise of known strength, the same in every run."""
    return clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))


def run(folder: RunFolder, progress: Callable[[str, float], None]) -> Result:
    """Denoises the photograph with every window, beside scikit-image; pictures go to the folder."""
    clean = photograph()
    noisy = with_noise(clean, SIGMA)
    _keep(folder, "clean", clean)
    _keep(folder, "noisy", noisy)
    rows = []
    for index, window in enumerate(WINDOWS):

        def step(share: float, at: int = index, window: int = window) -> None:
            progress(f"image: window {window}x{window}", (at + share) / len(WINDOWS))

        rows.append(_compare(folder, clean, noisy, window, step))
    return {"shape": list(clean.shape), "psnr": psnr(noisy, clean), "windows": rows}


@dataclass(frozen=True)
class _Filter:
    """A denoiser as something that `measure` can time."""

    denoise: Callable[[], Tensor]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.denoise()

    def loss_and_gradients(self) -> None:
        return None


def _compare(
    folder: RunFolder, clean: Tensor, noisy: Tensor, window: int, step: Callable[[float], None]
) -> Result:
    filters = {
        "foveal": _Filter(lambda: denoise(noisy, window, SIGMA)),
        "scikit-image": _Filter(lambda: _skimage(noisy, window)),
    }
    device = clean.device
    alone = {name: (runner,) for name, runner in filters.items()}
    samples = measure(alone, device, Budget(seconds=3, rounds=(3, 9), warm_up=0), step)
    row: dict[str, Any] = {"window": window}
    for name, each in filters.items():
        image = each.forward()
        _keep(folder, f"{name}-{window}", image)
        peak = peak_memory(each.forward, device)
        seconds = samples[name]["forward"]
        row[name] = {"psnr": psnr(image, clean), "seconds": seconds, "peak_bytes": peak}
    return row


def _skimage(noisy: Tensor, window: int) -> Tensor:
    from skimage.restoration import denoise_nl_means

    return torch.from_numpy(
        denoise_nl_means(
            noisy.numpy(),
            patch_size=PATCH,
            patch_distance=window // 2,
            h=_SKIMAGE_BANDWIDTH * SIGMA,
            sigma=SIGMA,
            fast_mode=True,
            channel_axis=-1,
        )
    )


def _keep(folder: RunFolder, name: str, image: Tensor) -> None:
    """Writes the picture and the detail of it that the report shows."""
    folder.write(f"{name}.png", _png(image))
    folder.write(f"{name}-crop.png", _png(image[CROP]))


def _png(image: Tensor) -> bytes:
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
