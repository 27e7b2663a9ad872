"""One benchmark run: cases -> gate -> measure -> record, one case at a time."""

from __future__ import annotations

import datetime
import gc
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch

from foveal.bench import record
from foveal.bench.baselines import Competitor, Prepared
from foveal.bench.cases import Case
from foveal.bench.gate import Gate
from foveal.bench.measure import (
    BACKWARD,
    BOTH,
    DEFAULT_BUDGET,
    FORWARD,
    Budget,
    measure,
    peak_memory,
)
from foveal.bench.ours import Foveal
from foveal.bench.record import Record, RecordFile

Progress = Callable[[str, float], None]
"""Hears what is being done and the share of the run that is done."""


@dataclass(frozen=True)
class Job:
    """What to measure, where, and into which file.  Finished cases of the file are not repeated."""

    cases: tuple[Case, ...]
    peers: tuple[Competitor, ...]
    device: torch.device
    file: RecordFile
    budget: Budget = DEFAULT_BUDGET
    command: str = ""
    run_id: str = field(default_factory=lambda: f"{_now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}")

    def run(self, progress: Progress = lambda text, share: None) -> Iterator[list[Record]]:
        """Measures the cases that the file lacks; yields and stores the records of each."""
        environment = record.environment(self.device)
        done = {(each.key, each.competitor) for each in self.file.read()}
        for index, case in enumerate(self.cases):
            key = case.key(self.device, environment["threads"])
            peers = [p for p in self.peers if case.against is None or p.name in case.against]
            competitors = (Foveal(), *peers)
            if all((key, competitor.name) in done for competitor in competitors):
                continue
            base = Record(
                run=self.run_id,
                case=case.describe(),
                key=key,
                competitor="",
                title="",
                status="",
                environment=environment,
                command=self.command,
            )

            def step(text: str, share: float, at: int = index, about: str = case.name) -> None:
                progress(f"{about}: {text}", (at + share) / len(self.cases))

            records = self._run_case(case, competitors, base, step)
            self.file.append(records)
            yield records

    def _run_case(
        self, case: Case, competitors: tuple[Competitor, ...], base: Record, step: Progress
    ) -> list[Record]:
        gc.collect()
        inputs = case.inputs(self.device)
        gate = Gate(case, inputs)
        entries: dict[str, _Entry] = {}
        for index, competitor in enumerate(competitors):
            step(f"checking {competitor.title}", 0.5 * index / len(competitors))
            plan = competitor.plan(case, inputs)
            blank = replace(base, competitor=competitor.name, title=competitor.title, plan=plan)
            entries[competitor.name] = self._admit(competitor, case, gate, blank)
        admitted = {n: e.prepared for n, e in entries.items() if e.prepared is not None}
        samples = measure(
            admitted, self.device, self.budget, lambda share: step("timing", 0.5 + 0.5 * share)
        )
        time = f"{_now():%Y-%m-%dT%H:%M:%SZ}"
        return [
            replace(entry.record, samples=samples.get(name, {}), time=time)
            for name, entry in entries.items()
        ]

    def _admit(self, competitor: Competitor, case: Case, gate: Gate, blank: Record) -> _Entry:
        """Runs a competitor through refusals, gate and memory count; it is timed if it passes."""
        if reason := competitor.absent():
            return _Entry(replace(blank, status=record.ABSENT, reason=reason))
        if reason := competitor.refuses(case):
            return _Entry(replace(blank, status=record.REFUSED, reason=reason))
        pattern = competitor.pattern(case)
        same = pattern.simplify(case.extent).key == case.pattern.simplify(case.extent).key
        try:
            prepared, reasons = self._prepare(competitor, case, gate)
            verdicts = gate.verdicts(prepared, pattern)
            checks = [asdict(verdict) for verdict in verdicts]
            blank = replace(blank, gate=checks, pass_reasons=reasons, same_result=same)
            if red := [str(verdict) for verdict in verdicts if not verdict.ok]:
                reason = f"disagrees with the float64 reference: {'; '.join(red)}"
                return _Entry(replace(blank, status=record.WRONG, reason=reason))
            peaks = self._peaks(prepared)
        except Exception as error:
            # Whatever a competitor raises is a result about it, and must not end the run.
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
            return _Entry(replace(blank, status=record.FAILED, reason=reason))
        held = prepared.held_bytes
        done = replace(blank, status=record.MEASURED, peak_bytes=peaks, held_bytes=held)
        return _Entry(done, prepared)

    def _prepare(
        self, competitor: Competitor, case: Case, gate: Gate
    ) -> tuple[Prepared, Mapping[str, str]]:
        prepared = competitor.prepare(case, gate.inputs)
        if not case.backward:
            return replace(prepared, backward=False), {}
        refusal = competitor.refuses_backward(case, self.device)
        if refusal is None:
            return prepared, {}
        return replace(prepared, backward=False), {BACKWARD: refusal, BOTH: refusal}

    def _peaks(self, prepared: Prepared) -> dict[str, int]:
        peaks = {FORWARD: peak_memory(prepared.forward, self.device)}
        steps = prepared.loss_and_gradients()
        if steps is not None:
            forward, backward = steps
            peaks[BOTH] = peak_memory(lambda: backward(forward()), self.device)
        return {part: count for part, count in peaks.items() if count is not None}


@dataclass(frozen=True)
class _Entry:
    record: Record
    prepared: Prepared | None = None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
