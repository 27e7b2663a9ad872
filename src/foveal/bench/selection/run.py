"""Measures every method on every reading that a file does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import FovealError, SelectionError
from foveal.bench.selection.measure import Exact, exact, first_row, mean, quality, seconds
from foveal.bench.selection.methods import Call, Method
from foveal.bench.selection.reading import Document, Reading, document, predict, read
from foveal.eval.run import Lines, Step
from foveal.eval.subject import Subject
from foveal.patterns import Causal

Line = dict[str, Any]
_CALIBRATION = 4096
"""Tokens of the text that methods learn from."""
TASKS = ("quality", "agreement", "speed")
"""Attention of every layer by itself; the next tokens of the whole model; times."""


@dataclass(frozen=True)
class Case:
    """One task of one method at one setting on one document."""

    task: str
    length: int
    part: int
    depth: float
    method: Method
    setting: float

    @property
    def key(self) -> str:
        place = f"{self.length}|{self.part}|{self.depth:g}"
        return f"sparse|{self.task}|{place}|{self.method.name}|{self.setting:g}"


@dataclass(frozen=True)
class Plan:
    """Every method and setting, on one document per length and depth; a part of the text for each."""

    methods: Sequence[Method]
    lengths: Sequence[int]
    depths: Sequence[float]
    tasks: Sequence[str] = TASKS

    def cases(self) -> list[Case]:
        """Shortest first; the middle settings of all methods before those at the ends."""
        most = max(len(each.settings) for each in self.methods)
        return [
            Case(task, length, part, depth, method, method.settings[rank])
            for length in sorted(self.lengths)
            for task in self.tasks
            for part, depth in enumerate(self.depths if task != "speed" else self.depths[:1])
            for rank in sorted(range(most), key=lambda n: abs(2 * n - most))
            for method in self.methods
            if rank < len(method.settings)
        ]


@dataclass
class Bench:
    """Reads documents once, keeps them in `folder`, and measures cases; `subject` loads the model.

    readings that lie in the folder already are used as they are, so that a machine without the model can
    measure all but the agreement.  copies: how often the heads of a layer are repeated for its times, so that
    a small model keeps a large device busy.
    """

    name: str
    subject: Callable[[], Subject] | None
    folder: Path
    device: torch.device
    dtype: torch.dtype
    depths: Sequence[float]
    rounds: int = 3
    copies: int = 1
    judged: int = 256
    _readings: dict[tuple[int, int, float], Reading] = field(default_factory=dict)
    _exact: dict[tuple[int, int], Exact] = field(default_factory=dict)
    _logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _fitted: dict[tuple[str, int], Any] = field(default_factory=dict)

    def run(self, case: Case) -> dict[str, Any]:
        """The values of a case; raises FovealError where the method cannot run."""
        measure = getattr(self, f"_{case.task}")
        with torch.inference_mode():
            found: dict[str, Any] = measure(case)
        return found

    def _quality(self, case: Case) -> dict[str, Any]:
        reading = self.reading(case.length, case.part, case.depth)
        first, found = first_row(case.method, reading), []
        memory: dict[str, Any] = {}
        for layer in reading.layers:
            call = self._call(case, layer.number, layer.q[:, first:], layer.k, memory)
            key = layer.number, first
            if key not in self._exact:
                self._exact[key] = exact(layer, reading.document, first)
            found.append(quality(case.method, call, layer, reading.document, self._exact[key]))
        return {**mean(found), "layers": found}

    def _speed(self, case: Case) -> dict[str, Any]:
        reading = self.reading(case.length, case.part, case.depth)
        layer, first = reading.layers[0].repeated(self.copies), first_row(case.method, reading)
        memory: dict[str, Any] = {}
        call = self._call(case, layer.number, layer.q[:, first:], layer.k, memory)
        if case.method.memory:
            assert case.method.choose is not None
            case.method.choose(call)
        found: dict[str, Any] = seconds(case.method, call, layer, self.rounds)
        return found | {"q_heads": layer.q.shape[2], "kv_heads": layer.k.shape[2]}

    def _agreement(self, case: Case) -> dict[str, Any]:
        subject = self._model()
        about = self.reading(case.length, case.part, case.depth).document
        theirs = self._exact_logits(subject, case, about)
        memory: dict[str, Any] = {}

        def tap(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            first = 0 if case.method.rows == "all" else about.text[0]
            call = self._call(case, number, q[:, first:], k, memory)
            if case.method.compute is not None:
                o = case.method.compute(call, v).o
            else:
                assert case.method.choose is not None
                o = attend(call.q, k, v, case.method.choose(call))
            if not first:
                return o
            return torch.cat([attend(q[:, :first], k[:, :first], v[:, :first], Causal()), o], dim=1)

        ours = predict(subject, about, tap)
        answer = about.tokens[about.asking + 1 :].to(ours.device)
        text, asked = ours[: -len(answer)], ours[-len(answer) :]
        same = text.argmax(-1) == theirs[: -len(answer)].argmax(-1)
        p, r = theirs[: -len(answer)].log_softmax(-1), text.log_softmax(-1)
        hits = asked.argmax(-1) == answer
        return {
            "agreement": float(same.double().mean()),
            "divergence": float((p.exp() * (p - r)).sum(-1).mean()),
            "hits": float(hits.double().mean()),
            "exact_hits": float((theirs[-len(answer) :].argmax(-1) == answer).double().mean()),
        }

    def reading(self, length: int, part: int, depth: float) -> Reading:
        """A document of the run as the model reads it, from the folder or from the model."""
        key = length, part, depth
        if key not in self._readings:
            self._readings.clear()
            self._exact.clear()
            self._readings[key] = self._read(length, part, depth)
        return self._readings[key]

    def _read(self, length: int, part: int, depth: float) -> Reading:
        path = self.folder / f"reading-{length}-{part}-{round(100 * depth)}.pt"
        if path.exists():
            found = Reading.load(path)
        else:
            subject = self._model()
            found = read(subject, document(subject, length, part, depth, self.judged))
            found.save(path)
        return found.to(self.device, self.dtype)

    def _call(self, case: Case, layer: int, q: Tensor, k: Tensor, memory: dict[str, Any]) -> Call:
        return Call(layer, q, k, case.setting, memory, self._fit(case.method, case))

    def _fit(self, method: Method, case: Case) -> Any:
        """What a method learns from a part of the text that is not measured."""
        if method.fit is None:
            return None
        key = method.name, min(case.length, _CALIBRATION)
        if key not in self._fitted:
            self._fitted[key] = method.fit(self._read(key[1], len(self.depths), 0.5))
        return self._fitted[key]

    def _exact_logits(self, subject: Subject, case: Case, about: Document) -> Tensor:
        key = case.length, case.part
        if key not in self._logits:
            self._logits.clear()
            self._logits[key] = predict(
                subject, about, lambda number, q, k, v: attend(q, k, v, Causal())
            )
        return self._logits[key]

    def _model(self) -> Subject:
        if self.subject is None:
            raise SelectionError(
                "--model", "none", "readings in the folder, or a model, are needed"
            )
        return self.subject()


def run(bench: Bench, plan: Plan, lines: Lines, facts: Line, step: Step) -> Iterator[Line]:
    """Measures what is missing; yields the line of every case, in the order of the plan."""
    cases, done = plan.cases(), lines.read(bench.name)
    for number, case in enumerate(cases):
        if case.key not in done:
            at = f"{case.length:,} tokens, {case.task}: {case.method.name}, {case.setting:g}"
            step(at, number / len(cases))
            line = _line(case, bench, facts)
            try:
                line["values"] = bench.run(case)
            except (FovealError, torch.OutOfMemoryError) as error:
                reason = str(error).split(". ")[0]
                line |= {"status": "refused", "reason": reason}
            lines.append(line)
            done[case.key] = line
        yield done[case.key]


def _line(case: Case, bench: Bench, facts: Line) -> Line:
    return {
        "key": case.key,
        "subject": bench.name,
        "task": case.task,
        "length": case.length,
        "part": case.part,
        "depth": case.depth,
        "method": case.method.name,
        "system": case.method.system,
        "setting": case.setting,
        "rows": case.method.rows,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "status": "measured",
        "values": {},
        **facts,
    }
