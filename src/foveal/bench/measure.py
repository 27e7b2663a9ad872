"""Time and memory of competitors on one problem, fairly: paired, interleaved, raw.

A round takes one sample of every pass of every competitor, in an order that rotates from round
to round, so sample r of one competitor may be compared with sample r of another: both saw the
same minute of the machine.  Interleaving also means that no one starts with its own data in the
caches.

On CUDA, times are those of the device: before every sample the second-level cache is overwritten and
the device waits while the host enqueues, so the host shows only where it needs longer than that.  The
first rounds also take warm samples: the same call once more, right after, on what the caches hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
WARM = {part: f"{part}, warm" for part in (FORWARD, BACKWARD, BOTH)}
PASSES = (FORWARD, BACKWARD, BOTH, *WARM.values())

_MEMORY_RUNS = 3
_WAIT_CYCLES = 3_000_000


class Runner(Protocol):
    """What is timed: `forward` without a graph, `train` split where the backward starts."""

    def forward(self) -> object: ...

    def loss_and_gradients(self) -> tuple[Callable[[], Tensor], Callable[[Tensor], object]] | None:
        """The forward that records a graph, and the backward from its output; None: no backward."""
        ...


@dataclass(frozen=True)
class Budget:
    """When to stop: after `seconds` and `rounds[0]` rounds, at the latest after `rounds[1]` rounds."""

    seconds: float = 20.0
    rounds: tuple[int, int] = (3, 40)
    warm_up: float = 0.3


DEFAULT_BUDGET = Budget()

Samples = dict[str, list[float]]
"""Seconds of every sample by pass; sample r of all competitors belongs to the same round."""


def measure(
    runners: Mapping[str, Sequence[Runner]],
    device: torch.device,
    budget: Budget,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Samples]:
    """Samples of every competitor.  `progress` hears the share that is done.

    A competitor is one runner or several that differ in their inputs only and take turns.  Lists of
    one pass are equally long; warm passes, on CUDA, have at most `budget.rounds[0]` samples.
    """
    cuda = device.type == "cuda"
    clock = _CudaClock(device) if cuda else _HostClock()
    names = list(runners)
    samples: dict[str, Samples] = {name: {} for name in names}
    if not names:
        return samples
    with _no_collection():
        for same in runners.values():
            _warm_up(same[0], clock, budget.warm_up)
        start = time.perf_counter()
        for done in range(budget.rounds[1]):
            spent = time.perf_counter() - start
            if done >= budget.rounds[0] and spent >= budget.seconds:
                break
            spent_share = spent / budget.seconds if budget.seconds else 1.0
            progress(max(done / budget.rounds[1], min(spent_share, done / budget.rounds[0])))
            turn = done % len(names)
            again = cuda and done < budget.rounds[0]
            for name in names[turn:] + names[:turn]:
                runner = runners[name][done % len(runners[name])]
                for part, seconds in _sample(runner, clock, again).items():
                    samples[name].setdefault(part, []).append(seconds)
    progress(1.0)
    return samples


def peak_memory(
    run: Callable[[], object],
    device: torch.device,
    prepare: Callable[[], object] = lambda: None,
) -> int | None:
    """Bytes by which memory grew at its highest while `run` ran, its result included.

    `prepare` runs before every count begins: what it gives back is no part of where the count starts.

    On CUDA the allocator's own maximum.  On Linux the kernel's high-water mark of resident
    memory, reset before the run after freed pages were given back: it sees every allocation,
    also those inside libraries, to about 1 % and some hundred kilobytes.  Pages of code that are
    touched for the first time count too, so the run is repeated, a long one once, and the
    least growth taken.  None where the system offers neither.
    """
    count = _cuda_growth if device.type == "cuda" else _resident_growth
    start = time.perf_counter()
    growths: list[int | None] = []
    while len(growths) < 2 or (len(growths) < _MEMORY_RUNS and time.perf_counter() - start < 1.0):
        prepare()
        growths.append(count(run, device))
    found = [growth for growth in growths if growth is not None]
    return min(found) if found else None


def _cuda_growth(run: Callable[[], object], device: torch.device) -> int | None:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def _resident_growth(run: Callable[[], object], device: torch.device) -> int | None:
    if not _reset_high_water_mark():
        return None
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return max(peak - before, 0)


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of samples, in the unit of the samples."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / (2 * self.median) if self.median else 0.0


def summarise(samples: Sequence[float]) -> Summary:
    """Median and quartiles, interpolated between samples."""
    values = torch.tensor(samples, dtype=torch.float64)
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return Summary(middle, low, high, len(samples))


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Summary:
    """How many times longer `slow` took, round by round.  Lists of unequal length: by medians."""
    if len(slow) == len(fast):
        return summarise([a / b for a, b in zip(slow, fast, strict=True)])
    quotient = summarise(slow).median / summarise(fast).median
    return Summary(quotient, quotient, quotient, min(len(slow), len(fast)))


class _HostClock:
    def settle(self, cold: bool) -> None: ...

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)

    def settle(self, cold: bool) -> None:
        if cold:
            self.flush.zero_()
        torch.cuda._sleep(_WAIT_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _sample(
    runner: Runner, clock: _HostClock | _CudaClock, again: bool = False
) -> dict[str, float]:
    """Seconds by pass; `again` adds those of a second call on warm caches."""
    seconds = {FORWARD: _forward(runner, clock, cold=True)}
    if again:
        seconds[WARM[FORWARD]] = _forward(runner, clock, cold=False)
    steps = runner.loss_and_gradients()
    if steps is None:
        return seconds
    seconds[BOTH], seconds[BACKWARD] = _train(*steps, clock, cold=True)
    if again:
        seconds[WARM[BOTH]], seconds[WARM[BACKWARD]] = _train(*steps, clock, cold=False)
    return seconds


def _forward(runner: Runner, clock: _HostClock | _CudaClock, cold: bool) -> float:
    clock.settle(cold)
    start = clock.mark()
    runner.forward()
    return clock.seconds(start, clock.mark())  # type: ignore[arg-type]


def _train(
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], object],
    clock: _HostClock | _CudaClock,
    cold: bool,
) -> tuple[float, float]:
    """Seconds of forward and backward, and of the backward alone."""
    clock.settle(cold)
    start = clock.mark()
    out = forward()
    middle = clock.mark()
    backward(out)
    end = clock.mark()
    return clock.seconds(start, end), clock.seconds(middle, end)  # type: ignore[arg-type]


def _warm_up(runner: Runner, clock: _HostClock | _CudaClock, seconds: float) -> None:
    start = time.perf_counter()
    _sample(runner, clock)
    while time.perf_counter() - start < seconds:
        _sample(runner, clock)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _reset_high_water_mark() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")
    except (OSError, AttributeError):
        return False
    return True


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
