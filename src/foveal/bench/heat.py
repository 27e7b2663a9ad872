"""The map of implementations and patterns: how fast each is, or in one word why it is not there."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from foveal.bench.figures import Axis, Cell, Data, labelled_map
from foveal.bench.rates import rate, roofline
from foveal.bench.record import ABSENT, FAILED, MEASURED, OUT_OF_MEMORY, REFUSED, WRONG, Record
from foveal.bench.requirements import OURS

_WORDS = {
    REFUSED: "refused",
    ABSENT: "absent",
    WRONG: "WRONG",
    FAILED: "failed",
    OUT_OF_MEMORY: "memory",
}
_MISSING = "no pass"
CHOSEN = "\N{BULLET}"


@dataclass(frozen=True)
class Heat:
    """Cells of one length and one pass; `rows` are implementations, `columns` patterns."""

    length: int
    part: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Record]

    def value(self, row: str, column: str) -> float | None:
        """FLOP/s."""
        record = self.cells.get((row, column))
        return None if record is None else rate(record, self.part)

    def fastest(self, column: str) -> float:
        """FLOP/s of the fastest implementation, 0 where none was timed."""
        return max((self.value(row, column) or 0.0 for row in self.rows), default=0.0)

    def word(self, row: str, column: str) -> str:
        """Why a cell has no value."""
        record = self.cells.get((row, column))
        if record is None:
            return ""
        return _MISSING if record.status == MEASURED else _WORDS[record.status]

    def reason(self, row: str, column: str) -> str:
        record = self.cells.get((row, column))
        if record is None:
            return "not part of this run"
        return record.reason or record.pass_reasons.get(self.part, "")

    def chosen(self, row: str, column: str) -> bool:
        """Whether the plan chooses this implementation of ours."""
        record = self.cells.get((row, column))
        return record is not None and record.competitor == OURS


def heats(records: Sequence[Record], parts: Sequence[str]) -> list[Heat]:
    """One map per length and pass, longest sequences first."""
    mapped = [record for record in records if record.case.get("column")]
    lengths = sorted({_length(record) for record in mapped}, reverse=True)
    found = []
    for length in lengths:
        here = [record for record in mapped if _length(record) == length]
        columns = tuple(dict.fromkeys(str(record.case["column"]) for record in here))
        rows = tuple(dict.fromkeys(row(record) for record in sorted(here, key=_place)))
        cells = {(row(record), str(record.case["column"])): record for record in here}
        found += [Heat(length, part, rows, columns, cells) for part in parts]
    return found


def figure(heat: Heat) -> Data:
    """The map as a plot; bold is the fastest of a column, a bullet what the plan chooses."""
    unit = unit_of(max((heat.fastest(column) for column in heat.columns), default=0.0))
    cells = [[_cell(heat, row, column, unit) for column in heat.columns] for row in heat.rows]
    return labelled_map(
        f"{heat.part}, {heat.length:,} tokens",
        cells,
        Axis("", ""),
        Axis("", ""),
        f"{unit.name} of visible pairs",
        x_labels=["<br>".join(textwrap.wrap(column, 10)) for column in heat.columns],
        y_labels=list(heat.rows),
        height=150 + 34 * len(heat.rows),
    )


@dataclass(frozen=True)
class Unit:
    name: str
    size: float


def unit_of(most: float) -> Unit:
    """TFLOP/s, or GFLOP/s where the fastest does not reach ten of them."""
    return Unit("TFLOP/s", 1e12) if most >= 1e13 else Unit("GFLOP/s", 1e9)


def row(record: Record) -> str:
    """The implementation by which a record counts."""
    if record.competitor == OURS and record.plan.get("implementation"):
        return f"{record.title}, {record.plan['implementation']}"
    return record.title


def _cell(heat: Heat, row: str, column: str, unit: Unit) -> Cell:
    value = heat.value(row, column)
    if value is None:
        return Cell(None, heat.word(row, column), f"{row}, {column}: {heat.reason(row, column)}")
    record = heat.cells[row, column]
    text = f"{value / unit.size:.3g}" if value < 1e3 * unit.size else f"{value / unit.size:,.0f}"
    if value == heat.fastest(column):
        text = f"<b>{text}</b>"
    if heat.chosen(row, column):
        text += CHOSEN
    share = roofline(record, heat.part)
    note = f"{row}, {column}: {value / unit.size:.4g} {unit.name}"
    return Cell(value / unit.size, text, note + (f", {share:.0%} of the roofline" if share else ""))


def _length(record: Record) -> int:
    size = 1
    for side in record.case["grid"]:
        size *= int(side)
    return size


def _place(record: Record) -> bool:
    """Ours before the others, otherwise as they came."""
    return not record.competitor.startswith(OURS)
