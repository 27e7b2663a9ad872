"""Runs every case that a file does not have yet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal._errors import FovealError
from foveal.eval.tasks import Bench, Case
from foveal.eval.variants import Variant

Step = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """What to measure: every variant, task and length; `depths` of needles, `parts` of the text."""

    variants: Sequence[Variant]
    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    parts: int = 1

    def cases(self) -> list[Case]:
        """Shortest first; exact attention before what is compared with it."""
        found = []
        for length in sorted(self.lengths):
            for task in self.tasks:
                for part in range(1 if task == "speed" else self.parts):
                    for variant in self.variants:
                        depths = self.depths if task == "needle" else (None,)
                        found += [Case(task, length, variant, depth, part) for depth in depths]
        return found


class Lines:
    """Results as JSON lines, appended one by one; a line that was cut off is stepped over."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self, subject: str) -> dict[str, dict[str, Any]]:
        """The newest line of every case of one subject."""
        found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and line.get("subject") == subject:
                    found[line["key"]] = line
        return found

    def append(self, line: dict[str, Any]) -> None:
        """One more line, on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        torn = torn and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run(bench: Bench, plan: Plan, lines: Lines, facts: dict[str, Any], step: Step) -> list[Any]:
    """Measures what is missing and returns the lines of the plan, in its order."""
    name = bench.subject.name
    cases, done = plan.cases(), lines.read(name)
    for number, case in enumerate(cases):
        if case.key in done:
            continue
        step(f"{case.task}, {case.length} tokens: {case.variant.label}", number / len(cases))
        line = _line(case, name, facts)
        try:
            line["values"] = bench.run(case)
        except FovealError as error:
            line |= {"status": "refused", "reason": str(error)}
        lines.append(line)
        done[case.key] = line
    return [done[case.key] for case in cases]


def _line(case: Case, subject: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": case.key,
        "subject": subject,
        "task": case.task,
        "length": case.length,
        "variant": case.variant.title,
        "budget": case.variant.budget,
        "options": dict(case.variant.options),
        "depth": case.depth,
        "part": case.part,
        "status": "measured",
        "values": {},
        "environment": facts,
    }
