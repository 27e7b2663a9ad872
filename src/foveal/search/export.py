"""What a search found, for others: verified steps as JSON lines, and the champion as a program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveal.search.archive import Archive, Entry
from foveal.search.task import Task


def steps(archive: Archive, task: Task, *, gainful: bool = False) -> Iterator[dict[str, Any]]:
    """One record per judged candidate with a parent: task, both programs, the edit, what came of it.

    `gainful` keeps steps that were accepted or faster than their parent, for training on what helps.
    """
    accepted = {a["candidate"] for a in archive.accepted()}
    for entry in archive.entries(evaluated=True):
        if not entry.parents or entry.evaluation is None:
            continue
        parent = archive.entry(entry.parents[0])
        gain = _gain(parent, entry)
        if gainful and not (entry.id in accepted or (gain is not None and gain > 0)):
            continue
        yield {
            "task": task.name,
            "reference": task.reference.get("text"),
            "before": _program(task, parent),
            "after": _program(task, entry),
            "operator": entry.operator,
            "note": entry.note,
            "correct": entry.evaluation.ok,
            "stage": entry.evaluation.stage,
            "reason": entry.evaluation.reason,
            "log_gain": gain,
            "accepted": entry.id in accepted,
            "facts": dict(entry.evaluation.facts),
        }


def write_steps(archive: Archive, task: Task, path: str | Path, *, gainful: bool = False) -> int:
    """Writes `steps` as JSON lines; how many."""
    lines = [json.dumps(step, sort_keys=True) for step in steps(archive, task, gainful=gainful)]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def champion_text(archive: Archive, task: Task) -> str:
    """The program of the champion as a file that `foveal verify --task` takes."""
    champion = archive.champion()
    if champion is None or "text" not in task.beginning:
        return ""
    program = task.program(champion.candidate)
    options = dict(program.get("options") or {})
    if not options or program["kind"] == "model":
        return str(program["text"])
    entry = program["entry"]
    values = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return (
        f"{str(program['text']).rstrip()}\n\n\n_tunable = {entry}\n\n\n"
        f"def {entry}(*tensors):\n    return _tunable(*tensors, {values})\n"
    )


def _program(task: Task, entry: Entry) -> dict[str, Any]:
    program = task.program(entry.candidate)
    return {"text": program.get("text"), "options": program.get("options")}


def _gain(parent: Entry, child: Entry) -> float | None:
    before = parent.evaluation.speedup if parent.evaluation else None
    after = child.evaluation.speedup if child.evaluation else None
    return math.log(after / before) if before and after else None
