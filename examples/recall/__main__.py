"""python -m examples.recall: trains small models with five kinds of layers, writes records and a report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from examples.recall import report
from examples.recall.models import MIXERS
from examples.recall.tasks import Recall, Text
from examples.recall.train import Run, train
from foveal.cli._progress import Progress


def runs(small: bool) -> list[Run]:
    """What is trained, the most telling first: seeds and sizes are fixed, so runs can be repeated."""
    if small:
        recall, text = Recall(pairs=2, length=12, words=4), Text(16)
        found = [Run(recall, name, 16, 1, steps=5, batch=8) for name in MIXERS]
        return [*found, Run(text, "Lightning", 16, 1, steps=3, batch=4)]
    recall, text = Recall(pairs=16, length=64, words=32), Text(256)

    def recalls(dim: int) -> list[Run]:
        return [Run(recall, name, dim, dim // 16, steps=1000, batch=256) for name in MIXERS]

    def texts(dim: int) -> list[Run]:
        return [Run(text, name, dim, dim // 16, steps=400, batch=64) for name in MIXERS]

    return [*recalls(64), *recalls(32), *texts(128), *recalls(16), *texts(64)]


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; returns its exit status."""
    parser = argparse.ArgumentParser(prog="recall", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a few seconds on one thread")
    parser.add_argument("--seconds", type=float, help="start no run after so many seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/recall"))
    parser.add_argument(
        "--render", type=Path, metavar="FILE", help="only the report of old records"
    )
    options = parser.parse_args(arguments)
    if options.render:
        records = [json.loads(line) for line in options.render.read_text("utf-8").splitlines()]
    else:
        records = _train(options)
    command = "python -m examples.recall" + (" --small" if options.small else "")
    path = report.build(records, command).write(options.out / "report.html")
    print(f"the report is {path.resolve()}")
    return 0


def _train(options: argparse.Namespace) -> list[dict[str, Any]]:
    options.out.mkdir(parents=True, exist_ok=True)
    began, records, planned = time.monotonic(), [], runs(options.small)
    progress = Progress("recall")
    with (options.out / "records.jsonl").open("w", encoding="utf-8") as file:
        for number, run in enumerate(planned):
            if options.seconds and time.monotonic() - began > options.seconds:
                print(f"{len(planned) - number} runs left out: the time is over", file=sys.stderr)
                break
            progress(f"{run.task.name}, {run.model}, width {run.dim}", number / len(planned))
            records.append(train(run, options.device))
            file.write(json.dumps(records[-1]) + "\n")
            file.flush()
            progress.clear()
            print(_line(records[-1]), flush=True)
    return records


def _line(record: dict[str, Any]) -> str:
    return (
        f"{record['task']['name']:7} {record['model']:15} width {record['dim']:4} "
        f"{record['state_bytes'] / 1024:9.1f} KiB  score {record['score']:.3f}  "
        f"{record['seconds']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
