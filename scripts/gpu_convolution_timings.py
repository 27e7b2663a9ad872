"""Times of the convolution engine and of PyTorch on the cases that are judged, interleaved.

Before a case is timed, outputs and gradients of its first runner on a part of the channels or samples
are compared with float64; one that is wrong is recorded and not timed.  Every sample starts with an
overwritten second-level cache and a device that waits while the host enqueues.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foveal as fv
from foveal.layers import LargeKernelAttention
from foveal.testing import bounds

DEVICE = "cuda"
B16, F32 = torch.bfloat16, torch.float32
_WAIT_CYCLES = 8_000_000
"""While the device waits the host enqueues what is timed, so that its time does not count."""
_INPUTS = 4
"""Inputs at which the error of a plain computation is taken."""
Writer = Callable[[dict[str, object]], None]
Call = Callable[[], object]


@dataclass
class Runner:
    """A function of tensors, called on `leaves` and differentiated with `weight`."""

    name: str
    call: Callable[..., Tensor]
    leaves: Sequence[Tensor]
    weight: Tensor
    differentiable: bool = True

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.leaves)

    def backward(self) -> Call:
        leaves = [x.detach().requires_grad_() for x in self.leaves]
        y = self.call(*leaves)
        return lambda: torch.autograd.grad(y, leaves, self.weight, retain_graph=True)


@dataclass
class Timed:
    """Runners of one case, ours first, and what the first of them is compared with."""

    runners: list[Runner]
    exact: Callable[[torch.dtype, int], list[Tensor]]
    part: Callable[[list[Tensor]], list[Tensor]]
    shapes: str

    def gate(self) -> list[bounds.Verdict]:
        """Output and gradients of the first runner, on a part, against float64."""
        first = self.runners[0]
        got = self.part([first.forward(), *first.backward()()])  # type: ignore[misc]
        usual = [0.0] * len(got)
        for seed in range(_INPUTS):
            plain, exact = self.exact(first.weight.dtype, seed), self.exact(torch.float64, seed)
            errors = map(bounds.error, plain, exact)
            usual = [max(pair) for pair in zip(usual, errors, strict=True)]
        names = ["y", *(f"gradient {number}" for number in range(len(got) - 1))]
        found = zip(names, got, usual, self.exact(torch.float64, 0), strict=True)
        return [bounds.check(*each) for each in found]


def near(leaves: Sequence[Tensor], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """A neighbour of each tensor for each seed, themselves for 0, in `dtype`."""
    source = torch.Generator().manual_seed(seed)
    return [(bounds.neighbour(x, source) if seed else x).to(dtype) for x in leaves]


def results(call: Callable[..., Tensor], leaves: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """The output and the gradients of all leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    source = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=source, device=DEVICE).to(dtype)


def copy(moved: int, like: Tensor) -> Runner:
    """A copy that reads and writes as many elements."""
    x = like.new_zeros(moved // 2)
    return Runner("copy of as many bytes", torch.clone, (x,), x, differentiable=False)


CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def depthwise(
    dtype: torch.dtype, batch: int, channels: int, grid: tuple[int, ...], window: tuple[int, ...],
    dilation: int = 1,
) -> Timed:  # fmt: skip
    """`convolve` in both layouts, and PyTorch's grouped convolution in both."""
    axes = len(grid)
    x, dy = (normal(batch, *grid, channels, dtype=dtype, seed=seed) for seed in (0, 1))
    taps = normal(channels, *window) / torch.Size(window).numel() ** 0.5
    taps = taps.to(dtype)
    first = [t.movedim(-1, 1).contiguous() for t in (x, dy)]
    ours = functools.partial(fv.convolve, dilation=dilation)
    reach = [dilation * (k - 1) for k in window]
    zeros = [side for r in reversed(reach) for side in (r // 2, r - r // 2)]

    def theirs(x: Tensor, taps: Tensor) -> Tensor:
        if any(r % 2 for r in reach):
            return CONVOLVE[axes](F.pad(x, zeros), taps[:, None], groups=channels)
        padding = tuple(r // 2 for r in reach)
        options = {"padding": padding, "dilation": dilation, "groups": channels}
        return CONVOLVE[axes](x, taps[:, None], **options)  # type: ignore[arg-type]

    runners = [
        Runner("foveal, channels last", ours, (x, taps), dy),
        Runner(
            "foveal, channels first",
            functools.partial(ours, channels_first=True),
            (first[0], taps),
            first[1],
        ),
        Runner("torch, channels first", theirs, (first[0], taps), first[1]),
    ]
    if axes > 1:
        last = [t.contiguous(memory_format=FORMATS[axes]) for t in first]
        runners.append(Runner("torch, channels last", theirs, (last[0], taps), last[1]))
    runners.append(copy(2 * x.numel(), x))

    def exact(wanted: torch.dtype, seed: int) -> list[Tensor]:
        x, dy, own = near((first[0][:, :2], first[1][:, :2], taps[:2]), seed, wanted)
        found = results(
            lambda x, f: CONVOLVE[axes](
                F.pad(x, zeros), f[:, None], dilation=dilation, groups=len(f)
            ),
            (x, own),
            dy,
        )
        return [found[0].movedim(1, -1), found[1].movedim(1, -1), found[2]]

    def part(found: list[Tensor]) -> list[Tensor]:
        return [found[0][..., :2], found[1][..., :2], found[2][:2]]

    return Timed(runners, exact, part, f"x {list(x.shape)}, filter {list(taps.shape)}")


class Eager(nn.Module):
    """Large kernel attention as three PyTorch convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.conv1(self.conv_spatial(self.conv0(x)))
        return x * gate


def lka(dtype: torch.dtype, batch: int, channels: int, side: int) -> Timed:
    """The layer, and the same in PyTorch in both layouts."""
    torch.manual_seed(0)
    layer, eager = LargeKernelAttention(channels).to(DEVICE), Eager(channels).to(DEVICE)
    eager.load_state_dict(layer.state_dict())
    x, dy = (normal(batch, side, side, channels, dtype=dtype, seed=seed) for seed in (0, 1))
    names, weights = zip(
        *((n, p.detach().to(dtype)) for n, p in layer.named_parameters()), strict=True
    )

    def of(module: nn.Module) -> Callable[..., Tensor]:
        def call(x: Tensor, *weights: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(
                module, dict(zip(names, weights, strict=True)), (x,)
            )
            return found

        return call

    first = [t.movedim(-1, 1).contiguous() for t in (x, dy)]
    last = [t.contiguous(memory_format=torch.channels_last) for t in first]
    runners = [
        Runner("foveal, channels last", of(layer), (x, *weights), dy),
        Runner("torch, channels first", of(eager), (first[0], *weights), first[1]),
        Runner("torch, channels last", of(eager), (last[0], *weights), last[1]),
    ]

    def exact(wanted: torch.dtype, seed: int) -> list[Tensor]:
        """Of one sample: the gradients of weights are sums over all of them."""
        dy, *leaves = near((first[1][:1], first[0][:1], *weights), seed, wanted)
        found = results(of(eager), leaves, dy)
        return [t.movedim(1, -1) for t in found[:2]]

    def part(found: list[Tensor]) -> list[Tensor]:
        return [t[:1] for t in found[:2]]

    return Timed(runners, exact, part, f"x {list(x.shape)}, 5x5, 7x7 dilated 3, pointwise, gate")


def mixed(dtype: torch.dtype, batch: int, side: int, heads: int, dim: int, window: int) -> Timed:
    """`local_mix`, and unfold with einsum."""
    weights = torch.softmax(normal(batch, side, side, heads, window**2), -1).to(dtype)
    v, do = (normal(batch, side, side, heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))

    def ours(weights: Tensor, v: Tensor) -> Tensor:
        return fv.local_mix(weights, v, window)

    def theirs(weights: Tensor, v: Tensor) -> Tensor:
        rows = F.unfold(v.flatten(3).movedim(-1, 1), window, padding=window // 2)
        rows = rows.unflatten(1, (heads, dim, -1)).unflatten(-1, v.shape[1:3])
        return torch.einsum("bxyht,bhdtxy->bxyhd", weights, rows)

    leaves = (weights, v)
    runners = [
        Runner("foveal, channels last", ours, leaves, do),
        Runner("unfold and einsum", theirs, leaves, do),
        copy(weights.numel() + 2 * v.numel(), v),
    ]

    def exact(wanted: torch.dtype, seed: int) -> list[Tensor]:
        *own, dy = near((weights[:1], v[:1], do[:1]), seed, wanted)
        return results(theirs, own, dy)

    text = f"weights {list(weights.shape)}, v {list(v.shape)}"
    return Timed(runners, exact, lambda found: [t[:1] for t in found], text)


def spectral(dtype: torch.dtype, batch: int, length: int, channels: int) -> Timed:
    """`fftconv` with both gates, and torch.fft on channels-first tensors, zeros appended."""
    size = (batch, length, channels)
    x, pre, post, dy = (normal(*size, dtype=dtype, seed=seed) for seed in range(4))
    taps = (normal(channels, length, seed=4) / length**0.5).to(dtype)

    def ours(x: Tensor, taps: Tensor, pre: Tensor, post: Tensor) -> Tensor:
        return fv.fftconv(x, taps, pre_gate=pre, post_gate=post)

    def theirs(x: Tensor, taps: Tensor, pre: Tensor, post: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, F32)
        seen = torch.fft.rfft(x.to(wide) * pre, 2 * length)
        seen = seen * torch.fft.rfft(taps.to(wide), 2 * length)
        return (post * torch.fft.irfft(seen, 2 * length)[..., :length]).to(x.dtype)

    swapped = [t.mT.contiguous() for t in (x, pre, post, dy)]
    runners = [
        Runner("foveal, channels last", ours, (x, taps, pre, post), dy),
        Runner("torch.fft, channels first", theirs, (swapped[0], taps, *swapped[1:3]), swapped[3]),
    ]

    def exact(wanted: torch.dtype, seed: int) -> list[Tensor]:
        parts = (swapped[0][:, :4], taps[:4], *(t[:, :4] for t in swapped[1:]))
        *own, dy = near(parts, seed, wanted)
        found = results(theirs, own, dy)
        return [found[2] if number == 2 else t.mT for number, t in enumerate(found)]

    def part(found: list[Tensor]) -> list[Tensor]:
        return [t[:4] if number == 2 else t[..., :4] for number, t in enumerate(found)]

    runners.append(copy(4 * x.numel(), x))
    return Timed(runners, exact, part, f"x and gates {list(size)}, filter {list(taps.shape)}")


CASES: dict[str, Callable[[], Timed]] = {
    "31x31, bf16": lambda: depthwise(B16, 64, 128, (56, 56), (31, 31)),
    "31x31, float32": lambda: depthwise(F32, 64, 128, (56, 56), (31, 31)),
    "13x13, bf16": lambda: depthwise(B16, 64, 128, (56, 56), (13, 13)),
    "7x7, bf16": lambda: depthwise(B16, 64, 128, (56, 56), (7, 7)),
    "LKA, bf16": lambda: lka(B16, 64, 128, 56),
    "13x13x13, bf16": lambda: depthwise(B16, 8, 64, (32, 32, 32), (13, 13, 13)),
    "local_mix 7x7, bf16": lambda: mixed(B16, 8, 56, 8, 32, 7),
    "fftconv B32 L1024, float32": lambda: spectral(F32, 32, 1024, 768),
    "fftconv B4 L8192, float32": lambda: spectral(F32, 4, 8192, 768),
    "fftconv B1 L65536, float32": lambda: spectral(F32, 1, 65536, 768),
    "7x7 dilated 3, bf16": lambda: depthwise(B16, 64, 128, (56, 56), (7, 7), 3),
    "7x7, float32": lambda: depthwise(F32, 64, 128, (56, 56), (7, 7)),
    "sequence, 4 taps, bf16": lambda: depthwise(B16, 8, 2048, (4096,), (4,)),
    "11x1, bf16": lambda: depthwise(B16, 64, 128, (56, 56), (11, 1)),
}
"""B64 C128 56x56 where nothing else is said; volumes B8 C64 32^3; the long convolutions have 768 channels."""


def milliseconds(calls: Sequence[Call], repeats: int) -> list[list[float]]:
    """Interleaved samples with a cold cache."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for own, call in zip(samples, calls, strict=True):
            flush.zero_()
            torch.cuda._sleep(_WAIT_CYCLES)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            own.append(start.elapsed_time(stop))
    return samples


def run(names: Sequence[str], write: Writer, repeats: int = 9) -> int:
    """Times the cases whose names begin with one of `names`, all without any; how many failed."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    failed = 0
    for name, make in CASES.items():
        if names and not any(name.startswith(each) for each in names):
            continue
        try:
            failed += _one(name, make(), write, repeats)
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            write({"case": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        torch.cuda.empty_cache()
    return failed


def _one(name: str, case: Timed, write: Writer, repeats: int) -> bool:
    verdicts = case.gate()
    if not all(verdict.ok for verdict in verdicts):
        print(f"{name}: WRONG {'; '.join(map(str, verdicts))}", flush=True)
        write({"case": name, "error": "; ".join(map(str, verdicts))})
        return True
    for direction in ("forward", "backward"):
        runners = case.runners
        if direction == "backward":
            runners = [r for r in runners if r.differentiable]
        calls = [r.forward if direction == "forward" else r.backward() for r in runners]
        cells = []
        for runner, own in zip(runners, milliseconds(calls, repeats), strict=True):
            middle = statistics.median(own)
            cells.append(f"{runner.name} {middle:.4f}")
            write(
                {
                    "case": name, "shapes": case.shapes, "runner": runner.name,
                    "pass": direction, "milliseconds": middle, "samples": own,
                }
            )  # fmt: skip
        print(f"{name} {direction}: {'; '.join(cells)}", flush=True)
        del calls
    return False
