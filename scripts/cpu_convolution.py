"""Times `convolve` on a CPU beside PyTorch's own depthwise convolution in both layouts; JSON lines.

python scripts/cpu_convolution.py [--threads 2] [--rounds 5] [--out FILE]

Channels last, as a user of either holds his tensors; PyTorch gets them channels first as well.  A case is
timed where output and gradients agree with float64 within the bound of foveal.testing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal.testing import bounds

GRID, CHANNELS, BATCH = (56, 56), 64, 4
WINDOWS = (3, 5, 7, 9, 11, 13, 17, 21, 31, 51)
Runner = Callable[[Tensor, Tensor], Tensor]


def runners(window: int) -> dict[str, tuple[Runner, bool]]:
    """What is timed on x and a filter, and whether x is channels first."""

    def torch_first(x: Tensor, filter: Tensor) -> Tensor:
        return F.conv2d(x, filter[:, None], padding=window // 2, groups=len(filter))

    def torch_last(x: Tensor, filter: Tensor) -> Tensor:
        first = x.movedim(-1, 1)  # a view of what PyTorch calls channels_last
        return torch_first(first, filter).movedim(1, -1)

    return {
        "foveal, channels last": (fv.convolve, False),
        "foveal, channels first": (lambda x, f: fv.convolve(x, f, channels_first=True), True),
        "torch, channels last": (torch_last, False),
        "torch, channels first": (torch_first, True),
    }


def inputs(window: int, first: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, a filter and the gradient of y."""
    source = torch.Generator().manual_seed(0)
    size = (BATCH, *GRID, CHANNELS)
    x, dy = (torch.randn(size, generator=source, dtype=torch.float64) for _ in range(2))
    filter = torch.randn(CHANNELS, window, window, generator=source, dtype=torch.float64) / window
    if first:
        x, dy = (t.movedim(-1, 1).contiguous() for t in (x, dy))
    return [t.to(dtype) for t in (x, filter, dy)]


def both(run: Runner, window: int, first: bool, dtype: torch.dtype) -> list[Tensor]:
    """y and the gradients of x and the filter, channels last."""
    x, filter, dy = inputs(window, first, dtype)
    leaves = x.requires_grad_(), filter.requires_grad_()
    y = run(*leaves)
    dx, dfilter = torch.autograd.grad(y, leaves, dy)
    return [t.movedim(1, -1) if first and t.dim() == 4 else t for t in (y.detach(), dx, dfilter)]


def wrong(run: Runner, window: int, first: bool) -> list[str]:
    """What is worse than twice the error of PyTorch's own computation."""
    plain, _ = runners(window)["torch, channels first"]
    exact = both(plain, window, True, torch.float64)
    usual = both(plain, window, True, torch.float32)
    got = both(run, window, first, torch.float32)
    found = zip(("y", "dx", "dfilter"), got, usual, exact, strict=True)
    return [str(v) for v in (bounds.check(*each) for each in found) if not v.ok]


def once(run: Runner, window: int, first: bool) -> tuple[float, float]:
    """Seconds of a forward, and of a forward with its backward."""
    x, filter, dy = inputs(window, first)
    with torch.no_grad():
        start = time.perf_counter()
        run(x, filter)
        forward = time.perf_counter() - start
    leaves = x.requires_grad_(), filter.requires_grad_()
    start = time.perf_counter()
    torch.autograd.grad(run(*leaves), leaves, dy)
    return forward, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arguments = [a for a in sys.argv[1:] if a not in ("--out", str(options.out))]
    facts = {
        "device": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "shapes": f"x [{BATCH}, {GRID[0]}, {GRID[1]}, {CHANNELS}], float32",
        "command": shlex.join(["python", "scripts/cpu_convolution.py", *arguments]),
    }
    failed = 0
    for window in WINDOWS:
        found = runners(window)
        samples: dict[str, list[tuple[float, float]]] = {}
        for name, (run, first) in found.items():
            errors = wrong(run, window, first)
            if errors:
                failed += 1
                print(f"{window}x{window} {name}: WRONG {'; '.join(errors)}", flush=True)
                continue
            samples[name] = []
        for _ in range(options.rounds):
            for name, own in samples.items():
                own.append(once(found[name][0], window, found[name][1]))
        cells = []
        for name, own in samples.items():
            forward, total = (statistics.median(part) * 1e3 for part in zip(*own, strict=True))
            cells.append(f"{name} {forward:.1f} / {total:.1f}")
            line = {**facts, "case": f"{window}x{window}", "runner": name, "samples": own}
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        print(f"{window}x{window} ms forward / with backward: {'; '.join(cells)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
