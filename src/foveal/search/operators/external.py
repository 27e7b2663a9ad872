"""Candidates written by any command: a program, a script, an agent with tools of its own."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import tempfile
from pathlib import Path

from foveal._errors import TaskError
from foveal.search.candidate import Candidate, Proposal
from foveal.search.operators.base import View
from foveal.search.operators.language import digest

_LONGEST = 1 << 19


class External:
    """A command of the user's that gets a folder and leaves a new `program.py` in it.

    The folder holds `task.py` (the reference), `program.py` (the parent), `facts.txt` (what was measured on
    it) and `accepted.json` (the way to it).  The command runs with the rights of the user; what it leaves
    is judged like any other candidate.
    """

    name = "external"

    def __init__(self, command: str, seconds: float = 600.0) -> None:
        self.command = shlex.split(command)
        self.seconds = seconds
        if not self.command:
            raise TaskError("external: got an empty command; a program to start is needed")

    def propose(self, view: View, source: random.Random) -> Proposal | None:
        parent = view.parent(source)
        if parent is None or view.task.beginning["kind"] == "template":
            return None
        with tempfile.TemporaryDirectory(prefix="foveal-external-") as name:
            folder = Path(name)
            before = parent.candidate.text or str(view.task.beginning["text"])
            (folder / "task.py").write_text(str(view.task.reference["text"]), encoding="utf-8")
            (folder / "program.py").write_text(before, encoding="utf-8")
            (folder / "facts.txt").write_text("\n".join(digest(parent)), encoding="utf-8")
            (folder / "accepted.json").write_text(json.dumps(view.archive.accepted()))
            try:
                done = subprocess.run(
                    self.command, cwd=folder, timeout=self.seconds, capture_output=True, check=False
                )
                after = (folder / "program.py").read_bytes()[:_LONGEST].decode("utf-8")
            except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired) as error:
                view.archive.note(self.name, f"{type(error).__name__}: {error}")
                return None
        if done.returncode != 0:
            view.archive.note(self.name, f"the command ended with status {done.returncode}")
            return None
        candidate = Candidate(parent.candidate.params, after)
        if after == before or not view.new(candidate):
            return None
        return Proposal(candidate, self.name, (parent.id,), " ".join(self.command))
