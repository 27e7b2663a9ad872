"""python -m examples.diffusion: time of a FLUX block with its own attention and with neighborhoods."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import foveal as fv
from examples.diffusion.block import GridAttention, flux_block


def main() -> None:
    parser = argparse.ArgumentParser(prog="diffusion", description=__doc__)
    parser.add_argument("--side", type=int, default=32, help="image tokens per axis")
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--words", type=int, default=64, help="text tokens")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    grid = (options.side, options.side)
    torch.manual_seed(0)
    block = flux_block("double", options.heads, options.head_dim).to(options.device, dtype)
    dim = options.heads * options.head_dim

    def tokens(count: int) -> torch.Tensor:
        return torch.randn(1, count, dim, device=options.device, dtype=dtype, requires_grad=True)

    image, text = tokens(options.side**2), tokens(options.words)
    condition = torch.randn(1, dim, device=options.device, dtype=dtype)

    def step() -> None:
        words, pixels = block(image, text, condition)
        (words.float().square().mean() + pixels.float().square().mean()).backward()

    own = _seconds(step, options.device)
    block.attn.set_processor(
        GridAttention(grid, fv.Neighborhood((options.window,) * 2, stride=options.stride))
    )
    ours = _seconds(step, options.device)
    print(f"{options.side} x {options.side} image tokens, {options.words} words, {options.device}")
    print(f"own attention      {own * 1e3:9.2f} ms forward and backward of the block")
    print(f"neighborhoods of {options.window} {ours * 1e3:9.2f} ms, {own / ours:.2f}x")


def _seconds(step: Callable[[], None], device: str) -> float:
    """The best of a few runs."""
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
