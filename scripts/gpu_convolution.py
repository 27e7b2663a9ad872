"""Checks and times the convolution engine on a CUDA device; one line per case.

python scripts/gpu_convolution.py check    outputs and gradients against float64, several processes
python scripts/gpu_convolution.py time [--cases "7x7" "fftconv B4"] [--out FILE]
    forward and backward, PyTorch's own beside them; JSON lines

A case that fails is printed with its error and the run goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal.testing import bounds

DEVICE = "cuda"
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    batch: int
    channels: int
    grid: tuple[int, ...]
    window: tuple[int, ...]
    dilation: int = 1

    def __str__(self) -> str:
        grid, window = ("x".join(map(str, n)) for n in (self.grid, self.window))
        spread = f" dilated {self.dilation}" if self.dilation > 1 else ""
        return f"{window}{spread} {str(self.dtype)[6:]} B{self.batch} C{self.channels} {grid}"

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """x and dy [B, *grid, C] and a filter [C, *window]."""
        source = torch.Generator(DEVICE).manual_seed(0)
        size = (self.batch, *self.grid, self.channels)
        x, dy = (torch.randn(size, generator=source, device=DEVICE) for _ in range(2))
        filter = torch.randn(self.channels, *self.window, generator=source, device=DEVICE)
        filter = filter / filter[0].numel() ** 0.5
        return x.to(self.dtype), filter.to(self.dtype), dy.to(self.dtype)

    def padding(self) -> list[int]:
        """Zeros around each axis, the last axis first."""
        reach = [self.dilation * (k - 1) for k in self.window]
        return [side for r in reversed(reach) for side in (r // 2, r - r // 2)]


B16, F32 = torch.bfloat16, torch.float32
CASES = (
    Case(B16, 64, 128, (56, 56), (31, 31)),
    Case(F32, 64, 128, (56, 56), (31, 31)),
    Case(B16, 64, 128, (56, 56), (13, 13)),
    Case(B16, 64, 128, (56, 56), (7, 7)),
    Case(F32, 64, 128, (56, 56), (7, 7)),
    Case(B16, 64, 128, (56, 56), (7, 7), 3),
    Case(B16, 8, 64, (32, 32, 32), (13, 13, 13)),
    Case(B16, 8, 2048, (4096,), (4,)),
)
CHECKED = (
    *CASES,
    Case(B16, 3, 20, (17, 9), (31, 31)),
    Case(F32, 2, 3, (1, 1), (5, 5)),
    Case(B16, 2, 33, (70, 100), (13, 19)),
    Case(F32, 3, 7, (50,), (129,), 2),
    Case(B16, 2, 5, (6, 9, 11), (7, 4, 5)),
)
VARIANTS = [(name, first) for name in ("toeplitz", "triton") for first in (False, True)]

Runs = tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]


def ours(case: Case, implementation: str, first: bool) -> Runs:
    """Forward and backward of `convolve`."""
    x, filter, dy = case.draw()
    if first:
        x, dy = (t.movedim(-1, 1).contiguous() for t in (x, dy))
    leaves = x.requires_grad_(), filter.requires_grad_()

    def forward() -> Tensor:
        return fv.convolve(
            *leaves, dilation=case.dilation, channels_first=first, implementation=implementation
        )

    y = forward()
    return forward, lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def plain(case: Case, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """y, dx and the gradient of the filter by PyTorch, of the first channels, channels last."""
    x, filter, dy = case.draw()
    part = x[..., :channels].movedim(-1, 1).to(dtype).requires_grad_()
    taps = filter[:channels, None].to(dtype).requires_grad_()
    padded = F.pad(part, case.padding())
    y = CONVOLVE[len(case.grid)](padded, taps, dilation=case.dilation, groups=len(taps))
    found = torch.autograd.grad(y, (part, taps), dy[..., :channels].movedim(-1, 1).to(dtype))
    return [y.detach().movedim(1, -1), found[0].movedim(1, -1), found[1][:, 0]]


def check(number: int) -> list[str]:
    """Each result of one case by the rule of foveal.testing.bounds."""
    torch.backends.cudnn.allow_tf32 = False
    case, lines = CHECKED[number], []
    exact, usual = (plain(case, 4, dtype) for dtype in (torch.float64, case.dtype))
    for implementation, first in VARIANTS:
        text = f"{case} {implementation} {'first' if first else 'last'}"
        try:
            forward, backward = ours(case, implementation, first)
            y, (dx, dfilter) = forward().detach(), backward()
            if first:
                y, dx = y.movedim(1, -1), dx.movedim(1, -1)
            got = (y[..., :4], dx[..., :4], dfilter[:4])
            names = ("y", "dx", "dfilter")
            verdicts = [bounds.check(*each) for each in zip(names, got, usual, exact, strict=True)]
            bad = not all(verdict.ok for verdict in verdicts)
            lines.append(f"{'FAILED' if bad else 'ok    '} {text} {'; '.join(map(str, verdicts))}")
        except fv.errors.RefusedError as refusal:
            lines.append(f"refused {text}: {refusal.reason}")
        except Exception as error:
            lines.append(f"ERROR  {text}: {type(error).__name__}: {str(error)[:300]}")
    return lines


def checks() -> int:
    failed = 0
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        for lines in pool.imap_unordered(check, range(len(CHECKED))):
            print("\n".join(lines), flush=True)
            failed += sum(line.startswith(("FAILED", "ERROR")) for line in lines)
    return failed


def writer(path: Path | None) -> Callable[[dict[str, object]], None]:
    """Appends JSON lines to a file, behind one that names the machine and the command."""

    def write(line: dict[str, object]) -> None:
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    import triton

    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    arguments = [a for a in sys.argv[1:] if path is None or a not in ("--out", str(path))]
    write({**facts, "command": shlex.join(["python", "scripts/gpu_convolution.py", *arguments])})
    return write


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("--cases", nargs="*", default=[], help="time: beginnings of names")
    parser.add_argument("--out", type=Path, help="time: the file that gets JSON lines")
    parser.add_argument("--samples", type=int, default=9, help="time: of each forward")
    options = parser.parse_args()
    if options.what == "check":
        return 1 if checks() else 0
    import gpu_convolution_timings

    return (
        1 if gpu_convolution_timings.run(options.cases, writer(options.out), options.samples) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
