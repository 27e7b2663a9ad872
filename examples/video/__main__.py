"""python -m examples.video: noise on a moving picture, removed frame by frame and across frames."""

from __future__ import annotations

import argparse
import time

import torch

from examples.video.denoise import denoise, moving_picture, psnr

SIGMA = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(prog="video", description=__doc__)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    clean = moving_picture(options.frames, options.height, options.width)
    source = torch.Generator().manual_seed(0)
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=source)
    clean, noisy = clean.to(options.device), noisy.to(options.device)
    print(f"noisy                    {psnr(noisy, clean):6.2f} dB")
    for name, window, causal in (
        ("one frame, 11 x 11", (1, 11, 11), False),
        ("3 frames before, 11 x 11", (4, 11, 11), True),
        ("5 frames, 11 x 11", (5, 11, 11), False),
    ):
        began = time.perf_counter()
        quality = psnr(denoise(noisy, window, SIGMA, causal=causal), clean)
        print(f"{name:24} {quality:6.2f} dB  {time.perf_counter() - began:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
