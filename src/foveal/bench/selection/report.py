"""What methods lose against how much they compute and how long they take, as one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from foveal.bench.figures import Axis, Data, Series, lines
from foveal.bench.page import Page, Section

Line = dict[str, Any]
COLOURS = (
    "#868e96", "#f06595", "#212529", "#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#1864ab",
    "#e67700", "#862e9c", "#0ca678", "#d6336c", "#66a80f", "#15aabf", "#a61e4d",
)  # fmt: skip
_DENSITY = Axis("scored pairs, of causal", "%")
_TIME = Axis("time, of dense", "%")
_QUALITY = (
    ("mass", Axis("softmax kept", "%"), 100.0),
    ("error", Axis("output error", "%"), 100.0),
    ("needle", Axis("weight on the fact kept", "%"), 100.0),
)
_MODEL = (
    ("agreement", Axis("same next token", "%"), 100.0),
    ("divergence", Axis("KL divergence", "nat"), 1.0),
    ("hits", Axis("tokens of the fact right", "%"), 100.0),
)


def build(found: Sequence[Line], facts: Sequence[tuple[str, str]]) -> Page:
    """One page from the lines of a run."""
    subject = found[0]["subject"] if found else "no model"
    page = Page(
        f"Sparse attention on {subject}",
        "What methods that choose keys lose on the queries, keys and values of a real model, against how "
        "many pairs they score and how long they take. Every text holds one planted fact, which it asks for "
        "at its end. Methods of the last queries alone are judged where text is written behind a prompt.",
        list(facts),
    )
    groups = _grouped(found, lambda x: (x["length"], x["rows"]))
    for (length, rows), own in sorted(groups.items(), key=lambda item: item[0]):
        merged = points(own)
        section = page.section(f"{length:,} tokens, {_ROWS[rows]}")
        _all(section, merged)
        _table(section, merged)
        for name, mine in _grouped(merged, lambda x: x["method"]).items():
            _alone(page.section(f"{name}, {length:,} tokens"), mine)
    refused = {(x["method"], x["reason"]) for x in found if x["status"] == "refused"}
    if refused:
        page.section("Refused").table(("method", "reason"), sorted(refused), text_columns=2)
    return page


_ROWS = {"all": "all queries", "last": "the last queries"}


def points(found: Iterable[Line]) -> list[Line]:
    """One point per method and setting of a length: the mean over documents of all that was measured."""
    result = []
    groups = _grouped(
        (x for x in found if x["status"] == "measured"),
        lambda x: (x["length"], x["rows"], x["method"], x["setting"]),
    )
    for (length, rows, name, setting), own in groups.items():
        names = {n: None for x in own for n in x["values"] if n != "layers"}
        values = {n: _mean(x["values"][n] for x in own if n in x["values"]) for n in names}
        spent, dense = values.get("seconds"), values.get("dense_seconds")
        if spent is not None and dense:
            values["time"] = spent / dense
        base = {"length": length, "rows": rows, "method": name, "setting": setting}
        result.append(base | {"values": values})
    return sorted(result, key=lambda x: (x["length"], x["rows"], x["method"], _cost(x)))


def _cost(line: Line) -> float:
    density = line["values"].get("density")
    return float(line["setting"]) if density is None else float(density)


def _all(section: Section, found: Sequence[Line]) -> None:
    """All methods in one figure for every measure and both axes."""
    for x, name in ((_DENSITY, "density"), (_TIME, "time")):
        drawn = [
            figure(found, name, x, measure, y, factor)
            for measure, y, factor in (*_QUALITY, *_MODEL)
            if _known(found, name, measure)
        ]
        for start in range(0, len(drawn), 2):
            section.figure(*drawn[start : start + 2])


def _alone(section: Section, own: Sequence[Line]) -> None:
    """The Pareto plots of one method."""
    drawn = []
    for x, name in ((_DENSITY, "density"), (_TIME, "time")):
        shares = [
            (measure, y, factor)
            for measure, y, factor in (*_QUALITY, *_MODEL)
            if y.unit == "%" and _known(own, name, measure)
        ]
        series = [
            _series(y.title, own, name, measure, factor, COLOURS[3 + n])
            for n, (measure, y, factor) in enumerate(shares)
        ]
        if series:
            drawn.append(lines(x.title, series, x, Axis("share", "%"), height=360))
    if drawn:
        section.figure(*drawn)


def figure(
    found: Sequence[Line], name: str, x: Axis, measure: str, y: Axis, factor: float = 100.0
) -> Data:
    """All methods: a measure against density or time."""
    groups = _grouped(found, lambda line: line["method"])
    series = [
        _series(method, own, name, measure, factor, COLOURS[n % len(COLOURS)])
        for n, (method, own) in enumerate(groups.items())
        if _known(own, name, measure)
    ]
    return lines(f"{y.title}, {x.title}", series, x, y, height=460)


def _series(
    title: str, own: Sequence[Line], name: str, measure: str, factor: float, colour: str
) -> Series:
    chosen = [x for x in own if _known([x], name, measure)]
    chosen = sorted(chosen, key=lambda x: float(x["values"][name]))
    across = [100 * x["values"][name] for x in chosen]
    up = [factor * x["values"][measure] for x in chosen]
    notes = [
        f"{x['method']}, {x['setting']:g}: {b:.4g} at {a:.3g} %"
        for x, a, b in zip(chosen, across, up, strict=True)
    ]
    return Series(title, across, up, colour=colour, notes=notes)


def _table(section: Section, found: Sequence[Line]) -> None:
    rows: list[Sequence[object] | str] = []
    for name, own in _grouped(found, lambda x: x["method"]).items():
        rows.append(name)
        for line in own:
            shown = (_shown(line["values"].get(each), form) for each, form in _COLUMNS)
            rows.append((f"{line['setting']:g}", *shown))
    section.table(HEADER, rows)


_COLUMNS = (
    ("density", "share"), ("mass", "share"), ("error", "share"), ("needle", "share"),
    ("agreement", "share"), ("divergence", "nat"), ("hits", "share"), ("seconds", "ms"),
    ("choosing_seconds", "ms"), ("dense_seconds", "ms"),
)  # fmt: skip
HEADER = (
    "setting", "pairs [%]", "mass [%]", "error [%]", "fact, weight [%]", "same token [%]",
    "KL [nat]", "fact, tokens [%]", "time [ms]", "choosing [ms]", "dense [ms]",
)  # fmt: skip


def table(found: Iterable[Line]) -> list[tuple[str, ...]]:
    """The rows of a run for a terminal: method, length, then the columns of the page."""
    header = ("method", "tokens", *HEADER)
    rows = [
        (
            line["method"], f"{line['length']:,}", f"{line['setting']:g}",
            *(_shown(line["values"].get(each), form) for each, form in _COLUMNS),
        )
        for line in points(found)
    ]  # fmt: skip
    return [header, *rows]


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return ""
    if form == "nat":
        return f"{value:.4f}"
    return f"{100 * value:.1f}" if form == "share" else f"{1e3 * value:.2f}"


def _known(found: Sequence[Line], *names: str) -> bool:
    return any(all(line["values"].get(name) is not None for name in names) for line in found)


def _grouped(found: Iterable[Line], of: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    groups: dict[Any, list[Line]] = {}
    for line in found:
        groups.setdefault(of(line), []).append(line)
    return groups


def _mean(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) / len(known) if known and len(known) == len(listed) else None
