"""python -m examples.large_kernels: digits, coins and textures by networks of large filters."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

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

Learn = Callable[[int, str], dict[str, float]]
"""Trains with so many steps on a device; what came out, by its name."""


def learn_digits(block: str, steps: int, device: str) -> dict[str, float]:
    images, classes, others, wanted = (x.to(device) for x in digits())
    network = Backbone(block, 1, 10).to(device)
    source = torch.Generator().manual_seed(0)
    train(network, drawn(images, classes, 64, steps, source))
    return {
        "right of 500 digits": accuracy(network, others, wanted),
        "right when merged": accuracy(merge(network), others, wanted),
    }


def learn_coins(block: str, steps: int, device: str) -> dict[str, float]:
    picture, truth = (x.to(device) for x in coins())
    half = picture.shape[2] // 2
    network = Backbone(block, 1, 2, dim=16, depth=2, window=13, pooled=False).to(device)
    source = torch.Generator().manual_seed(0)
    train(network, crops(picture[:, :, :half], truth[:, :, :half], 96, steps, source))
    unseen = picture[:, :, half:], truth[:, :, half:]
    return {
        "overlap on the half not seen": overlap(network, *unseen),
        "overlap when merged": overlap(merge(network), *unseen),
    }


def learn_textures(window: int, steps: int, device: str) -> dict[str, float]:
    source = torch.Generator().manual_seed(0)
    network = Backbone("unireplk", 1, 2, dim=16, depth=2, window=window).to(device)

    def fresh() -> tuple[Tensor, Tensor]:
        return textures(32, 48, source, device)

    train(network, (fresh() for _ in range(2 * steps)))
    return {"right of 512 textures": accuracy(network, *textures(512, 48, source, device))}


TASKS: dict[str, Learn] = {
    **{f"digits, {block}": functools.partial(learn_digits, block) for block in BLOCKS},
    **{f"coins, {block}": functools.partial(learn_coins, block) for block in BLOCKS},
    **{f"textures, {n} x {n}": functools.partial(learn_textures, n) for n in (3, 17)},
}


def learnt(name: str, steps: int, device: str) -> dict[str, object]:
    """The record of a task, after it was learnt from the same seed as ever."""
    torch.manual_seed(0)
    began = time.perf_counter()
    scores = TASKS[name](steps, device)
    seconds = time.perf_counter() - began
    return {
        "task": name, "steps": steps, "scores": scores, "seconds": seconds, "device": device,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "command": f"python -m examples.large_kernels --steps {steps} --device {device}",
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; returns its exit status."""
    parser = argparse.ArgumentParser(prog="large_kernels", description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", default="", help="tasks whose names begin with one of these, by |"
    )
    parser.add_argument("--out", type=Path, help="where to append a JSON line for each task")
    options = parser.parse_args(arguments)
    for name in TASKS:
        if not name.startswith(tuple(options.only.split("|"))):
            continue
        record = learnt(name, options.steps, options.device)
        scores, seconds = record["scores"], record["seconds"]
        assert isinstance(scores, dict)
        shown = ", ".join(f"{score:.3f} {what}" for what, score in scores.items())
        print(f"{name:20} {shown}  ({seconds:.0f} s)", flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
