"""Checks and times the tile engine on a CUDA device; JSON lines, one per case.

python scripts/gpu.py tile --out DIR [--implementations hopper,triton] [--cases "causal D64;window 1024"]
    times ours and the peers that run on the shapes that are judged, and checks sampled rows; with
    --samples 0 every case in a process of its own, which only compiles: the next run finds it on disk
python scripts/gpu.py fuzz --out DIR [--problems 1000] [--first 0] [--seconds 600] [--processes 16]
    random problems against float64, gradients included; goes on behind those that DIR holds, and
    writes DIR/fuzz.jsonl: how many agreed, per implementation and kind of problem
python scripts/gpu.py first-calls --out DIR [--implementations triton] [--alone] [--cases "causal;grid"]
    seconds until the first result of shapes never seen, each in a process and a cache of its own;
    with --alone one process at a time
python scripts/gpu.py locality --out DIR [--check-seconds 90] [--seconds 60]
    compiles and checks the cases of NATTEN's table and the relatives side by side, then times them
python scripts/gpu.py sweep --out DIR [--stage forward] [--dim 128] [--configs 128,64,8,3]
    times other tile sizes of the portable edition than those in foveal.tuning

A case that fails is recorded with its error and the run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]
_WHAT = ("tile", "fuzz", "first-calls", "locality", "sweep")


def main() -> int:
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run = {
        "tile": _tile,
        "fuzz": _fuzz,
        "first-calls": _first_calls,
        "locality": _locality,
        "sweep": _sweep,
    }
    return run[options.what](options)


def _tile(options: argparse.Namespace) -> int:
    import gpu_timings

    names = [name for name in options.cases.split(";") if name]
    if options.samples == 0 and len(names) != 1:
        return _compile_side_by_side(options, names or [c.name for c in gpu_timings.cases()])
    write = _writer(options.out / "timings.jsonl") if options.samples else lambda record: None
    command = ["python", "scripts/gpu.py", *sys.argv[1:]]
    gpu_timings.run(
        options.implementations.split(","), options.seconds, write, names, options.samples, command
    )
    return 0


def _compile_side_by_side(options: argparse.Namespace, names: list[str]) -> int:
    command = [sys.executable, __file__, "tile", "--out", str(options.out), "--samples", "0"]
    command += ["--implementations", options.implementations]
    running = [subprocess.Popen([*command, "--cases", name]) for name in names]
    return max(process.wait() for process in running)


def _fuzz(options: argparse.Namespace) -> int:
    import gpu_fuzz

    numbers = range(options.first, options.first + options.problems)
    return gpu_fuzz.run(
        options.out,
        options.implementations.split(","),
        numbers,
        options.seconds,
        options.processes,
        options.sizes,
    )


def _first_calls(options: argparse.Namespace) -> int:
    import gpu_first

    write = _writer(options.out / "first-calls.jsonl")
    sequences = [name for name in options.cases.split(";") if name]
    return max(
        gpu_first.run(options.out, write, name, options.alone, sequences)
        for name in options.implementations.split(",")
    )


def _locality(options: argparse.Namespace) -> int:
    import gpu_locality

    write = _writer(options.out / "locality.jsonl")
    failed = gpu_locality.warm(options.out, write, options.check_seconds, options.first)
    gpu_locality.run(options.seconds, write, options.first)
    return 1 if failed else 0


def _sweep(options: argparse.Namespace) -> int:
    import gpu_timings

    from foveal.tuning.tile import Config

    configs = [Config(*(int(number) for number in text.split(","))) for text in options.configs]
    gpu_timings.sweep(options.stage, options.dim, configs, _writer(options.out / "sweep.jsonl"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=_WHAT)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--implementations", default="hopper,triton")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no case begins")
    parser.add_argument(
        "--cases", default="", help="tile, first-calls: names joined by ; (default: all)"
    )
    parser.add_argument("--samples", type=int, default=9, help="tile: of each pass")
    parser.add_argument("--problems", type=int, default=1000, help="fuzz: how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument(
        "--sizes",
        choices=("shipped", "small", "both"),
        default="both",
        help="fuzz: of tiles; kernels with small ones compile in half the time",
    )
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--alone", action="store_true", help="first-calls: one process at a time")
    parser.add_argument("--check-seconds", type=float, default=90.0, help="locality: for checks")
    parser.add_argument(
        "--stage", default="forward", help="sweep: forward, backward_q, backward_kv"
    )
    parser.add_argument("--dim", type=int, default=128, help="sweep: head_dim")
    parser.add_argument(
        "--configs", nargs="*", default=[], help="sweep: such as 128,64,8,3 (default: all)"
    )
    return parser


def _writer(path: Path):  # type: ignore[no-untyped-def]
    def write(record: dict[str, object]) -> None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    return write


if __name__ == "__main__":
    sys.exit(main())
