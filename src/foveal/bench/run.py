"""One benchmark run: cases -> gate -> measure -> record, one case at a time."""

from __future__ import annotations

import datetime
import gc
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from foveal._explain import Explanation
from foveal.bench import record
from foveal.bench.baselines import Competitor, Prepared
from foveal.bench.baselines.base import Inputs
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
from foveal.bench.ops import OpCase, Operator, OpGate
from foveal.bench.ours import Foveal
from foveal.bench.record import Record, RecordFile
from foveal.engines.tile.workers import release

Progress = Callable[[str, float], None]
"""Hears what is being done and the share of the run that is done."""


@dataclass(frozen=True)
class Job:
    """What to measure, where, and into which file.  Finished cases of the file are not repeated.

    `implementations` of ours are measured by name too, except the one that the plan chooses: that is
    what ours without a name measures.
    """

    cases: tuple[Case | OpCase, ...]
    peers: tuple[Competitor, ...]
    device: torch.device
    file: RecordFile
    budget: Budget = DEFAULT_BUDGET
    command: str = ""
    implementations: tuple[str, ...] = ()
    run_id: str = field(default_factory=lambda: f"{_now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}")

    def run(self, progress: Progress = lambda text, share: None) -> Iterator[list[Record]]:
        """Measures the cases that the file lacks; yields and stores the records of each."""
        environment = record.environment(self.device, (case.dtype for case in self.cases))
        done = {(each.key, each.competitor) for each in self.file.read()}
        for index, case in enumerate(self.cases):
            key = case.key(self.device, environment["threads"])
            planned, competitors = self._competitors(case)
            if all((key, competitor.name) in done for competitor in competitors):
                continue
            base = Record(
                run=self.run_id,
                case=case.describe(),
                key=key,
                competitor="",
                title="",
                status="",
                work=_work(planned) if planned else {},
                environment=environment,
                command=self.command,
            )

            def step(text: str, share: float, at: int = index, about: str = case.name) -> None:
                progress(f"{about}: {text}", (at + share) / len(self.cases))

            records = self._run_case(case, competitors, base, step)
            self.file.append(records)
            yield records

    def _competitors(
        self, case: Case | OpCase
    ) -> tuple[Explanation | None, tuple[Competitor, ...]]:
        """What ours will do where a plan decides it, and who takes part."""
        if isinstance(case, OpCase):
            return None, (Operator(),)
        planned = Foveal().explained(case, self.device)
        named = (Foveal(name) for name in self.implementations if name != planned.implementation)
        peers = (p for p in self.peers if case.against is None or p.name in case.against)
        return planned, (Foveal(), *named, *peers)

    def _run_case(
        self, case: Case | OpCase, competitors: tuple[Competitor, ...], base: Record, step: Progress
    ) -> list[Record]:
        gc.collect()
        inputs = case.inputs(self.device)
        gate = OpGate(case, inputs) if isinstance(case, OpCase) else Gate(case, inputs)
        entries: dict[str, _Entry] = {}
        for index, competitor in enumerate(competitors):
            step(f"checking {competitor.title}", 0.5 * index / len(competitors))
            blank = replace(base, competitor=competitor.name, title=competitor.title)
            entries[competitor.name] = self._admit(competitor, gate, blank)
        sets = _InputSets(self.device)
        admitted = {n: sets.turns(e.prepared) for n, e in entries.items() if e.prepared is not None}
        samples = measure(
            admitted, self.device, self.budget, lambda share: step("timing", 0.5 + 0.5 * share)
        )
        time = f"{_now():%Y-%m-%dT%H:%M:%SZ}"
        return [
            replace(entry.record, samples=samples.get(name, {}), time=time)
            for name, entry in entries.items()
        ]

    def _admit(self, competitor: Competitor, gate: Gate | OpGate, blank: Record) -> _Entry:
        """Runs a competitor through refusals, gate and memory count; it is timed if it passes."""
        if reason := competitor.absent():
            return _Entry(replace(blank, status=record.ABSENT, reason=reason))
        if isinstance(gate, Gate):
            if reason := competitor.refuses(gate.case, self.device):
                return _Entry(replace(blank, status=record.REFUSED, reason=reason))
            plan, same = competitor.plan(gate.case, self.device), _same(competitor, gate.case)
            blank = replace(blank, plan=plan, same_result=same)
        try:
            prepared, reasons = self._prepare(competitor, gate)
            verdicts = gate.verdicts(prepared, competitor)
            checks = [asdict(verdict) for verdict in verdicts]
            blank = replace(blank, gate=checks, pass_reasons=reasons)
            if red := [str(verdict) for verdict in verdicts if not verdict.ok]:
                reason = f"disagrees with the float64 reference: {'; '.join(red)}"
                return _Entry(replace(blank, status=record.WRONG, reason=reason))
            peaks = self._peaks(prepared)
        except Exception as error:
            # Whatever a competitor raises is a result about it, and must not end the run.
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
            status = record.OUT_OF_MEMORY if _exhausted(error) else record.FAILED
            return _Entry(replace(blank, status=status, reason=reason))
        held = prepared.held_bytes
        done = replace(blank, status=record.MEASURED, peak_bytes=peaks, held_bytes=held)
        return _Entry(done, prepared)

    def _prepare(
        self, competitor: Competitor, gate: Gate | OpGate
    ) -> tuple[Prepared, Mapping[str, str]]:
        case = gate.case
        if isinstance(case, OpCase):
            return Prepared(gate.inputs, case.call, backward=case.backward), {}
        prepared = competitor.prepare(case, gate.inputs)
        if not case.backward:
            return replace(prepared, backward=False), {}
        refusal = competitor.refuses_backward(case, self.device)
        if refusal is None:
            return prepared, {}
        return replace(prepared, backward=False), {BACKWARD: refusal, BOTH: refusal}

    def _peaks(self, prepared: Prepared) -> dict[str, int]:
        # Buffers that our CPU edition keeps count as memory that it takes.
        peaks = {FORWARD: peak_memory(prepared.forward, self.device, release)}
        steps = prepared.loss_and_gradients()
        if steps is not None:
            forward, backward = steps
            peaks[BOTH] = peak_memory(lambda: backward(forward()), self.device, release)
        return {part: count for part, count in peaks.items() if count is not None}


@dataclass(frozen=True)
class _Entry:
    record: Record
    prepared: Prepared | None = None


@dataclass
class _InputSets:
    """More inputs for the competitors of a case, which share those that they had in common."""

    device: torch.device
    _drawn: dict[tuple[int, ...], Inputs] = field(default_factory=dict)

    def turns(self, prepared: Prepared) -> list[Prepared]:
        """The competitor on its inputs and, on a GPU with room for them, on others like them."""
        size = sum(x.nbytes for x in prepared.inputs)
        if self.device.type != "cuda" or torch.cuda.mem_get_info(self.device)[0] < 12 * size:
            return [prepared]
        return [prepared, *(prepared.on(self._like(prepared.inputs, n)) for n in (1, 2))]

    def _like(self, inputs: Inputs, number: int) -> Inputs:
        key = (number, *(id(x) for x in inputs))
        if key not in self._drawn:
            source = torch.Generator(self.device).manual_seed(number)
            self._drawn[key] = tuple(
                torch.empty_like(x, memory_format=torch.contiguous_format).normal_(generator=source)
                for x in inputs
            )
        return self._drawn[key]


def _same(competitor: Competitor, case: Case) -> bool:
    """Whether the competitor computes what the case asks for."""
    asked, computed = (
        p.simplify(case.extent).key for p in (case.pattern, competitor.pattern(case))
    )
    return asked == computed


def _work(planned: Explanation) -> dict[str, Any]:
    """What a case needs at least; backward: 2.5 times the products, inputs, output and its gradient
    read, three gradients written."""
    flops, moved = planned.flops, planned.bytes
    return {
        "pairs": planned.tiles.pairs,
        "flops": {FORWARD: flops, BACKWARD: 2.5 * flops, BOTH: 3.5 * flops},
        "bytes": {FORWARD: moved, BACKWARD: 2 * moved, BOTH: 3 * moved},
    }


def _exhausted(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in text for words in ("out of memory", "allocate memory")
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
