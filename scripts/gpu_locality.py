"""Times of the locality family on a CUDA device: NATTEN's table, the sphere, the relatives, the host.

Called by scripts/gpu.py.  `warm` runs every case once, each in a process of its own, so that kernels
are compiled side by side; `run` then times them one after another.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts"), str(ROOT)]

import gpu_timings  # noqa: E402
import torch  # noqa: E402
from gpu_timings import Case, Runner, Writer  # noqa: E402

import foveal as fv  # noqa: E402
from foveal.layers.groups import document_groups  # noqa: E402
from foveal.layers.sphere import area_score  # noqa: E402
from foveal.patterns.base import Extent, Pattern  # noqa: E402
from foveal.probe.tiles import best_tiles, machine, predict  # noqa: E402
from foveal.systems.locality.groups import regular_document  # noqa: E402

_SAMPLES = 7


@dataclasses.dataclass(frozen=True)
class Local:
    """A case, what NATTEN needs for it (forward and backward, ms) and what is asked of us (ms)."""

    case: Case
    natten: tuple[float, float] | None = None
    goal: tuple[float, float] | None = None
    score: Callable[[], fv.Score] = fv.Softmax
    implementations: tuple[str, ...] = ("hopper", "triton")
    backward: bool = True

    @property
    def name(self) -> str:
        return self.case.name


def cases() -> Iterator[Local]:
    """Most important first."""
    image, video, line = (256, 256), (30, 48, 80), (32768,)

    def local(
        name: str, grid: tuple[int, ...], heads: int, dim: int, pattern: Pattern, **rest: Any
    ) -> Local:
        return Local(Case(name, grid, heads, dim, pattern), **rest)

    neighborhood = fv.Neighborhood
    yield local(
        "2-D 128x128 window 25", (128, 128), 16, 128, neighborhood((25, 25)),
        natten=(0.803, 2.879), goal=(0.30, 1.0),
    )  # fmt: skip
    yield local(
        "2-D 256x256 window 13", image, 8, 64, neighborhood((13, 13)),
        natten=(0.658, 1.913), goal=(0.23, 0.70),
    )  # fmt: skip
    yield local(
        "2-D 256x256 window 80", image, 24, 128, neighborhood((80, 80)),
        natten=(17.55, 62.3), goal=(9.4, 25),
    )  # fmt: skip
    yield local(
        "2-D 256x256 window 80 stride 16", image, 24, 128, neighborhood((80, 80), stride=16),
        natten=(9.45, 51.4), goal=(7.4, 18),
    )  # fmt: skip
    yield local(
        "3-D 30x48x80 window 18x24x24", video, 24, 128, neighborhood((18, 24, 24)),
        natten=(74.4, 259.6), goal=(40, 110),
    )  # fmt: skip
    yield local(
        "3-D 30x48x80 window 18x24x24 stride 16x8x8", video, 24, 128,
        neighborhood((18, 24, 24), stride=(16, 8, 8)), natten=(26.55, 142.4), goal=(21, 52),
    )  # fmt: skip
    yield local(
        "1-D 32768 window 2048", line, 16, 128, neighborhood(2048),
        natten=(1.559, 6.400), goal=(0.95, 2.8),
    )  # fmt: skip
    yield local(
        "sphere 180x360 global", (180, 360), 1, 64, fv.Dense(),
        score=lambda: area_score((180, 360), device="cuda"),
    )  # fmt: skip
    yield local(
        "sphere 361x720 global", (361, 720), 1, 64, fv.Dense(),
        score=lambda: area_score((361, 720), device="cuda"), implementations=("triton",),
        backward=False,
    )  # fmt: skip
    lists: dict[str, Any] = {"implementations": ("triton",)}
    yield local(
        "sphere 180x360 within 0.03", (180, 360), 1, 64, fv.Sphere(0.03),
        score=lambda: area_score((180, 360), device="cuda"), **lists,
    )  # fmt: skip
    yield local("union of both axes 96x96", (96, 96), 4, 64, fv.Axial(0) | fv.Axial(1), **lists)
    scales = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32, 40, 48, 64)
    tokens = (sum(side * side for side in scales),)
    yield local("scales, each its own", tokens, 16, 64, fv.Scales(scales))
    yield local("scales, with those before", tokens, 16, 64, fv.Scales(scales, "before"))
    tree = fv.Tree(document_groups(regular_document(8192, 31, 8)))
    yield local("document tree 8192", (8192,), 12, 64, tree, **lists)
    strided = fv.Sliding(127) | fv.Strided(128)
    yield local("sparse transformer 12288 stride 128", (12288,), 2, 64, strided, **lists)


def warm(path: Path, write: Writer, seconds: float, first: int = 0) -> int:
    """Runs every case once, each in its own process; returns how many failed."""
    count = len(list(cases())) if seconds else 0
    end = time.monotonic() + seconds
    running = []
    for number in range(first, count):
        command = [sys.executable, str(Path(__file__)), str(number), str(path)]
        with (path / f"locality-warm-{number}.log").open("w", encoding="utf-8") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
    failed = 0
    for number, process in enumerate(running, first):
        try:
            code: int | None = process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        failed += code != 0
        text = (path / f"locality-warm-{number}.log").read_text(encoding="utf-8")[-1500:]
        write({"warm": number, "exit": code, "text": text})
        print(f"{number}: exit {code} {text[-400:] if code else text.strip()}", flush=True)
    return failed


def run(seconds: float, write: Writer, first: int = 0) -> None:
    """Times every case while there is time."""
    if not seconds:
        return
    end = time.monotonic() + seconds
    write(
        {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "command": "python scripts/gpu.py locality",
        }
    )
    for kind in (_host, *list(cases())[first:], _block):
        name = getattr(kind, "name", getattr(kind, "__name__", ""))
        if time.monotonic() > end:
            write({"case": name, "skipped": "the time was over"})
            continue
        try:
            if isinstance(kind, Local):
                _time(kind, end, write)
            else:
                kind(write)
        except Exception as error:
            write({"case": name, "error": f"{type(error).__name__}: {error}"[:1500]})
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)
        torch.cuda.empty_cache()


def _inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator("cuda").manual_seed(0)
    shape = case.batch, *case.grid, case.heads, case.dim
    q, k, v = (torch.randn(shape, generator=source, device="cuda").bfloat16() for _ in range(3))
    return q, k, v


def _runner(local: Local, implementation: str, inputs: tuple[torch.Tensor, ...]) -> Runner:
    score = local.score()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fv.attend(q, k, v, local.case.pattern, score, implementation=implementation)

    return Runner(implementation, attend, inputs, lambda x: x)


def _error(local: Local, out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> float:
    """Relative distance of some rows from their definition in float64."""
    case = local.case
    q, k, v = (x.flatten(1, -3)[0, :, 0].double() for x in inputs)
    rows = torch.linspace(0, case.tokens - 1, 32).long()
    extent = Extent(case.grid, case.grid)
    k_pos = torch.arange(case.tokens)
    visible = case.pattern.allows(rows[:, None], k_pos[None], extent)
    scores = q[rows.cuda()] @ k.T * case.dim**-0.5
    for member in getattr(local.score(), "members", ()):
        if isinstance(member, fv.KeyBias):
            scores = scores + member.tensor[0, 0].double()
    exact = scores.masked_fill(~visible.cuda(), -torch.inf).softmax(-1) @ v
    got = out.flatten(1, -3)[0, rows.cuda(), 0].double()
    return float((got - exact).norm() / exact.norm())


def _once(local: Local) -> list[str]:
    """Forward and backward of every implementation; a sentence for each."""
    said = []
    inputs = _inputs(local.case)
    for name in local.implementations:
        try:
            began = time.perf_counter()
            runner = _runner(local, name, inputs)
            error = _error(local, runner.forward(), inputs)
            if local.backward:
                runner.prepare_backward()
                runner.backward()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            said.append(f"{local.name}: {name} error {error:.2e}, first {seconds:.1f} s")
            if not error < 0.02:
                raise ArithmeticError(said[-1])
        except fv.errors.RefusedError as refusal:
            said.append(f"{local.name}: {refusal}")
    return said


def _time(local: Local, end: float, write: Writer) -> None:
    inputs = _inputs(local.case)
    runners = []
    for name in local.implementations:
        try:
            runner = _runner(local, name, inputs)
            runner.forward()
            if local.backward:
                runner.prepare_backward()
                runner.backward()
            runners.append(runner)
        except fv.errors.RefusedError as refusal:
            write({"case": local.name, "runner": name, "refused": refusal.reason})
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(_SAMPLES):
        for runner in runners:
            gpu_timings._sample(runner, "forward", runner.forward, flush)
            if runner.graph is not None:
                gpu_timings._sample(runner, "backward", runner.backward, flush)
        if time.monotonic() > end:
            break
    for runner in runners:
        _report(local, runner, write)


def _report(local: Local, runner: Runner, write: Writer) -> None:
    case = local.case
    text = f"{local.name}: {runner.name}"
    pairs = _pairs(case)
    for part, samples in runner.samples.items():
        milliseconds = statistics.median(samples)
        backward = part == "backward"
        work = 4.0 * case.batch * pairs * case.heads * case.dim * (2.5 if backward else 1.0)
        record: dict[str, object] = {
            "case": local.name,
            "grid": case.grid,
            "heads": case.heads,
            "head_dim": case.dim,
            "pattern": case.pattern.key,
            "dtype": "bfloat16",
            "runner": runner.name,
            "pass": part,
            "milliseconds": milliseconds,
            "tflops": work / milliseconds / 1e9,
            "host_milliseconds": statistics.median(runner.host[part]),
            "samples": samples,
        }
        for what, pair in (("natten", local.natten), ("goal", local.goal)):
            if pair is not None:
                record[what] = pair[backward]
        if not backward:
            record["predicted"] = _predicted(case, runner.name)
        write(record)
        against = f", {pair[backward] / milliseconds:.2f}x" if (pair := local.natten) else ""
        text += f"  {part} {milliseconds:.3f} ms ({work / milliseconds / 1e9:.0f} TFLOP/s{against})"
    print(text, flush=True)


def _pairs(case: Case) -> int:
    """Visible pairs per head; from every 97th row where there are no intervals to count by."""
    extent = Extent(case.grid, case.grid)
    bounds = case.pattern.bounds(extent)
    if bounds is not None:
        return bounds.pairs
    rows = torch.arange(0, case.tokens, 97)
    keys = torch.arange(case.tokens)
    seen = sum(
        int(case.pattern.allows(r[:, None], keys[None], extent).sum()) for r in rows.split(64)
    )
    return round(seen * case.tokens / len(rows))


def _predicted(case: Case, implementation: str) -> float | None:
    """Milliseconds that the simulator says."""
    if case.pattern.bounds(Extent(case.grid, case.grid)) is None:
        return None
    on = machine("h100" if implementation == "hopper" else "h100-triton")
    tiles = best_tiles(case.pattern, case.grid, on.queries, on.keys, start=on.start)
    return 1e3 * predict(tiles, on, case.heads, case.dim, batch=case.batch)


def _block(write: Writer) -> None:
    """A FLUX block of 24 heads of 128 with its own attention and with neighborhoods, end to end."""
    from examples.diffusion.block import GridAttention, flux_block

    block = flux_block("double").to("cuda", torch.bfloat16)
    own = block.attn.processor
    for side, window, stride in ((64, 24, 8), (128, 40, 8)):
        image, text = (
            torch.randn(1, count, 3072, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for count in (side * side, 512)
        )
        condition = torch.randn(1, 3072, device="cuda", dtype=torch.bfloat16)
        pattern = fv.Neighborhood((window, window), stride=stride)
        for name, processor in (("own", own), ("gna", GridAttention((side, side), pattern))):
            block.attn.set_processor(processor)
            samples = []
            for _ in range(6):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                words, pixels = block(image, text, condition)
                (words.float().mean() + pixels.float().mean()).backward()
                stop.record()
                stop.synchronize()
                samples.append(start.elapsed_time(stop))
            write(
                {
                    "case": f"FLUX block {side}x{side}",
                    "runner": name,
                    "pattern": pattern.key,
                    "milliseconds": statistics.median(samples[2:]),
                    "samples": samples,
                }
            )
            print(f"FLUX block {side}x{side} {name}: {statistics.median(samples[2:]):.2f} ms")


def _host(write: Writer) -> None:
    """Host time of a call on a small grid, in a stream that never runs full."""
    q, k, v = (
        torch.randn(1, 32, 32, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    pattern = fv.Neighborhood((7, 7))
    for name in ("hopper", "triton"):

        def forward(name: str = name) -> torch.Tensor:
            return fv.attend(q, k, v, pattern, implementation=name)

        out = forward()
        seed = torch.ones_like(out)
        torch.autograd.grad(out, (q, k, v), seed)
        times: dict[str, list[float]] = {"forward": [], "backward": []}
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            outs = [forward() for _ in range(40)]
            times["forward"].append((time.perf_counter() - began) / 40)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for out in outs:
                torch.autograd.grad(out, (q, k, v), seed)
            times["backward"].append((time.perf_counter() - began) / 40)
        best = {part: 1e3 * min(values) for part, values in times.items()}
        write({"case": "host", "grid": (32, 32), "runner": name, "host_milliseconds": best})
        print(f"host: {name} {best}", flush=True)


if __name__ == "__main__":
    for sentence in _once(list(cases())[int(sys.argv[1])]):
        print(sentence, flush=True)
