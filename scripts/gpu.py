"""Checks and times the tile engine on a CUDA device; one JSON line per case.

python scripts/gpu.py tile --out DIR [--implementations triton,hopper] [--quick]
    checks against float64 for a while, in several processes, then times ours and the peers that run
python scripts/gpu.py sweep --out DIR [--stage forward] [--dim 128]
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]
_STALL = 120.0
"""Seconds without a finished case after which a checking process is ended and goes on behind it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("tile", "sweep", "check-worker"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--implementations", default="triton")
    parser.add_argument("--quick", action="store_true", help="3 minutes in place of 8")
    parser.add_argument("--check-seconds", type=float, help="time for checks; 0 leaves them out")
    parser.add_argument("--time-seconds", type=float, help="time for timings; 0 leaves them out")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument(
        "--stage", default="forward", help="sweep: forward, backward_q, backward_kv"
    )
    parser.add_argument("--dim", type=int, default=128, help="sweep: head_dim")
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    implementations = options.implementations.split(",")
    if options.what == "check-worker":
        return _check_worker(options, implementations)
    if options.what == "sweep":
        import gpu_timings

        gpu_timings.sweep(options.stage, options.dim, _writer(options.out / "sweep.jsonl"))
        return 0
    check_seconds, time_seconds = (60.0, 110.0) if options.quick else (180.0, 280.0)
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


def _writer(path: Path):  # type: ignore[no-untyped-def]
    def write(record: dict[str, object]) -> None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    return write


def _check_worker(options: argparse.Namespace, implementations: list[str]) -> int:
    import gpu_checks

    shard, shards = (int(part) for part in options.shard.split("/"))
    write = _writer(options.out / f"checks-{shard}.jsonl")
    return gpu_checks.run(
        implementations, shard, shards, options.start, options.check_seconds, write
    )


def _checks(options: argparse.Namespace, seconds: float) -> int:
    """Runs the shards until the time is over; returns the number of failed cases."""
    end = time.monotonic() + seconds
    shards = range(options.processes)
    for shard in shards:
        (options.out / f"checks-{shard}.jsonl").unlink(missing_ok=True)
    running = {shard: _start(options, shard, 0, end) for shard in shards}
    while running:
        time.sleep(0.5)
        for shard, process in list(running.items()):
            path = options.out / f"checks-{shard}.jsonl"
            quiet = time.time() - path.stat().st_mtime if path.exists() else 0.0
            overdue = time.monotonic() > end + 45
            if process.poll() is None and (quiet > _STALL or overdue):
                process.kill()
                process.wait()
            if process.poll() is None:
                continue
            del running[shard]
            if process.returncode != 0 and time.monotonic() < end:
                begun = [r["begin"] for r in _records(path) if "begin" in r]
                start = begun[-1] + options.processes if begun else shard + options.processes
                _writer(path)({"died": begun[-1] if begun else None, "exit": process.returncode})
                running[shard] = _start(options, shard, start, end)
    return _summarise(options)


def _start(
    options: argparse.Namespace, shard: int, start: int, end: float
) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "check-worker", "--out", str(options.out)]
    command += ["--implementations", options.implementations, "--start", str(start)]
    command += ["--shard", f"{shard}/{options.processes}"]
    command += ["--check-seconds", str(max(end - time.monotonic(), 1.0))]
    with (options.out / f"checks-{shard}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _summarise(options: argparse.Namespace) -> int:
    records = [
        record for path in sorted(options.out.glob("checks-*.jsonl")) for record in _records(path)
    ]
    done = [record for record in records if "ok" in record]
    failed = [record for record in done if not record["ok"]]
    refused = sum(1 for record in done if record.get("refused"))
    died = [record for record in records if "died" in record]
    worst = max((float(r.get("worst") or 0.0) for r in done), default=0.0)  # type: ignore[arg-type]
    print(
        f"checks: {len(done)} done, {refused} refused, {len(failed)} failed, {len(died)} processes "
        f"died, largest error {worst:.2f} of what is allowed",
        flush=True,
    )
    for record in failed[:40]:
        print("  FAILED", record["case"], record.get("error"), flush=True)
    for record in died[:10]:
        print("  DIED in case", record["died"], flush=True)
    return len(failed) + len(died)


if __name__ == "__main__":
    sys.exit(main())
