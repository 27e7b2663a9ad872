"""What is to be made fast: a reference, the cases it is judged and timed on, and a space to search."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal._errors import TaskError
from foveal.search.candidate import Candidate
from foveal.search.isolate.channel import Message
from foveal.search.isolate.process import Nursery, ProgramError
from foveal.search.space import Space

VERIFIED, TIMED, HIDDEN = "verify", "timed", "hidden"
"""Roles of a case: only judged; judged and timed (the default); judged when a win is confirmed."""

_PATIENCE = 60.0
_LONGEST_FILE = 1 << 19


@dataclass(frozen=True)
class Input:
    """A tensor that a program is called with."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def floating(self) -> bool:
        return "float" in self.dtype


@dataclass(frozen=True)
class Case:
    """One set of sizes.  `arguments` says how a model takes its inputs: JSON data."""

    name: str
    inputs: tuple[Input, ...]
    role: str = TIMED
    arguments: tuple[Message, ...] = ()

    @property
    def numbers(self) -> int:
        """Elements of all inputs."""
        total = 0
        for each in self.inputs:
            size = 1
            for length in each.shape:
                size *= length
            total += size
        return total


@dataclass(frozen=True)
class Task:
    """A computation to be made fast.

    `reference`: the program that defines it, in any floating type; `start`: the candidate that a search
    begins with, None where there is none yet.  `tolerance` is the factor on the error of the reference in
    the type of the case, as measured against float64.  `gradients`: whether they are judged;
    `deterministic`: whether two runs must agree in every bit; `own_inputs`: whether only inputs that the task
    makes itself are valid.  `targets`: classes of devices that every candidate must compile for; `timed`:
    whether there is a device to time on.
    """

    name: str
    reference: Message
    cases: tuple[Case, ...]
    start: Message | None = None
    space: Space = field(default_factory=Space)
    tolerance: float = 2.0
    gradients: bool = False
    deterministic: bool = True
    own_inputs: bool = False
    device: str = "cpu"
    threads: int = 1
    targets: tuple[str, ...] = ()
    timed: bool = True

    @property
    def key(self) -> str:
        """The identity of the problem: reference, cases and what is demanded."""
        parts = {
            "reference": self.reference,
            "cases": [(c.name, c.role, [(i.shape, i.dtype) for i in c.inputs]) for c in self.cases],
            "demands": [
                self.tolerance,
                self.gradients,
                self.deterministic,
                self.device,
                *self.targets,
            ],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def program(self, candidate: Candidate) -> Message:
        """What a confined process loads for a candidate."""
        base = self.beginning
        if base["kind"] == "template":
            found = {**base, "options": {**base["options"], **candidate.params}}
            return found if candidate.text is None else {**found, "text": candidate.text}
        text = base["text"] if candidate.text is None else candidate.text
        return {**base, "text": text, "options": dict(candidate.params)}

    @property
    def beginning(self) -> Message:
        """The program that a search starts with: `start`, else the reference under another name."""
        if self.start is not None:
            return self.start
        ours, theirs = (
            ("ModelNew", "Model")
            if self.reference["kind"] == "model"
            else ("candidate", self.reference["entry"])
        )
        text = f"{self.reference['text'].rstrip()}\n\n{ours} = {theirs}\n"
        return {**self.reference, "text": text, "entry": ours}

    def cases_of(self, *roles: str) -> tuple[Case, ...]:
        """Cases with one of these roles, smallest first."""
        found = [case for case in self.cases if case.role in roles]
        return tuple(sorted(found, key=lambda case: case.numbers))


def source_program(text: str, entry: str, options: Mapping[str, Any] | None = None) -> Message:
    """A function in the text of a Python module."""
    return {"kind": "source", "text": text, "entry": entry, "options": dict(options or {})}


def read_task(
    path: str | Path,
    nursery: Nursery,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> Task:
    """A task from a Python file: its own format, or a problem with `Model` and `get_inputs`.

    The file is run in a confined process only.  Own format: `reference(x, ...)`, and
    `SHAPES = [{"x": (64, 128), "role": "timed"}, ...]`; optionally `DTYPE`, `TOLERANCE`, `GRADIENTS`,
    `DETERMINISTIC`, `make_inputs(shapes, source)`, `candidate(x, ..., option=...)` and
    `SPACE = {"option": [values]}`.
    `settings` replace constants that the file sets at its top level.  Raises TaskError.
    """
    path = Path(path)
    text = read_text(path)
    names = defined_names(text)
    for name in settings or {}:
        if name not in names:
            raise TaskError(f"{path}: it sets no {name} at its top level")
    if {"Model", "get_inputs"} <= names:
        return _problem(path.stem, text, names, nursery, dict(settings or {}), device, threads)
    if "reference" in names:
        return _function(path.stem, text, names, nursery, dict(settings or {}), device, threads)
    raise TaskError(
        f"{path}: got {', '.join(sorted(names)) or 'no definitions'}; a function reference, or a class "
        f"Model with get_inputs, is needed"
    )


def read_text(path: str | Path) -> str:
    """The text of a file of at most 512 KiB.  Raises TaskError."""
    path = Path(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: it cannot be read: {error}") from None
    if len(content) > _LONGEST_FILE:
        raise TaskError(f"{path}: got {len(content)} bytes; at most {_LONGEST_FILE} are needed")
    return text


def defined_names(text: str) -> set[str]:
    """Names that a module defines at its top level; nothing is run.  Raises TaskError."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise TaskError(f"it does not parse: {error}") from None
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def _described(name: str, program: Message, nursery: Nursery, device: str, threads: int) -> Message:
    try:
        with nursery.start() as process:
            load = {"do": "load", "program": program, "threads": threads, "device": device}
            process.ask(load, _PATIENCE)
            return process.ask({"do": "describe"}, _PATIENCE)
    except ProgramError as error:
        raise TaskError(f"{name}: {error}") from None


def _function(
    name: str,
    text: str,
    names: set[str],
    nursery: Nursery,
    settings: dict[str, Any],
    device: str,
    threads: int,
) -> Task:
    reference = source_program(text, "reference") | {"settings": settings}
    found = _described(name, reference, nursery, device, threads)
    start = None
    if "candidate" in names:
        start = source_program(text, "candidate") | {"settings": settings}
    return Task(
        name,
        reference,
        _cases(found, str(found.get("dtype", "float32"))),
        start,
        Space.of(found.get("space", {})),
        _number(found, "tolerance", 2.0),
        bool(found.get("gradients", False)),
        bool(found.get("deterministic", True)),
        "make_inputs" in names,
        device,
        threads,
    )


def _problem(
    name: str,
    text: str,
    names: set[str],
    nursery: Nursery,
    settings: dict[str, Any],
    device: str,
    threads: int,
) -> Task:
    program = {"kind": "model", "text": text, "entry": "Model", "settings": settings}
    found = _described(name, program, nursery, device, threads)
    program["initial"] = found["initial"]
    start = program | {"entry": "ModelNew"} if "ModelNew" in names else None
    return Task(name, program, _cases(found, "float32"), start, device=device, threads=threads)


def _cases(found: Message, dtype: str) -> tuple[Case, ...]:
    cases = []
    for entry in found["cases"]:
        inputs = tuple(
            Input(str(i["name"]), tuple(i["shape"]), str(i.get("dtype", dtype)))
            for i in entry["inputs"]
        )
        label = " ".join("x".join(map(str, i.shape)) or "1" for i in inputs)
        role = entry["role"] or TIMED
        if role not in (VERIFIED, TIMED, HIDDEN):
            raise TaskError(f"role: got {role!r}; {VERIFIED}, {TIMED} or {HIDDEN} is needed")
        cases.append(Case(label, inputs, role, tuple(entry.get("arguments", ()))))
    if not any(case.role == TIMED for case in cases):
        raise TaskError("SHAPES: no case is timed; leave the role of at least one out")
    return tuple(cases)


def _number(found: Message, name: str, otherwise: float) -> float:
    value = found.get(name, otherwise)
    if not isinstance(value, (int, float)) or not 1 <= value <= 1000:
        raise TaskError(f"{name.upper()}: got {value!r}; a number from 1 to 1000 is needed")
    return float(value)


def read_candidate(task: Task, path: str | Path, entry: str | None = None) -> Message:
    """The program in a file as a candidate of a task; `entry` None is "ModelNew" or "candidate"."""
    text = read_text(path)
    names = defined_names(text)
    model = task.reference["kind"] == "model"
    entry = entry or ("ModelNew" if model else "candidate")
    if entry not in names:
        raise TaskError(
            f"{path}: got {', '.join(sorted(names))}; a definition of {entry} is needed"
        )
    if model:
        initial = task.reference["initial"]
        return {"kind": "model", "text": text, "entry": entry, "initial": initial}
    return source_program(text, entry)
