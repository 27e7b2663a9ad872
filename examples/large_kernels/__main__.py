"""python -m examples.large_kernels: digits, coins and textures by networks of large filters."""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from examples.large_kernels.networks import BLOCKS, Backbone, train
from examples.large_kernels.tasks import (
    accuracy,
    coins,
    crops,
    digits,
    drawn,
    overlap,
    textures,
)
from foveal.layers import merge


def learn_digits(block: str, steps: int) -> str:
    images, classes, others, wanted = digits()
    network = Backbone(block, 1, 10)
    source = torch.Generator().manual_seed(0)
    train(network, drawn(images, classes, 64, steps, source))
    plain = accuracy(network, others, wanted)
    return f"{plain:.1%} of 500 digits, merged {accuracy(merge(network), others, wanted):.1%}"


def learn_coins(block: str, steps: int) -> str:
    picture, truth = coins()
    half = picture.shape[2] // 2
    network = Backbone(block, 1, 2, dim=16, depth=2, window=13, pooled=False)
    source = torch.Generator().manual_seed(0)
    train(network, crops(picture[:, :, :half], truth[:, :, :half], 96, steps, source))
    unseen = picture[:, :, half:], truth[:, :, half:]
    return f"overlap {overlap(network, *unseen):.3f} on the half not seen, merged {overlap(merge(network), *unseen):.3f}"  # noqa: E501


def learn_textures(window: int, steps: int, device: str) -> str:
    source = torch.Generator().manual_seed(0)
    network = Backbone("unireplk", 1, 2, dim=16, depth=2, window=window).to(device)

    def fresh() -> tuple[Tensor, Tensor]:
        return textures(32, 48, source, device)

    train(network, (fresh() for _ in range(steps)))
    return f"{accuracy(network, *textures(512, 48, source, device)):.1%} of 512 textures"


def timed(name: str, text: str, began: float) -> None:
    print(f"{name:28} {text}  ({time.perf_counter() - began:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="large_kernels", description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for block in BLOCKS:
        torch.manual_seed(0)
        began = time.perf_counter()
        timed(f"digits, {block}", learn_digits(block, options.steps), began)
        torch.manual_seed(0)
        began = time.perf_counter()
        timed(f"coins, {block}", learn_coins(block, options.steps), began)
    for window in (3, 17):
        torch.manual_seed(0)
        began = time.perf_counter()
        text = learn_textures(window, 2 * options.steps, options.device)
        timed(f"textures, {window} x {window}", text, began)


if __name__ == "__main__":
    main()
