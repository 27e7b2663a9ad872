"""Random problems in several processes, so that compilers run side by side; what was done is kept.

A process that stops answering is ended, and the problem it was at counts as failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]
_STALL = 120.0
"""Seconds without a finished problem after which a process is ended; another goes on behind it."""
_SHOWN = 40
_KINDS = ("pattern", "score", "dtype", "head_dim", "value_dim")

Record = dict[str, Any]


def run(
    out: Path,
    implementations: Sequence[str],
    numbers: range,
    seconds: float,
    processes: int,
    sizes: str,
) -> int:
    """Checks the problems of these numbers that `out` does not hold; 1 when one of those it holds failed."""
    end = time.monotonic() + seconds
    worker = [sys.executable, __file__, str(out), ",".join(implementations), sizes]
    worker += [str(numbers.start), str(numbers.stop)]

    def start(shard: int) -> subprocess.Popen[bytes]:
        rest = [f"{shard}/{processes}", str(max(end - time.monotonic(), 1.0))]
        with (out / f"checks-{shard}.log").open("ab") as log:
            return subprocess.Popen([*worker, *rest], stdout=log, stderr=log)

    running = {shard: start(shard) for shard in range(processes)}
    while running:
        time.sleep(0.5)
        for shard, process in list(running.items()):
            path = out / f"checks-{shard}.jsonl"
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
                running[shard] = start(shard)
    about = {"device": _device(), "command": ["python", "scripts/gpu.py", *sys.argv[1:]]}
    counts = [{**summary(_records(out), name), **about} for name in implementations]
    (out / "fuzz.jsonl").write_text("".join(json.dumps(count) + "\n" for count in counts))
    for count in counts:
        print(json.dumps({name: count[name] for name in count if name not in _KINDS}), flush=True)
    failed = [record for record in _records(out) if record.get("ok") is False]
    for record in failed[:_SHOWN]:
        print("FAILED", record["number"], record["implementation"], record["case"], record["error"])
    return 1 if failed else 0


def summary(records: Iterable[Record], implementation: str) -> Record:
    """What became of the problems of one implementation, and how many agreed of each kind."""
    done = [r for r in records if "ok" in r and r["implementation"] == implementation]
    agreed = [r for r in done if r["ok"] and not r.get("refused")]
    numbers = [r["number"] for r in done]
    kinds = {kind: Counter(str(r[kind]) for r in agreed) for kind in _KINDS}
    return {
        "implementation": implementation,
        "agreed": len(agreed),
        "failed": sum(1 for r in done if not r["ok"]),
        "refused": sum(1 for r in done if r.get("refused")),
        "worst_error_of_allowed": max((float(r["worst"]) for r in agreed), default=None),
        "numbers": [min(numbers, default=0), max(numbers, default=0)],
        **{kind: dict(sorted(counts.items())) for kind, counts in kinds.items()},
    }


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _records(out: Path) -> list[Record]:
    lines = [line for path in sorted(out.glob("checks-*.jsonl")) for line in path.open("rb")]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _append(path: Path, record: Record) -> None:
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def _record_death(path: Path, code: int) -> None:
    """Makes the last problem that was begun a failure, so that it is not begun again."""
    records = [json.loads(line) for line in path.open()] if path.exists() else []
    if records and "begin" in records[-1]:
        last = records[-1]
        known = {name: last[name] for name in ("implementation", "case")}
        error = f"the process ended with {code}"
        _append(path, {"number": last["begin"], "ok": False, **known, "error": error})


def _worker(
    out: str, implementations: str, sizes: str, first: str, stop: str, shard: str, seconds: str
) -> int:
    """Every `shards`-th family of the problems; 3 when the device stops answering."""
    import gpu_checks

    own, shards = (int(part) for part in shard.split("/"))
    done = {(r["number"], r["implementation"]) for r in _records(Path(out)) if "number" in r}
    families = range(
        int(first) // gpu_checks.FAMILY + own, -(-int(stop) // gpu_checks.FAMILY), shards
    )
    path = Path(out) / f"checks-{own}.jsonl"
    return gpu_checks.run(
        implementations.split(","),
        families,
        float(seconds),
        done,
        lambda record: _append(path, record),
        sizes,
    )


if __name__ == "__main__":
    sys.exit(_worker(*sys.argv[1:]))
