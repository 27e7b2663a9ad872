"""What is required of a benchmark run, each as a value that judges the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from foveal.bench.measure import ratio, summarise
from foveal.bench.record import MEASURED, Record

OURS = "foveal"
NOT_IN_RUN = "not part of this run"


@dataclass(frozen=True)
class Judgement:
    """A requirement, what was measured, and whether it is met; None: it could not be measured."""

    claim: str
    needed: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]


class Requirement(Protocol):
    def judge(self, records: Sequence[Record]) -> Judgement: ...


@dataclass(frozen=True)
class FasterThan:
    """Ours takes at most 1 / `at_least` of the peer's time, by the median of paired samples."""

    peer: str
    case: str
    part: str
    at_least: float
    goal: float | None = None

    def judge(self, records: Sequence[Record]) -> Judgement:
        claim = f"{self.case}: {self.part}, times faster than {_title(records, self.peer)}"
        needed = f">= {self.at_least:g}x" + (f" (goal {self.goal:g}x)" if self.goal else "")
        ours, peer = _find(records, self.case, OURS), _find(records, self.case, self.peer)
        missing = _missing(ours, self.part) or _missing(peer, self.part)
        if missing:
            return Judgement(claim, needed, missing, None)
        assert ours is not None and peer is not None
        factor = ratio(peer.samples[self.part], ours.samples[self.part])
        shown = f"{factor.median:.1f}x ({factor.low:.1f} to {factor.high:.1f})"
        return Judgement(claim, needed, shown, factor.median >= self.at_least)


@dataclass(frozen=True)
class AtMostTakes:
    """Our peak memory is at most `share` of the peer's."""

    peer: str
    case: str
    part: str
    share: float

    def judge(self, records: Sequence[Record]) -> Judgement:
        claim = f"{self.case}: {self.part}, peak memory over that of {_title(records, self.peer)}"
        needed = f"< 1/{1 / self.share:g}"
        ours, peer = _find(records, self.case, OURS), _find(records, self.case, self.peer)
        for record in (ours, peer):
            if record is None or record.peak_bytes.get(self.part) is None:
                return Judgement(
                    claim, needed, _missing(record, self.part) or "no memory count", None
                )
        assert ours is not None and peer is not None
        mine, theirs = ours.peak_bytes[self.part], peer.peak_bytes[self.part]
        shown = f"1/{theirs / max(mine, 1):.1f} ({mine / 1e6:.1f} of {theirs / 1e6:.0f} MB)"
        return Judgement(claim, needed, shown, mine < self.share * theirs)


@dataclass(frozen=True)
class AtMostGrows:
    """From the smaller case to the larger our median time grows at most by `factor`."""

    smaller: str
    larger: str
    part: str
    factor: float

    def judge(self, records: Sequence[Record]) -> Judgement:
        claim = f"{self.smaller} to {self.larger}: {self.part}, growth of our time"
        needed = f"<= {self.factor:g}x"
        small, large = _find(records, self.smaller, OURS), _find(records, self.larger, OURS)
        missing = _missing(small, self.part) or _missing(large, self.part)
        if missing:
            return Judgement(claim, needed, missing, None)
        assert small is not None and large is not None
        growth = (
            summarise(large.samples[self.part]).median / summarise(small.samples[self.part]).median
        )
        return Judgement(claim, needed, f"{growth:.2f}x", growth <= self.factor)


def _find(records: Sequence[Record], case: str, competitor: str) -> Record | None:
    return next((r for r in records if r.name == case and r.competitor == competitor), None)


def _title(records: Sequence[Record], competitor: str) -> str:
    return next((r.title for r in records if r.competitor == competitor), competitor)


def _missing(record: Record | None, part: str) -> str:
    """Why there are no samples, or nothing."""
    if record is None:
        return NOT_IN_RUN
    if record.status != MEASURED:
        return f"{record.status}: {record.reason}"
    if part not in record.samples:
        return record.pass_reasons.get(part, "this pass was not timed")
    return ""
