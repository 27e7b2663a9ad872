"""What the networks learn: digits, coins on a photograph, and textures with a hidden period."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from foveal.errors import MissingDependencyError


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 8, 8, 1] and digits of 1,297 samples to learn from, and of 500 others."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "the digits", "large_kernels") from error
    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32)[..., None]
    classes = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    learn, test = order[:-500], order[-500:]
    return images[learn], classes[learn], images[test], classes[test]


def coins() -> tuple[Tensor, Tensor]:
    """A photograph of coins [1, 303, 384, 1] and which pixels belong to one [1, 303, 384].

    The truth is the watershed of its edges between dark and bright seeds, holes filled.
    """
    try:
        from scipy import ndimage
        from skimage import data, filters, segmentation
    except ImportError as error:
        raise MissingDependencyError("scikit-image", "the photograph", "large_kernels") from error
    image = data.coins()
    seeds = (image < 30) + 2 * (image > 150)
    found = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image), seeds) == 2)
    picture = torch.tensor(image / 255, dtype=torch.float32)[None, ..., None]
    return picture, torch.tensor(found, dtype=torch.int64)[None]


PERIODS = (9, 13)
"""Distances at which a texture repeats itself: its class."""


def textures(
    count: int, side: int, source: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """White noise [count, side, side, 1] plus itself further right, and which distance that is.

    Pixels nearer than that are independent: only a filter that spans the distance can tell.
    """
    classes = torch.randint(2, (count,), generator=source)
    noise = torch.randn(count, side, side + max(PERIODS), generator=source)
    parts = [noise[:, :, period : period + side] for period in PERIODS]
    echo = torch.where(classes[:, None, None] == 0, *parts)
    images = (noise[:, :, :side] + echo) / 2**0.5
    return images[..., None].to(device), classes.to(device)


def drawn(
    images: Tensor, classes: Tensor, batch: int, steps: int, source: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of a fixed set."""
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=source)
        yield images[chosen], classes[chosen]


def crops(
    picture: Tensor, truth: Tensor, side: int, steps: int, source: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Four random squares of a picture at a time, some of them mirrored."""
    for _ in range(steps):
        seen, known = [], []
        for _ in range(4):
            top = int(torch.randint(picture.shape[1] - side + 1, (), generator=source))
            left = int(torch.randint(picture.shape[2] - side + 1, (), generator=source))
            part = picture[:, top : top + side, left : left + side]
            own = truth[:, top : top + side, left : left + side]
            if int(torch.randint(2, (), generator=source)):
                part, own = part.flip(1), own.flip(1)
            seen.append(part)
            known.append(own)
        yield torch.cat(seen), torch.cat(known)


def accuracy(network: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The share that is right."""
    with torch.no_grad():
        return float((network(images).argmax(-1) == classes).float().mean())


def overlap(network: nn.Module, picture: Tensor, truth: Tensor) -> float:
    """Pixels found and true over pixels found or true."""
    with torch.no_grad():
        found = network(picture).argmax(-1).bool()
    return float((found & truth.bool()).sum() / (found | truth.bool()).sum())
