"""Checks and times the tile engine on a CUDA device; JSON lines, one per case.

python scripts/gpu.py tile --out DIR [--implementations triton,hopper] [--quick]
    checks against float64 for a while, in several processes, then times ours and the peers that run
python scripts/gpu.py fuzz --out DIR [--problems 1000] [--check-seconds 600] [--first 0]
    random problems against float64, gradients included; goes on behind those that DIR holds
python scripts/gpu.py first-calls --out DIR
    seconds until the first result of shapes never seen, each in a process and a cache of its own
python scripts/gpu.py locality --out DIR [--check-seconds 90] [--time-seconds 60]
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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]
_WHAT = ("tile", "fuzz", "first-calls", "locality", "sweep", "check-worker")
_STALL = 120.0
"""Seconds without a finished case after which a checking process is ended and goes on behind it."""


def main() -> int:
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    implementations = options.implementations.split(",")
    if options.what == "check-worker":
        return _check_worker(options, implementations)
    if options.what == "first-calls":
        import gpu_first

        return gpu_first.run(options.out, _writer(options.out / "first-calls.jsonl"))
    if options.what == "locality":
        import gpu_locality

        write = _writer(options.out / "locality.jsonl")
        failed = gpu_locality.warm(options.out, write, options.check_seconds or 0.0, options.first)
        gpu_locality.run(options.time_seconds or 0.0, write, options.first)
        return 1 if failed else 0
    if options.what == "sweep":
        import gpu_timings

        from foveal.tuning.tile import Config

        configs = [Config(*(int(number) for number in text.split(","))) for text in options.configs]
        write = _writer(options.out / "sweep.jsonl")
        gpu_timings.sweep(options.stage, options.dim, configs, write)
        return 0
    check_seconds, time_seconds = (60.0, 110.0) if options.quick else (180.0, 280.0)
    if options.what == "fuzz":
        check_seconds, time_seconds = 600.0, 0.0
    if options.check_seconds is not None:
        check_seconds = options.check_seconds
    if options.time_seconds is not None:
        time_seconds = options.time_seconds
    failed = _checks(options, check_seconds) if check_seconds else 0
    if time_seconds:
        import gpu_timings

        write = _writer(options.out / "timings.jsonl")
        gpu_timings.run(implementations, time_seconds, write)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=_WHAT)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--implementations", default="triton")
    parser.add_argument("--quick", action="store_true", help="3 minutes in place of 8")
    parser.add_argument("--problems", type=int, default=1000, help="random problems to check")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument(
        "--sizes",
        choices=("shipped", "small", "both"),
        default="shipped",
        help="of tiles in checks",
    )
    parser.add_argument("--check-seconds", type=float, help="time for checks; 0 leaves them out")
    parser.add_argument("--time-seconds", type=float, help="time for timings; 0 leaves them out")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument(
        "--stage", default="forward", help="sweep: forward, backward_q, backward_kv"
    )
    parser.add_argument("--dim", type=int, default=128, help="sweep: head_dim")
    parser.add_argument(
        "--configs", nargs="*", default=[], help="sweep: such as 128,64,8,3 (default: all)"
    )
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    return parser


def _writer(path: Path):  # type: ignore[no-untyped-def]
    def write(record: dict[str, object]) -> None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    return write


def _check_worker(options: argparse.Namespace, implementations: list[str]) -> int:
    import gpu_checks

    shard, shards = (int(part) for part in options.shard.split("/"))
    path = options.out / f"checks-{shard}.jsonl"
    done = {
        (int(record["number"]), str(record["implementation"]))
        for record in _records(options.out)
        if "number" in record
    }
    families = range(
        options.first // gpu_checks.FAMILY + shard,
        -(-(options.first + options.problems) // gpu_checks.FAMILY),
        shards,
    )
    write = _writer(path)
    seconds = options.check_seconds
    return gpu_checks.run(implementations, families, seconds, done, write, options.sizes)


def _checks(options: argparse.Namespace, seconds: float) -> int:
    """Runs the shards until the time is over; returns the number of failed cases."""
    end = time.monotonic() + seconds
    running = {shard: _start(options, shard, end) for shard in range(options.processes)}
    while running:
        time.sleep(0.5)
        for shard, process in list(running.items()):
            path = options.out / f"checks-{shard}.jsonl"
            quiet = time.time() - path.stat().st_mtime if path.exists() else 0.0
            overdue = time.monotonic() > end + 15
            if process.poll() is None and (quiet > _STALL or overdue):
                process.kill()
                process.wait()
            if process.poll() is None:
                continue
            del running[shard]
            if process.returncode != 0 and time.monotonic() < end:
                _record_death(path, process.returncode)
                running[shard] = _start(options, shard, end)
    return _summarise(options)


def _record_death(path: Path, code: int) -> None:
    """Makes the last problem that was begun a failure, so that it is not begun again."""
    records = [json.loads(line) for line in path.open()] if path.exists() else []
    if records and "begin" in records[-1]:
        last = records[-1]
        _writer(path)(
            {
                "number": last["begin"],
                "implementation": last["implementation"],
                "ok": False,
                "case": last["case"],
                "error": f"the process ended with {code}",
            }
        )


def _start(options: argparse.Namespace, shard: int, end: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "check-worker", "--out", str(options.out)]
    command += ["--implementations", options.implementations]
    command += ["--problems", str(options.problems), "--first", str(options.first)]
    command += ["--sizes", options.sizes, "--shard", f"{shard}/{options.processes}"]
    command += ["--check-seconds", str(max(end - time.monotonic(), 1.0))]
    with (options.out / f"checks-{shard}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _records(out: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted(out.glob("checks-*.jsonl")) for line in path.open("rb")]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _summarise(options: argparse.Namespace) -> int:
    records = _records(options.out)
    done = [record for record in records if "ok" in record]
    failed = [record for record in done if not record["ok"]]
    refused = sum(1 for record in done if record.get("refused"))
    worst = max((float(record.get("worst") or 0.0) for record in done), default=0.0)
    print(
        f"checks: {len(done)} done, {refused} refused, {len(failed)} failed, "
        f"largest error {worst:.2f} of what is allowed",
        flush=True,
    )
    for record in failed[:40]:
        print("  FAILED", record["number"], record["case"], record["error"], flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
