"""What is required of a benchmark run, each as a value that judges the records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

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


class Requirement(ABC):
    """A claim about the records of a run."""

    def judge(self, records: Sequence[Record]) -> Judgement:
        try:
            measured, met = self._measured(records)
        except _MissingError as reason:
            return Judgement(self._claim(records), self._needed(), str(reason), None)
        return Judgement(self._claim(records), self._needed(), measured, met)

    @abstractmethod
    def _claim(self, records: Sequence[Record]) -> str: ...

    @abstractmethod
    def _needed(self) -> str: ...

    @abstractmethod
    def _measured(self, records: Sequence[Record]) -> tuple[str, bool]:
        """What was found, and whether it is enough; raises _MissingError."""


@dataclass(frozen=True)
class FasterThan(Requirement):
    """The peer takes at least `at_least` times our time, by the median of paired samples."""

    peer: str
    case: str
    part: str
    at_least: float
    goal: float | None = None

    def _claim(self, records: Sequence[Record]) -> str:
        return f"{self.case}, {self.part}: speed over {_title(records, self.peer)}"

    def _needed(self) -> str:
        return f">= {self.at_least:g}x" + (f" (goal {self.goal:g}x)" if self.goal else "")

    def _measured(self, records: Sequence[Record]) -> tuple[str, bool]:
        ours = _samples(records, self.case, OURS, self.part)
        factor = ratio(_samples(records, self.case, self.peer, self.part), ours)
        shown = f"{factor.median:.1f}x ({factor.low:.1f} to {factor.high:.1f})"
        return shown, factor.median >= self.at_least


@dataclass(frozen=True)
class AtMostTakes(Requirement):
    """Our peak memory stays below `share` of the peer's."""

    peer: str
    case: str
    part: str
    share: float

    def _claim(self, records: Sequence[Record]) -> str:
        return f"{self.case}, {self.part}: memory over {_title(records, self.peer)}"

    def _needed(self) -> str:
        return f"< 1/{1 / self.share:g}"

    def _measured(self, records: Sequence[Record]) -> tuple[str, bool]:
        ours = _peak(records, self.case, OURS, self.part)
        peer = _peak(records, self.case, self.peer, self.part)
        shown = f"1/{peer / max(ours, 1):.1f} ({ours / 1e6:.1f} of {peer / 1e6:.0f} MB)"
        return shown, ours < self.share * peer


@dataclass(frozen=True)
class AtMostGrows(Requirement):
    """From the smaller case to the larger our median time grows at most by `factor`."""

    smaller: str
    larger: str
    part: str
    factor: float

    def _claim(self, records: Sequence[Record]) -> str:
        return f"{self.smaller} to {self.larger}, {self.part}: growth of time"

    def _needed(self) -> str:
        return f"<= {self.factor:g}x"

    def _measured(self, records: Sequence[Record]) -> tuple[str, bool]:
        small = summarise(_samples(records, self.smaller, OURS, self.part)).median
        large = summarise(_samples(records, self.larger, OURS, self.part)).median
        return f"{large / small:.2f}x", large / small <= self.factor


class _MissingError(Exception):
    """Why a requirement cannot be judged."""


def _record(records: Sequence[Record], case: str, competitor: str) -> Record:
    for record in records:
        if record.name == case and record.competitor == competitor:
            if record.status != MEASURED:
                raise _MissingError(f"{record.status}: {record.reason}")
            return record
    raise _MissingError(NOT_IN_RUN)


def _samples(records: Sequence[Record], case: str, competitor: str, part: str) -> Sequence[float]:
    record = _record(records, case, competitor)
    if part not in record.samples:
        raise _MissingError(record.pass_reasons.get(part, "this pass was not timed"))
    return record.samples[part]


def _peak(records: Sequence[Record], case: str, competitor: str, part: str) -> int:
    record = _record(records, case, competitor)
    if part not in record.peak_bytes:
        raise _MissingError(record.pass_reasons.get(part, "memory cannot be counted here"))
    return record.peak_bytes[part]


def _title(records: Sequence[Record], competitor: str) -> str:
    return next((r.title for r in records if r.competitor == competitor), competitor)
