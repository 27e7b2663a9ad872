"""What helped in which state on which device: kept in an archive, carried between them as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from foveal.search.archive import Archive, Entry

_ANY = "any"


def state_of(entry: Entry) -> str:
    """The state of a program: its cell, and what limits it by the facts measured on it."""
    evaluation = entry.evaluation
    if evaluation is None or evaluation.cell is None:
        return _ANY
    return "".join(map(str, evaluation.cell)) + " " + bottleneck(evaluation.facts)


def bottleneck(facts: object) -> str:
    """ "memory", "products", "launches" or "unknown": what most of the time seems to go to."""
    if not isinstance(facts, dict) or not facts:
        return "unknown"
    if "shared" in facts:
        return "memory" if facts.get("matrix_share", 0.0) < 0.25 else "products"
    if facts.get("product_share", 0.0) > 0.5:
        return "products"
    if facts.get("bytes", 0.0) > 3 * facts.get("compulsory", 1.0):
        return "memory"
    return "launches" if facts.get("operators", 0) > 8 else "unknown"


def write(archive: Archive, path: str | Path) -> int:
    """Writes all lessons of an archive; how many."""
    lessons = archive.lessons()
    lines = [
        json.dumps(
            {
                "state": x.state,
                "action": x.action,
                "n": x.n,
                "mean": x.mean,
                "deviation": x.deviation,
            }
        )
        for x in lessons
    ]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def read(archive: Archive, path: str | Path, device: str) -> int:
    """Adds lessons of another archive, each as one outcome of its mean; how many."""
    count = 0
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        archive.learn(str(entry["state"]), str(entry["action"]), float(entry["mean"]), device)
        count += 1
    return count
