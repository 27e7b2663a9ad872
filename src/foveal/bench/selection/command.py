"""`foveal bench --suite sparse`"""

from __future__ import annotations

import argparse
import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from foveal._errors import MissingDependencyError, SelectionError, UnknownNameError
from foveal.bench.record import command_line, environment
from foveal.bench.report import aligned
from foveal.bench.selection.methods import METHODS, Method, of_selector
from foveal.bench.selection.report import build, table
from foveal.bench.selection.run import TASKS, Bench, Line, Plan, run
from foveal.cli._progress import Progress
from foveal.eval.run import Lines
from foveal.eval.subject import SMALL, Subject, load
from foveal.selectors import Selector

LENGTHS = {"cpu": (4096,), "cuda": (8192,)}
_INTERRUPTED = 130


def measure(args: argparse.Namespace, folder: Path) -> int:
    """Runs the suite; returns the exit status of the command."""
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else _DTYPES.get(device.type, torch.float32)
    lengths = args.lengths or LENGTHS.get(device.type, (4096,))
    lengths = tuple(n for n in lengths if args.max_tokens is None or n <= args.max_tokens)
    own = [of_selector(*_selector(text)) for text in args.selector or ()]
    plan = Plan(_methods(args.only, own), lengths, _depths(args.parts), _tasks(args.tasks))
    name = args.model or SMALL

    @functools.cache
    def subject() -> Subject:
        return load(name, None, args.device, torch.float32 if args.device == "cpu" else dtype)

    copies = _COPIES.get(device.type, 1)
    bench = Bench(name, subject, folder, device, dtype, plan.depths, copies=copies)
    file = Lines(folder / "records.jsonl")
    facts = environment(device)
    facts = {key: value for key, value in facts.items() if key != "ceilings"}
    found: list[Line] = []
    interrupted = False
    with Progress("bench sparse") as progress:
        try:
            shown = {"command": command_line(), "environment": facts}
            found += run(bench, plan, file, shown, progress)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        found = list(file.read(name).values())
        print(f"interrupted; {file.path} keeps what was measured, --resume continues it",
              file=sys.stderr)  # fmt: skip
    _show(args, found, args.html or folder / "report.html", command_line(), facts)
    return _INTERRUPTED if interrupted else 0


def render(args: argparse.Namespace, records: Path) -> int:
    """Prints and renders the lines of an old run again; those of the newest subject."""
    texts = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    subject = json.loads(texts[-1]).get("subject") if texts else None
    found = list(Lines(records).read(str(subject)).values()) if subject else []
    if not found:
        raise SelectionError("--render", records, "a run of the sparse suite")
    _show(args, found, args.html or records.with_name("report.html"), found[-1]["command"],
          found[-1]["environment"])  # fmt: skip
    return 0


def _show(
    args: argparse.Namespace,
    found: list[Line],
    path: Path,
    command: str,
    facts: dict[str, Any],
) -> None:
    print(json.dumps(found) if args.json else aligned(table(found), left=1))
    try:
        page = build(found, [("command", command), *((k, str(v)) for k, v in facts.items())])
        print(f"report: {page.write(path)}", file=sys.stderr)
    except MissingDependencyError as error:
        print(f"no HTML report: {error}", file=sys.stderr)


_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
_COPIES = {"cpu": 1, "cuda": 8}


def _methods(only: str | None, own: list[Method]) -> list[Method]:
    known = [*METHODS, *own]
    found = [each for each in known if any(x in each.name for x in (only or "").split(","))]
    if not found:
        raise UnknownNameError("method", str(only), tuple(each.name for each in known))
    return found


def _selector(text: str) -> tuple[str, Selector]:
    """The selector NAME of FILE.py:NAME, a value or a class that is called without arguments."""
    path, _, name = text.rpartition(":")
    if not name.isidentifier() or not Path(path).is_file():
        raise SelectionError("--selector", text, "FILE.py:NAME of a selector in that file")
    names = runpy.run_path(path)
    if name not in names:
        own = tuple(each for each in names if not each.startswith("_"))
        raise UnknownNameError(f"selector of {path}", name, own)
    found = names[name]
    selector: Selector = found() if isinstance(found, type) else found
    if not callable(getattr(selector, "scores", None)):
        raise SelectionError("--selector", text, "something with a method `scores`")
    return name, selector


def _depths(parts: int) -> tuple[float, ...]:
    """Where the fact stands in each of the texts: evenly spread."""
    return tuple((n + 0.5) / parts for n in range(parts))


def _tasks(text: str | None) -> tuple[str, ...]:
    chosen = TASKS if text is None else tuple(text.split(","))
    if unknown := [each for each in chosen if each not in TASKS]:
        raise UnknownNameError("task", unknown[0], TASKS)
    return chosen
