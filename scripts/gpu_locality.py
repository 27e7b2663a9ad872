"""Times of the locality family on a CUDA device: NATTEN's table, the sphere, the relatives, the host.

python scripts/gpu_locality.py --out DIR [--cases "1-D 32768 window 2048;host"] [--samples 7] [--seconds 60]
    checks sampled rows of each case and times it; with --samples 0 each in a process of its own, which
    only checks: kernels are compiled side by side, and the next run finds them on disk

Called by scripts/gpu.py too, which does both in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
from foveal.compose import attend_finer  # noqa: E402
from foveal.layers.diagonal import around_diagonal  # noqa: E402
from foveal.layers.groups import attend_boxes, document_groups  # noqa: E402
from foveal.layers.sequence import factors, united  # noqa: E402
from foveal.layers.shards import shards  # noqa: E402
from foveal.layers.sphere import area_score  # noqa: E402
from foveal.patterns.base import Extent, Pattern  # noqa: E402
from foveal.probe.tiles import machine, predict  # noqa: E402
from foveal.systems.locality.factors import s2_attention, sparse_transformer  # noqa: E402
from foveal.systems.locality.grids import sphere_attention  # noqa: E402
from foveal.systems.locality.groups import regular_document  # noqa: E402

_SAMPLES = 7
# Of the first calls some upload bounds and lists; then a call is repeated as launches.
_CALLS_BEFORE = 5
BOTH = ("hopper", "triton")
Operator = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Local:
    """A case; what others need for it, forward and backward in ms, by name; what is asked of us.

    operator(q, k, v, implementation=...) where it is not `attend` with the pattern and the score;
    k_grid where keys stand on another grid; visible(rows) where the pattern does not tell.
    """

    case: Case
    others: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    goal: tuple[float, float] | None = None
    score: Callable[[], fv.Score] = fv.Softmax
    implementations: tuple[str, ...] = BOTH
    backward: bool = True
    operator: Operator | None = None
    k_grid: tuple[int, ...] | None = None
    visible: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def extent(self) -> Extent:
        return Extent(self.case.grid, self.k_grid or self.case.grid)


def local(
    name: str, grid: tuple[int, ...], heads: int, dim: int, pattern: Pattern, **rest: Any
) -> Local:
    of_case = {key: rest.pop(key) for key in ("batch", "kv_heads") if key in rest}
    return Local(Case(name, grid, heads, dim, pattern, **of_case), **rest)


def cases() -> Iterator[Local]:
    """Most important first."""
    yield from _neighborhoods()
    yield from _spheres()
    yield from _relatives()


def _neighborhoods() -> Iterator[Local]:
    """The table of NATTEN."""
    image, video, line = (256, 256), (30, 48, 80), (32768,)
    neighborhood = fv.Neighborhood
    yield local(
        "2-D 128x128 window 25", (128, 128), 16, 128, neighborhood((25, 25)),
        others={"natten": (0.803, 2.879)}, goal=(0.30, 1.0),
    )  # fmt: skip
    yield local(
        "2-D 256x256 window 13", image, 8, 64, neighborhood((13, 13)),
        others={"natten": (0.658, 1.913)}, goal=(0.23, 0.70),
    )  # fmt: skip
    yield local(
        "2-D 256x256 window 80", image, 24, 128, neighborhood((80, 80)),
        others={"natten": (17.55, 62.3)}, goal=(9.4, 25),
    )  # fmt: skip
    yield local(
        "2-D 256x256 window 80 stride 16", image, 24, 128, neighborhood((80, 80), stride=16),
        others={"natten": (9.45, 51.4)}, goal=(7.4, 18),
    )  # fmt: skip
    yield local(
        "3-D 30x48x80 window 18x24x24", video, 24, 128, neighborhood((18, 24, 24)),
        others={"natten": (74.4, 259.6)}, goal=(40, 110),
    )  # fmt: skip
    yield local(
        "3-D 30x48x80 window 18x24x24 stride 16x8x8", video, 24, 128,
        neighborhood((18, 24, 24), stride=(16, 8, 8)),
        others={"natten": (26.55, 142.4)}, goal=(21, 52),
    )  # fmt: skip
    yield local(
        "1-D 32768 window 2048", line, 16, 128, neighborhood(2048),
        others={"natten": (1.559, 6.400)}, goal=(0.95, 2.8),
    )  # fmt: skip


def _spheres() -> Iterator[Local]:
    """One head of 64, as published (2505.11157: fp32, whole layer)."""
    plain, fine = (180, 360), (361, 720)

    def sphere(grid: tuple[int, int], radius: float | None = None, **rest: Any) -> Local:
        def operator(*qkv: torch.Tensor, implementation: str | None = None) -> Any:
            return sphere_attention(*qkv, radius=radius, implementation=implementation)

        within = "global" if radius is None else f"within {radius}"
        name = f"sphere {grid[0]}x{grid[1]} {within}"
        pattern = fv.Dense() if radius is None else fv.Sphere(radius)
        score = lambda: area_score(grid, device="cuda")  # noqa: E731
        return local(name, grid, 1, 64, pattern, operator=operator, score=score, **rest)

    yield sphere(plain, others={"published": (71.0, 63.0)})
    yield sphere(fine)
    near: dict[str, Any] = {"implementations": ("triton",)}
    yield sphere(plain, 0.017, others={"published": (0.55, 1.1)}, **near)
    yield sphere(fine, 0.03, others={"published": (7.3, 16.4)}, **near)


def _relatives() -> Iterator[Local]:
    yield from _sequences()
    yield from _grids()


def _sequences() -> Iterator[Local]:
    lists: dict[str, Any] = {"implementations": ("triton",)}
    scales = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32, 40, 48, 64)
    tokens = (sum(side * side for side in scales),)
    yield local("scales, each its own", tokens, 16, 64, fv.Scales(scales))
    yield local("scales, with those before", tokens, 16, 64, fv.Scales(scales, "before"))
    yield local("scales, window 7 in each", tokens, 16, 64, fv.Scales(scales, window=7))
    for length in (8192, 32768):
        tree = fv.Tree(document_groups(regular_document(length, 31, 8)))
        yield local(f"document tree {length}", (length,), 12, 64, tree, **lists)
    for kind in ("strided", "fixed"):

        def operator(
            *qkv: torch.Tensor, kind: Any = kind, implementation: str | None = None
        ) -> Any:
            return sparse_transformer(
                *qkv, kind=kind, arrangement="merged", implementation=implementation
            )

        pattern = united(*factors(kind, 128, 8))  # type: ignore[arg-type]
        name = f"sparse transformer 12288, {kind}"
        yield local(name, (12288,), 8, 64, pattern, operator=operator)

    def sharded(*qkv: torch.Tensor, implementation: str | None = None) -> Any:
        return s2_attention(
            *qkv, block=128, local_blocks=8, vert_stride=16, implementation=implementation
        )

    cpu = torch.device("cpu")
    pattern = shards(32768, 8, 128, 8, 16, 0, 0, True, cpu)
    yield local("head shards 32768", (32768,), 32, 128, pattern, operator=sharded, kv_heads=8)
    diagonal = around_diagonal(4096, 4096, 400, 100, False)
    yield local("diagonal 4096", (4096,), 8, 48, diagonal, batch=4, **lists)
    chunks = fv.Partition(40, before=5, after=5)
    yield local("chunks 2000", (2000,), 10, 32, chunks, batch=32)


def _grids() -> Iterator[Local]:
    lists: dict[str, Any] = {"implementations": ("triton",)}
    yield local("union of both axes 96x96", (96, 96), 4, 64, fv.Axial(0) | fv.Axial(1), **lists)
    yield local("one axis 256x256", (256, 256), 8, 64, fv.Axial(0))
    yield local(
        "shifted windows 56x56 table", (56, 56), 3, 32, fv.Partition((7, 7), (3, 3)), batch=64,
        score=_table(3, 13, 13), **lists,
    )  # fmt: skip
    yield local(
        "2-D 96x96 window 7 table", (96, 96), 4, 32, fv.Neighborhood((7, 7)), batch=8,
        score=_table(4, 13, 13), **lists,
    )  # fmt: skip
    yield local("volume groups 16x56x56", (16, 56, 56), 3, 32, fv.Partition((2, 7, 7)), batch=4)

    def finer(*qkv: torch.Tensor, implementation: str | None = None) -> Any:
        return attend_finer(*qkv, fv.Neighborhood((9, 9)), implementation=implementation)

    yield local(
        "queries 256x256 on keys 128x128, window 9", (256, 256), 8, 64, fv.Dense(),
        operator=finer, k_grid=(128, 128), visible=_finer_window,
    )  # fmt: skip
    source = torch.Generator().manual_seed(0)
    chosen = torch.randperm(12 * 192 * 192, generator=source)[:40000].sort().values
    places = torch.stack([chosen * 0, *torch.unravel_index(chosen, (12, 192, 192))], dim=1)

    def boxed(*qkv: torch.Tensor, implementation: str | None = None) -> Any:
        return attend_boxes(*qkv, places.cuda(), 6, implementation)

    def same_box(rows: torch.Tensor) -> torch.Tensor:
        return (places[rows, None] // 6 == places[None] // 6).all(-1)

    yield local(
        "boxes of 6 among 40000 voxels", (40000,), 4, 32, fv.Dense(),
        operator=boxed, visible=same_box,
    )  # fmt: skip


def _table(*shape: int) -> Callable[[], fv.Score]:
    def score() -> fv.Score:
        source = torch.Generator("cuda").manual_seed(1)
        table = torch.randn(shape, generator=source, device="cuda")
        return fv.Softmax() + fv.RelativeBias(table)

    return score


def _finer_window(rows: torch.Tensor) -> torch.Tensor:
    cell = torch.div(rows, 256, rounding_mode="floor") // 2 * 128 + rows % 256 // 2
    extent = Extent((128, 128), (128, 128))
    return fv.Neighborhood((9, 9)).allows(cell[:, None], extent.k_positions()[None], extent)


def warm(
    path: Path, write: Writer, seconds: float, first: int = 0, names: tuple[str, ...] = ()
) -> int:
    """Checks every case once, each in its own process; returns how many failed."""
    numbers = [
        number
        for number, each in enumerate(cases())
        if number >= first and (not names or each.name in names)
    ]
    end = time.monotonic() + seconds
    running = []
    for number in numbers if seconds else ():
        command = [sys.executable, str(Path(__file__)), "--number", str(number), "--out", str(path)]
        with (path / f"locality-warm-{number}.log").open("w", encoding="utf-8") as log:
            running.append((number, subprocess.Popen(command, stdout=log, stderr=log)))
    failed = 0
    for number, process in running:
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


def run(
    seconds: float,
    write: Writer,
    first: int = 0,
    names: tuple[str, ...] = (),
    samples: int = _SAMPLES,
    command: str = "python scripts/gpu.py locality",
) -> None:
    """Times every case while there is time."""
    if not seconds:
        return
    end = time.monotonic() + seconds
    write(
        {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "command": command,
        }
    )
    chosen: list[Local | Callable[[Writer], None]] = [_host, *list(cases())[first:], _block]
    for each in chosen:
        name = _name(each)
        if names and name not in names:
            continue
        if time.monotonic() > end:
            write({"case": name, "skipped": "the time was over"})
            continue
        try:
            if isinstance(each, Local):
                _time(each, end, write, samples)
            else:
                each(write)
        except Exception as error:
            write({"case": name, "error": f"{type(error).__name__}: {error}"[:1500]})
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)
        torch.cuda.empty_cache()


def _name(each: Local | Callable[[Writer], None]) -> str:
    return each.name if isinstance(each, Local) else each.__name__.removeprefix("_")


def _inputs(local: Local) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    case = local.case
    source = torch.Generator("cuda").manual_seed(0)
    kv_heads = case.kv_heads or case.heads
    grids = ((case.grid, case.heads), *(((local.k_grid or case.grid), kv_heads),) * 2)
    q, k, v = (
        torch.randn(case.batch, *grid, heads, case.dim, generator=source, device="cuda").bfloat16()
        for grid, heads in grids
    )
    return q, k, v


def _runner(local: Local, implementation: str, inputs: tuple[torch.Tensor, ...]) -> Runner:
    score = local.score()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if local.operator is not None:
            o: torch.Tensor = local.operator(q, k, v, implementation=implementation)
            return o
        return fv.attend(q, k, v, local.case.pattern, score, implementation=implementation)

    return Runner(implementation, attend, inputs, lambda x: x)


def _visible(local: Local, rows: torch.Tensor) -> torch.Tensor:
    """Which keys these queries of the first head see.  bool [rows, keys]"""
    if local.visible is not None:
        return local.visible(rows)
    extent = local.extent
    seen = local.case.pattern.allows(rows[:, None], extent.k_positions()[None], extent)
    return seen.flatten(0, -3)[0] if seen.dim() > 2 else seen


def _error(local: Local, out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> float:
    """Relative distance of some rows of the first head from their definition in float64."""
    case = local.case
    q, k, v = (x.flatten(1, -3)[0, :, 0].double() for x in inputs)
    rows = torch.linspace(0, case.tokens - 1, 32).long()
    scores = q[rows.cuda()] @ k.T * case.dim**-0.5
    for member in getattr(local.score(), "members", ()):
        if isinstance(member, fv.KeyBias):
            scores = scores + member.tensor[0, 0].double()
        if isinstance(member, fv.RelativeBias):
            scores = scores + _entries(local, member.table, rows).double()
    exact = scores.masked_fill(~_visible(local, rows).cuda(), -torch.inf).softmax(-1) @ v
    got = out.flatten(1, -3)[0, rows.cuda(), 0].double()
    return float((got - exact).norm() / exact.norm())


def _entries(local: Local, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The entry of the table of the first head for each pair.  [rows, keys]"""
    extent = local.extent
    steps = local.case.pattern.offsets(rows[:, None], extent.k_positions()[None], extent)
    index = [
        (step + side // 2).clamp(0, side - 1).cuda()
        for step, side in zip(steps, table.shape[1:], strict=True)
    ]
    return table[0][tuple(index)]


def _once(local: Local) -> list[str]:
    """Forward and backward of every implementation; a sentence for each."""
    said = []
    inputs = _inputs(local)
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


def _time(local: Local, end: float, write: Writer, samples: int) -> None:
    inputs = _inputs(local)
    runners = []
    for name in local.implementations:
        try:
            runner = _runner(local, name, inputs)
            for _ in range(_CALLS_BEFORE):
                runner.forward()
                if local.backward:
                    runner.prepare_backward()
                    runner.backward()
            runners.append(runner)
        except fv.errors.RefusedError as refusal:
            write({"case": local.name, "runner": name, "refused": refusal.reason})
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(samples):
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
    pairs = _pairs(local)
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
        for what, pair in local.others.items():
            record[what] = pair[backward]
        if local.goal is not None:
            record["goal"] = local.goal[backward]
        if not backward and local.operator is None:
            record["predicted"] = _predicted(case, runner.name)
        write(record)
        against = "".join(
            f", {pair[backward] / milliseconds:.2f}x {what}" for what, pair in local.others.items()
        )
        text += f"  {part} {milliseconds:.3f} ms ({work / milliseconds / 1e9:.0f} TFLOP/s{against})"
    print(text, flush=True)


def _pairs(local: Local) -> int:
    """Visible pairs per head; from every 97th row where there are no intervals to count by."""
    extent = local.extent
    known = local.visible is None and not local.case.pattern.depends_on_data
    bounds = local.case.pattern.bounds(extent) if known else None
    if bounds is not None:
        return bounds.pairs
    rows = torch.arange(0, local.case.tokens, 97)
    seen = sum(int(_visible(local, r).sum()) for r in rows.split(64))
    return round(seen * local.case.tokens / len(rows))


def _predicted(case: Case, implementation: str) -> float | None:
    """Milliseconds that the simulator says."""
    if case.pattern.bounds(Extent(case.grid, case.grid)) is None:
        return None
    on = machine("h100" if implementation == "hopper" else "h100-triton")
    tiles = on.tiles(case.pattern, case.grid, case.dim)
    return 1e3 * predict(tiles, on, case.heads, case.dim, batch=case.batch)


def _block(write: Writer) -> None:
    """FLUX blocks of 24 heads of 128, with their own attention and with neighborhoods, end to end."""
    from examples.diffusion.block import GridAttention, flux_block

    for kind, side, window, stride in (
        ("double", 64, 24, 8),
        ("double", 128, 40, 8),
        ("single", 128, 40, 8),
        ("double", 256, 80, 16),
    ):
        with torch.device("cuda"):  # random weights of 340 million parameters take a CPU minutes
            block = flux_block(kind).bfloat16()  # type: ignore[arg-type]
        pattern = fv.Neighborhood((window, window), stride=stride)
        processors = {"own": block.attn.processor, "gna": GridAttention((side, side), pattern)}
        image, text = (
            torch.randn(1, count, 3072, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for count in (side * side, 512)
        )
        condition = torch.randn(1, 3072, device="cuda", dtype=torch.bfloat16)
        samples: dict[tuple[str, str], list[float]] = {}
        for turn in range(3 if side > 128 else 7):
            for name, processor in processors.items():
                block.attn.set_processor(processor)  # type: ignore[union-attr, operator]
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                torch.cuda._sleep(3_000_000)
                marks[0].record()
                outputs = block(image, text, condition)
                loss = sum(x.float().mean() for x in outputs)
                marks[1].record()
                loss.backward()
                marks[2].record()
                marks[2].synchronize()
                for number, part in enumerate(("forward", "backward")):
                    taken = marks[number].elapsed_time(marks[number + 1])
                    if turn > 0:
                        samples.setdefault((name, part), []).append(taken)
        for (name, part), taken_all in samples.items():
            milliseconds = statistics.median(taken_all)
            write(
                {
                    "case": f"FLUX {kind} block {side}x{side}, {pattern.key}",
                    "runner": name,
                    "pass": part,
                    "milliseconds": milliseconds,
                    "samples": taken_all,
                }
            )
            print(
                f"FLUX {kind} block {side}x{side} {name} {part}: {milliseconds:.2f} ms", flush=True
            )


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="", help="names, ';' between them; default: all")
    parser.add_argument("--samples", type=int, default=_SAMPLES)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.number is not None:
        for sentence in _once(list(cases())[options.number]):
            print(sentence, flush=True)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    names = tuple(name for name in options.cases.split(";") if name)

    def write(record: dict[str, object]) -> None:
        with (options.out / "locality.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    if options.samples == 0:
        return warm(options.out, write, options.seconds, names=names)
    command = "python scripts/gpu_locality.py"
    if names:
        command += f' --cases "{options.cases}"'
    run(options.seconds, write, names=names, samples=options.samples, command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
