"""Records as a terminal table and as one HTML page.  Reads records and nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from foveal.bench.figures import Axis, Data, Series, bars, lines
from foveal.bench.heat import CHOSEN, Unit, figure, heats, unit_of
from foveal.bench.measure import BACKWARD, BOTH, FORWARD, WARM, Summary, ratio, summarise
from foveal.bench.page import Page
from foveal.bench.rates import rate, roofline
from foveal.bench.record import MEASURED, Record
from foveal.bench.requirements import NOT_IN_RUN, OURS, Judgement, Requirement

COLOURS = {
    OURS: "#0b7285",
    "masked": "#e8590c",
    "dense": "#868e96",
    "flex": "#5f3dc4",
    "natten": "#2b8a3e",
    "local_attention": "#c2255c",
    "foveal-hopper": "#22b8cf",
    "foveal-triton": "#0ca678",
    "foveal-sdpa": "#adb5bd",
    "foveal-cpu": "#15aabf",
    "cudnn": "#e67700",
    "flash2": "#1864ab",
    "varlen": "#862e9c",
    "flash_attn": "#d6336c",
    "flashinfer": "#66a80f",
}
_ANOTHER_RESULT = " (another result)"
_LONGEST_REASON = 260
WIDE = 150
"""Columns of a terminal in which every table fits."""
_VERDICT = 14


def judge(records: Sequence[Record], requirements: Iterable[Requirement]) -> list[Judgement]:
    """Every requirement whose cases and competitors are among the records."""
    judgements = (requirement.judge(records) for requirement in requirements)
    return [each for each in judgements if each.measured != NOT_IN_RUN]


def terminal(records: Sequence[Record], columns: int = WIDE) -> str:
    """One aligned table per case; ratios say how many times longer than foveal a peer takes.

    columns: of the terminal; where a table is wider, memory gets one of its own.
    """
    return "\n\n".join(_terminal_case(group, columns) for group in _by_case(records))


def terminal_judgements(judgements: Sequence[Judgement], columns: int = WIDE) -> str:
    """What is required, what was measured, and whether it is met."""
    rows = [(j.verdict, j.claim, j.needed, j.measured) for j in judgements]
    table = aligned([("", "requirement", "needed", "measured"), *rows], left=4, wrap=(3, 60))
    if _width(table) <= columns:
        return table
    items = []
    for verdict, claim, needed, measured in rows:
        told = textwrap.wrap(f"{claim}: {measured}; needed {needed}", columns - _VERDICT - 4)
        items += [f"  {verdict if at == 0 else '':<{_VERDICT}}{x}" for at, x in enumerate(told)]
    return "\n".join(items)


def html(
    records: Sequence[Record],
    judgements: Sequence[Judgement] = (),
    title: str = "foveal benchmark",
) -> Page:
    """The report: plots, requirements, every number, every refusal, and where it was measured."""
    page = Page(title, _headline(records), facts=_facts(records))
    if judgements:
        rows = [(j.claim, j.needed, j.measured, j.verdict) for j in judgements]
        section = page.section("Requirements", "By the median of paired, interleaved samples.")
        section.table(("requirement", "needed", "measured", "verdict"), rows, text_columns=4)
    _maps(page, records)
    _length_and_window(page, records)
    _speed_up(page, records)
    _memory(page, records)
    _all_numbers(page, records)
    _rates(page, records)
    _not_measured(page, records)
    return page


def tile_bound(plan: Mapping[str, Any]) -> float | None:
    """How many times fewer tiles than dense attention the plan visits."""
    tiles = plan.get("tiles") or {}
    visited, total = tiles.get("visited"), tiles.get("total")
    return total / visited if visited and total else None


def milliseconds(seconds: float) -> str:
    """A time with three digits: 74.1 ms, 1.24 s."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def _terminal_case(group: Sequence[Record], columns: int) -> str:
    ours = _ours(group)
    header = ("", FORWARD, "ratio", BOTH, "ratio", "peak", "peak " + BOTH)
    rows: list[Sequence[str]] = [header]
    sentences = []
    for record in group:
        if record.status != MEASURED:
            sentences.append(f"  {_label(record)}: {record.status}, {_short(record.reason)}")
            continue
        cells = [_label(record)]
        for part in (FORWARD, BOTH):
            cells += [_time(record, part), _against(record, ours, part)]
        cells += [_peak(record, part) for part in (FORWARD, BOTH)]
        rows.append(tuple(cells))
        sentences += _pass_sentences(record)
    room = min(columns, 110)
    wrapped = [textwrap.fill(s, room, subsequent_indent="    ") for s in sentences]
    tables = [aligned(rows)] if len(rows) > 1 else []
    if tables and _width(tables[0]) > columns:
        tables = [aligned([row[:5] for row in rows]), aligned([(row[0], *row[5:]) for row in rows])]
    return "\n".join([textwrap.fill(_case_line(group), room), *tables, *wrapped])


def _case_line(group: Sequence[Record]) -> str:
    case, ours = group[0].case, _ours(group)
    if "q_heads" not in case:
        return f"{case['name']}, {case['dtype']}"
    heads = f"{case['q_heads']} head{'s' * (case['q_heads'] != 1)} of {case['head_dim']}"
    if case["kv_heads"] != case["q_heads"]:
        heads += f" ({case['kv_heads']} for keys)"
    line = f"{case['name']}, {heads}, {case['dtype']}"
    bound = tile_bound(ours.plan) if ours else None
    return line + (f"; tiles allow {bound:.1f}x over dense" if bound else "")


def _pass_sentences(record: Record) -> list[str]:
    """One sentence per reason, however many passes it concerns."""
    return [
        f"  {_label(record)}: {reason}" for reason in dict.fromkeys(record.pass_reasons.values())
    ]


def aligned(
    rows: Sequence[Sequence[str]], left: int = 1, wrap: tuple[int, int] | None = None
) -> str:
    """Columns padded to their widest cell, the first `left` of them flush left."""
    if wrap is not None:
        column, width = wrap
        rows = [
            (
                *row[:column],
                textwrap.shorten(row[column], width, placeholder=" ..."),
                *row[column + 1 :],
            )
            for row in rows
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = []
    for row in rows:
        cells = [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        text.append("  " + "  ".join(cells).rstrip())
    return "\n".join(text)


def _by_case(records: Sequence[Record]) -> list[list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.key, []).append(record)
    return list(groups.values())


def _ours(group: Sequence[Record]) -> Record | None:
    return next((r for r in group if r.competitor == OURS), None)


def _label(record: Record) -> str:
    """The title, with what ran of ours, and with a warning on yardsticks."""
    if record.competitor == OURS and (implementation := record.plan.get("implementation")):
        return f"{record.title}, {implementation}"
    return record.title + ("" if record.same_result else _ANOTHER_RESULT)


def _summary(record: Record, part: str) -> Summary | None:
    samples = record.samples.get(part)
    return summarise(samples) if samples else None


def _time(record: Record, part: str) -> str:
    summary = _summary(record, part)
    return f"{milliseconds(summary.median)} ±{summary.spread:.0%}" if summary else "-"


def _against(record: Record, ours: Record | None, part: str) -> str:
    if ours is None or record is ours or not ours.samples.get(part) or not record.samples.get(part):
        return "" if record is ours else "-"
    factor = ratio(record.samples[part], ours.samples[part]).median
    return f"{factor:.1f}x" if factor >= 1 else f"{factor:.2f}x"


def _peak(record: Record, part: str) -> str:
    count = record.peak_bytes.get(part)
    return "-" if count is None else megabytes(count)


def _headline(records: Sequence[Record]) -> str:
    statuses = [record.status for record in records]
    cases, timed = len(_by_case(records)), statuses.count(MEASURED)
    wrong = statuses.count("wrong") + statuses.count("failed")
    device = records[0].environment.get("device_name", "") if records else ""
    trouble = f" {wrong} were wrong or failed and were not timed." if wrong else ""
    return (
        f"{cases} cases on {device}: {timed} of {len(records)} competitors passed the gate against "
        f"the float64 reference and were timed.{trouble}"
    )


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Where and how the records were made; several values of a fact are listed."""
    names = {"device_name": "device", "threads": "threads", "cores": "cores", "load": "load before"}
    names |= {
        "system": "system",
        "python": "Python",
        "torch": "PyTorch",
        "foveal": "foveal",
        "commit": "commit",
    }
    facts = [
        (title, _distinct(record.environment.get(name, "") for record in records))
        for name, title in names.items()
    ]
    facts.append(("command", _distinct(f"`{record.command}`" for record in records)))
    facts.append(("run", _distinct(record.run for record in records)))
    facts.append(
        ("measured", _distinct(record.time[:16].replace("T", " ") for record in records[-1:]))
    )
    return facts


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _maps(page: Page, records: Sequence[Record]) -> None:
    found = [
        heat for heat in heats(records, (FORWARD, BACKWARD)) if any(map(heat.fastest, heat.columns))
    ]
    if not found:
        return
    section = page.section(
        "Implementations and patterns",
        "FLOP/s of visible pairs, counted from the pattern that is computed; masked pairs that an "
        "implementation computes count as nothing. Bold: the fastest of a column. "
        f"{CHOSEN} what the plan of foveal chooses. Grey words say why there is no number: `refused` "
        "cannot compute it, `absent` is not installed, `memory` ran out of it, `WRONG` disagreed with "
        "the float64 reference and was not timed, `no pass` has no such pass; sentences stand below.",
    )
    for heat in found:
        section.figure(figure(heat))


def _rates(page: Page, records: Sequence[Record]) -> None:
    """Rates, roofline shares and warm caches, where a run counted work."""
    unit = unit_of(max((rate(record, FORWARD) or 0.0 for record in records), default=0.0))
    columns = (unit.name, "of roofline", "warm / cold")
    header = ("competitor", *(f"{p} {column}" for p in (FORWARD, BACKWARD) for column in columns))
    rows: list[Sequence[object] | str] = []
    for group in _by_case(records):
        timed = [r for r in group if rate(r, FORWARD) is not None]
        if timed:
            rows.append(_case_line(group))
        for record in timed:
            cells = [
                cell for part in (FORWARD, BACKWARD) for cell in _rate_cells(record, part, unit)
            ]
            rows.append((_label(record), *cells))
    if rows:
        page.section(
            "Rates",
            f"{unit.name} of visible pairs; the share of the roofline, which is the larger of FLOPs over "
            "the measured ceiling of matrix products and bytes over that of copies, divided by the "
            "time; and the time on warm caches over that on cold ones, where it was taken.",
        ).table(header, rows)


def _rate_cells(record: Record, part: str, unit: Unit) -> tuple[str, str, str]:
    found, share = rate(record, part), roofline(record, part)
    cold, warm = _summary(record, part), _summary(record, WARM[part])
    return (
        f"{found / unit.size:.3g}" if found else "-",
        f"{share:.0%}" if share else "-",
        f"{warm.median / cold.median:.2f}" if warm and cold else "-",
    )


def _length_and_window(page: Page, records: Sequence[Record]) -> None:
    axes = {
        "length": Axis("length", "tokens", log=True),
        "window": Axis("window side", "tokens", log=True),
    }
    for axis, x in axes.items():
        found = list(dict.fromkeys(line for line, _, _ in _points(records, axis)))
        drawn = [
            line
            for line in found
            if len({x for name, x, _ in _points(records, axis) if name == line}) > 1
        ]
        if not drawn:
            continue
        section = page.section(
            f"Time against {axis}", "Medians; bars span the quartiles. Both axes are logarithmic."
        )
        for line in drawn:
            section.figure(
                *_sweep(
                    line, x, [(at, r) for name, at, r in _points(records, axis) if name == line]
                )
            )


def _points(records: Sequence[Record], axis: str) -> Iterator[tuple[str, float, Record]]:
    for record in records:
        for point in record.case.get("points", ()):
            if point["axis"] == axis and record.status == MEASURED:
                yield point["line"], point["x"], record


def _sweep(line: str, x: Axis, points: Sequence[tuple[float, Record]]) -> list[Data]:
    ticks = sorted({at for at, _ in points})
    x = Axis(x.title, x.unit, x.log, ticks)
    figures = []
    for part in (FORWARD, BOTH):
        series = []
        for name in dict.fromkeys(record.competitor for _, record in points):
            mine = sorted(
                ((at, r) for at, r in points if r.competitor == name and part in r.samples),
                key=lambda point: point[0],
            )
            if mine:
                series.append(_timed_series([at for at, _ in mine], [r for _, r in mine], part))
        if len({at for each in series for at in each.x}) > 1:
            figures.append(lines(f"{line}: {part}", series, x, Axis("time", "ms", log=True)))
    return figures


def _timed_series(x: Sequence[float], records: Sequence[Record], part: str) -> Series:
    summaries = [summarise(record.samples[part]) for record in records]
    notes = [
        f"{r.name}<br>{milliseconds(s.median)} "
        f"({milliseconds(s.low)} to {milliseconds(s.high)}, {s.count} samples)"
        for r, s in zip(records, summaries, strict=True)
    ]
    return Series(
        _label(records[0]),
        x,
        [s.median * 1e3 for s in summaries],
        [s.low * 1e3 for s in summaries],
        [s.high * 1e3 for s in summaries],
        COLOURS.get(records[0].competitor),
        dashed=not records[0].same_result,
        notes=notes,
    )


def _speed_up(page: Page, records: Sequence[Record]) -> None:
    names, bounds = [], []
    measured: dict[str, list[Summary | None]] = {FORWARD: [], BOTH: []}
    for group in _by_case(records):
        ours = _ours(group)
        dense = next((r for r in group if r.competitor == "dense"), None)
        if ours is None or dense is None or not ours.samples or not dense.samples:
            continue
        names.append(_folded(ours.name))
        bounds.append(tile_bound(ours.plan))
        for part, factors in measured.items():
            both = part in ours.samples and part in dense.samples
            factors.append(ratio(dense.samples[part], ours.samples[part]) if both else None)
    if not names:
        return
    series = [
        Series(part, names, [f.median if f else None for f in factors], colour=colour)
        for (part, factors), colour in zip(measured.items(), ("#0b7285", "#66b2bf"), strict=True)
    ]
    if any(bound is not None for bound in bounds):
        series.append(Series("bound: all tiles / visited tiles", names, bounds, colour="#adb5bd"))
    figure = bars(
        "Speed-up over dense attention",
        series,
        Axis(""),
        Axis("speed-up", "times", log=True),
    )
    page.section(
        "Speed-up over dense attention",
        "How many times longer PyTorch's fused attention takes when it computes every pair, beside "
        "what the tile count would allow if every visited tile cost as much as a dense one. Bars "
        "above the bound mean that a tile costs less here than inside the dense implementation.",
    ).figure(figure)


def _memory(page: Page, records: Sequence[Record]) -> None:
    figures = []
    for part in (FORWARD, BOTH):
        groups = [[r for r in group if part in r.peak_bytes] for group in _by_case(records)]
        groups = [group for group in groups if group]
        names = list(dict.fromkeys(r.competitor for group in groups for r in group))
        series = []
        for name in names:
            found = [next((r for r in group if r.competitor == name), None) for group in groups]
            label = next(_label(r) for r in found if r is not None)
            y = [r.peak_bytes[part] / 1e6 if r else None for r in found]
            x = [_folded(group[0].name) for group in groups]
            dashed = label.endswith(_ANOTHER_RESULT)
            series.append(Series(label, x, y, colour=COLOURS.get(name), dashed=dashed))
        if series:
            memory = Axis("peak memory", "MB", log=True)
            figures.append(bars(f"Peak memory: {part}", series, Axis(""), memory))
    if figures:
        section = page.section(
            "Memory",
            "Growth of memory at its highest during one call, result included; what a competitor "
            "keeps between calls (a mask, block lists) is listed below and not in these bars.",
        )
        for figure in figures:
            section.figure(figure)


def _all_numbers(page: Page, records: Sequence[Record]) -> None:
    times = (FORWARD, "ratio", BACKWARD, BOTH, "ratio")
    header = ("competitor", *times, "peak", "peak " + BOTH, "held", "samples")
    rows: list[Sequence[object] | str] = []
    for group in _by_case(records):
        ours = _ours(group)
        rows.append(_case_line(group))
        for record in group:
            if record.status != MEASURED:
                continue
            forward, both = ((_time(record, p), _against(record, ours, p)) for p in (FORWARD, BOTH))
            peaks = (_peak(record, FORWARD), _peak(record, BOTH), megabytes(record.held_bytes))
            count = len(record.samples.get(FORWARD, ()))
            rows.append((_label(record), *forward, _time(record, BACKWARD), *both, *peaks, count))
    if rows:
        prose = "Median, and half the distance of the quartiles. Ratio: how many times our time."
        page.section("All numbers", prose).table(header, rows)


def _not_measured(page: Page, records: Sequence[Record]) -> None:
    rows: list[tuple[str, str, str, str]] = []
    for record in records:
        if record.status != MEASURED:
            rows.append((record.title, record.name, record.status, _short(record.reason)))
        reasons = dict.fromkeys(record.pass_reasons.values())
        rows += [(record.title, record.name, "part", reason) for reason in reasons]
    merged: dict[tuple[str, str, str], list[str]] = {}
    for title, name, status, reason in rows:
        merged.setdefault((title, status, reason), []).append(name)
    if merged:
        table = [
            (title, status, reason, "; ".join(names))
            for (title, status, reason), names in merged.items()
        ]
        section = page.section("Not measured", "Every refusal in its own words.")
        section.table(("competitor", "status", "why", "cases"), table, text_columns=4)


def _short(reason: str) -> str:
    """A sentence without the end of a pattern that lists all of its documents."""
    return textwrap.shorten(reason, _LONGEST_REASON, placeholder=" ...")


def _folded(name: str) -> str:
    return "<br>".join(textwrap.wrap(name, 26))
