"""Times the convolutions of foveal on a CPU against PyTorch's own; two lines per case.

THP_MEM_ALLOC_ENABLE=1 OMP_WAIT_POLICY=passive python scripts/cpu_convolution.py [--only "7x7|mix"] [--out F]

float32.  Outputs and gradients of two channels (of one sample, for `local_mix`) are compared with float64
first, by the bound of foveal.testing; a case that is wrong is recorded and not timed.  Then every round
calls all runners once, in rotating order; medians are shown.  What takes longer than a second is called
once more only.  Cases of which --out has both lines are left out: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal.testing import bounds

_NEIGHBOURS = 3
_SLOW = 1.0
"""Seconds of a call that is not repeated."""
_MOST_ROUNDS = 25
PASSES = ("forward", "forward and backward")
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Call = Callable[..., Tensor]


@dataclass
class Runner:
    """A function of tensors, and the weight of its output."""

    call: Call
    leaves: Sequence[Tensor]
    weight: Tensor

    def forward(self) -> None:
        with torch.no_grad():
            self.call(*self.leaves)

    def whole(self) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in self.leaves]
        return lambda: torch.autograd.grad(self.call(*leaves), leaves, self.weight)


@dataclass
class Case:
    """Runners, ours first; `part` cuts the results of each of ours; `exact` computes them from scratch."""

    runners: dict[str, Runner]
    exact: Callable[[torch.dtype, int], list[Tensor]]
    part: Callable[[str, list[Tensor]], list[Tensor]]
    shapes: str
    plan: str

    def gate(self) -> list[str]:
        exact = self.exact(torch.float64, 0)
        usual = [0.0] * len(exact)
        for seed in range(_NEIGHBOURS):
            pairs = zip(
                self.exact(torch.float32, seed), self.exact(torch.float64, seed), strict=True
            )
            usual = [max(u, bounds.error(*pair)) for u, pair in zip(usual, pairs, strict=True)]
        wrong = []
        for name, runner in self.runners.items():
            if name.startswith("foveal"):
                found = self.part(name, results(runner.call, runner.leaves, runner.weight))
                terms = self.exact(torch.float64, -1)  # all of these sums cancel
                for number, each in enumerate(zip(found, usual, exact, terms, strict=True)):
                    verdict = bounds.check(f"{name}, result {number}", *each)
                    wrong += [] if verdict.ok else [str(verdict)]
        return wrong


def results(call: Call, leaves: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(leaves: Sequence[Tensor], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """A neighbour of each tensor for each seed, themselves for 0, their sizes for -1, in `dtype`."""
    if seed < 0:
        return [x.abs().to(dtype) for x in leaves]
    source = torch.Generator().manual_seed(seed)
    return [(bounds.neighbour(x, source) if seed else x).to(dtype) for x in leaves]


def layouts(x: Tensor, dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Both, channels last and channels first, as PyTorch's convolutions take them."""
    last = [t.movedim(-1, 1) for t in (x, dy)]
    return last, [t.contiguous() for t in last]


def depthwise(
    batch: int, channels: int, grid: tuple[int, ...], window: tuple[int, ...], dilation: int = 1
) -> Case:
    x, dy = (normal(batch, *grid, channels, seed=seed) for seed in (0, 1))
    taps = normal(channels, *window, seed=2) / torch.Size(window).numel() ** 0.5
    last, first = layouts(x, dy)
    reach = [dilation * (k - 1) for k in window]
    even = all(r % 2 == 0 for r in reach)
    zeros = [side for r in reversed(reach) for side in (r // 2, r - r // 2)]

    def theirs(x: Tensor, taps: Tensor) -> Tensor:
        own = x if even else F.pad(x, zeros)
        padding = [r // 2 if even else 0 for r in reach]
        y: Tensor = CONVOLVE[len(grid)](own, taps[:, None], None, 1, padding, dilation, len(taps))
        return y

    ours = functools.partial(fv.convolve, dilation=dilation)
    ours_first = functools.partial(ours, channels_first=True)
    runners = {
        "foveal, channels last": Runner(ours, (x, taps), dy),
        "foveal, channels first": Runner(ours_first, (first[0], taps), first[1]),
        "torch, channels first": Runner(theirs, (first[0], taps), first[1]),
    }
    if len(grid) > 1:
        runners["torch, channels last"] = Runner(theirs, (last[0], taps), last[1])

    def exact(dtype: torch.dtype, seed: int) -> list[Tensor]:
        x, dy, own = near((first[0][:, :2], first[1][:, :2], taps[:2]), seed, dtype)
        return results(theirs, (x, own), dy)

    def part(name: str, found: list[Tensor]) -> list[Tensor]:
        whole = found[:2] if "first" in name else [t.movedim(-1, 1) for t in found[:2]]
        return [*(t[:, :2] for t in whole), found[2][:2]]

    plans = [
        fv.explain_convolve(x, taps.clone().requires_grad_(grad), dilation=dilation).implementation[
            0
        ]
        for grad in (False, True)
    ]
    text = f"x {list(x.shape)}, filter {list(taps.shape)}, dilation {dilation}"
    return Case(runners, exact, part, text, " / ".join(plans))


def strips(batch: int, channels: int, side: int, taps: int) -> Case:
    x, dy = (normal(batch, side, side, channels, seed=seed) for seed in (0, 1))
    row, column = (normal(channels, taps, seed=seed) / taps**0.5 for seed in (2, 3))
    last, first = layouts(x, dy)

    def theirs(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
        y = F.conv2d(x, row[:, None, None], padding=(0, taps // 2), groups=len(row))
        return F.conv2d(y, column[:, None, :, None], padding=(taps // 2, 0), groups=len(row))

    def ours(x: Tensor, row: Tensor, column: Tensor, channels_first: bool = False) -> Tensor:
        return fv.convolve(x, fv.Strips(row, column), channels_first=channels_first)

    ours_first = functools.partial(ours, channels_first=True)
    runners = {
        "foveal, channels last": Runner(ours, (x, row, column), dy),
        "foveal, channels first": Runner(ours_first, (first[0], row, column), first[1]),
        "torch, channels first": Runner(theirs, (first[0], row, column), first[1]),
        "torch, channels last": Runner(theirs, (last[0], row, column), last[1]),
    }

    def exact(dtype: torch.dtype, seed: int) -> list[Tensor]:
        parts = (first[0][:, :2], row[:2], column[:2], first[1][:, :2])
        *own, dy = near(parts, seed, dtype)
        return results(theirs, own, dy)

    def part(name: str, found: list[Tensor]) -> list[Tensor]:
        whole = found[:2] if "first" in name else [t.movedim(-1, 1) for t in found[:2]]
        return [*(t[:, :2] for t in whole), found[2][:2], found[3][:2]]

    return Case(runners, exact, part, f"x {list(x.shape)}, strips of {taps}", "in turn")


def mixed(batch: int, side: int, heads: int, dim: int, window: int) -> Case:
    """Against unfold with einsum, and against a loop over the taps."""
    weights = torch.softmax(normal(batch, side, side, heads, window**2), -1)
    v, do = (normal(batch, side, side, heads, dim, seed=seed) for seed in (1, 2))

    def unfolded(weights: Tensor, v: Tensor) -> Tensor:
        rows = F.unfold(v.flatten(3).movedim(-1, 1), window, padding=window // 2)
        rows = rows.unflatten(1, (heads, dim, -1)).unflatten(-1, v.shape[1:3])
        return torch.einsum("bxyht,bhdtxy->bxyhd", weights, rows)

    def looped(weights: Tensor, v: Tensor) -> Tensor:
        seen = F.pad(v, [0] * 4 + [window // 2] * 4)
        o = torch.zeros_like(v)
        for tap in range(window**2):
            y, x = divmod(tap, window)
            o = o + weights[..., tap, None] * seen[:, y : y + side, x : x + side]
        return o

    ours = functools.partial(fv.local_mix, window=window)
    runners = {
        "foveal": Runner(ours, (weights, v), do),
        "unfold and einsum": Runner(unfolded, (weights, v), do),
        "loop over taps": Runner(looped, (weights, v), do),
    }

    def exact(dtype: torch.dtype, seed: int) -> list[Tensor]:
        *own, dy = near((weights[:1], v[:1], do[:1]), seed, dtype)
        return results(unfolded, own, dy)

    plan = fv.explain_local_mix(weights, v, window).implementation[0]
    text = f"weights {list(weights.shape)}, v {list(v.shape)}"
    return Case(runners, exact, lambda _, found: [t[:1] for t in found], text, plan)


def spectral(batch: int, length: int, channels: int) -> Case:
    """Both gates, against torch.fft in both layouts."""
    x, pre, post, dy = (normal(batch, length, channels, seed=seed) for seed in range(4))
    taps = normal(channels, length, seed=4) / length**0.5

    def ours(x: Tensor, taps: Tensor, pre: Tensor, post: Tensor) -> Tensor:
        return fv.fftconv(x, taps, pre_gate=pre, post_gate=post)

    def theirs(x: Tensor, taps: Tensor, pre: Tensor, post: Tensor, axis: int = -1) -> Tensor:
        spectrum = torch.fft.rfft(taps, 2 * length)
        spectrum = spectrum if axis == -1 else spectrum.mT
        y = torch.fft.irfft(torch.fft.rfft(x * pre, 2 * length, axis) * spectrum, 2 * length, axis)
        found: Tensor = post * y.narrow(axis, 0, length)
        return found

    swapped = [t.mT.contiguous() for t in (x, pre, post, dy)]
    runners = {
        "foveal, channels last": Runner(ours, (x, taps, pre, post), dy),
        "torch.fft, channels last": Runner(
            functools.partial(theirs, axis=1), (x, taps, pre, post), dy
        ),
        "torch.fft, channels first": Runner(theirs, (swapped[0], taps, *swapped[1:3]), swapped[3]),
    }

    def exact(dtype: torch.dtype, seed: int) -> list[Tensor]:
        parts = (swapped[0][:, :2], taps[:2], *(t[:, :2] for t in swapped[1:]))
        *own, dy = near(parts, seed, dtype)
        return results(theirs, own, dy)

    def part(name: str, found: list[Tensor]) -> list[Tensor]:
        return [t[:2] if n == 2 else t.mT[:, :2] for n, t in enumerate(found)]

    plan = fv.explain_fftconv(x, taps).implementation[0]
    return Case(
        runners, exact, part, f"x and gates {list(x.shape)}, filter {list(taps.shape)}", plan
    )


SIZES = (1, 3, 5, 7, 9, 13, 21, 31)
MAPS = ((1, 128, 14), (8, 384, 14), (1, 128, 28), (8, 128, 28), (1, 64, 56), (8, 64, 56))
CASES: dict[str, Callable[[], Case]] = {
    **{
        f"{k}x{k}, {n}x{n}, B{b}, C{c}": functools.partial(depthwise, b, c, (n, n), (k, k))
        for k in SIZES
        for b, c, n in MAPS
    },
    "dilated 3 of 7x7, 28x28, B8, C64": lambda: depthwise(8, 64, (28, 28), (7, 7), 3),
    "dilated 2 of 5x5, 56x56, B8, C64": lambda: depthwise(8, 64, (56, 56), (5, 5), 2),
    "dilated 2 of 3x3, 28x28, B8, C64": lambda: depthwise(8, 64, (28, 28), (3, 3), 2),
    "dilated 2 of 13x13, 56x56, B1, C64": lambda: depthwise(1, 64, (56, 56), (13, 13), 2),
    "volume 3x3x3, 16^3, B1, C32": lambda: depthwise(1, 32, (16,) * 3, (3,) * 3),
    "volume 3x3x3, 24^3, B2, C32": lambda: depthwise(2, 32, (24,) * 3, (3,) * 3),
    "volume 7x7x7, 16^3, B1, C32": lambda: depthwise(1, 32, (16,) * 3, (7,) * 3),
    "sequence 4, L1024, B4, C256": lambda: depthwise(4, 256, (1024,), (4,)),
    "sequence 31, L1024, B4, C256": lambda: depthwise(4, 256, (1024,), (31,)),
    "strips 11, 56x56, B8, C64": lambda: strips(8, 64, 56, 11),
    "strips 21, 28x28, B8, C64": lambda: strips(8, 64, 28, 21),
    "mix 3x3, 28x28, B2, H8, D32": lambda: mixed(2, 28, 8, 32, 3),
    "mix 7x7, 28x28, B1, H4, D32": lambda: mixed(1, 28, 4, 32, 7),
    "fftconv L1024, B2, C256": lambda: spectral(2, 1024, 256),
    "fftconv L8192, B1, C64": lambda: spectral(1, 8192, 64),
}


def seconds(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Samples of interleaved calls, each after one that does not count."""

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    first = {name: timed(call) for name, call in calls.items()}
    samples = {name: [timed(calls[name])] for name in calls if first[name] > _SLOW}
    quick = [name for name in calls if name not in samples]
    samples |= {name: [] for name in quick}
    stop = time.perf_counter() + budget
    for turn in range(_MOST_ROUNDS):
        if turn > 2 and time.perf_counter() > stop:
            break
        for place in range(len(quick)):
            name = quick[(place + turn) % len(quick)]
            samples[name].append(timed(calls[name]))
    return {name: samples[name] for name in calls}


def finished(out: Path | None) -> set[str]:
    """Cases of which the file has all lines."""
    if out is None or not out.exists():
        return set()
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {line["case"] for line in lines if line.get("pass", PASSES[-1]) == PASSES[-1]}


def run(name: str, case: Case, budget: float) -> list[dict[str, object]]:
    """The lines of a case, printed as they are found."""
    wrong = case.gate()
    if wrong:
        print(f"{name}: WRONG {'; '.join(wrong)}", flush=True)
        return [{"case": name, "shapes": case.shapes, "error": "; ".join(wrong)}]
    lines: list[dict[str, object]] = []
    for kind in PASSES:
        load = os.getloadavg()[0]
        calls = {n: r.forward if kind == PASSES[0] else r.whole() for n, r in case.runners.items()}
        samples = seconds(calls, budget)
        middle = {n: statistics.median(own) for n, own in samples.items()}
        shown = "; ".join(f"{n} {1e3 * each:.3f}" for n, each in middle.items())
        print(f"{name}, {case.plan}, {kind}: {shown}", flush=True)
        lines.append(
            {"case": name, "shapes": case.shapes, "pass": kind, "plan": case.plan, "load": load}
            | {"medians": middle, "samples": samples}
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="cases whose names begin with one of these, by |"
    )
    parser.add_argument("--budget", type=float, default=0.4, help="seconds of each pass of a case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "command": f"python {sys.argv[0]} --threads {options.threads} --budget {options.budget}",
        "environment": {
            key: os.environ.get(key) for key in ("THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY")
        },
    }
    failed = 0
    only, done = tuple(filter(None, options.only.split("|"))), finished(options.out)
    chosen = [name for name in CASES if name not in done and (not only or name.startswith(only))]
    for number, name in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] ", end="", flush=True)
        for line in run(name, CASES[name](), options.budget):
            failed += "error" in line
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | about) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
