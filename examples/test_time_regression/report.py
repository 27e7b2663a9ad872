"""Errors against dimension, bias against variance, and scores of what was trained, as a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from examples.test_time_regression.estimators import KNOBS, NOISE
from foveal.bench.figures import Axis, Data, Series, lines
from foveal.bench.page import Page

Records = Sequence[dict[str, Any]]


def build(records: Records, command: str) -> Page:
    """The whole report."""
    estimated = [r for r in records if r["task"] == "regression"]
    trained = [r for r in records if r["task"] != "regression"]
    facts = [("command", f"`{command}`")]
    if trained:
        facts = [("device", trained[0]["device"]), ("PyTorch", trained[0]["torch"]), *facts]
    page = Page(
        "Lines instead of constants",
        "Softmax attention fits a constant around every query, local linear attention a line. What that is "
        "worth, as an estimator with nothing trained, and in small models trained from nothing.",
        facts=facts,
    )
    if estimated:
        _estimators(page, estimated)
    for kind in dict.fromkeys(map(_kind, trained)):
        _trained(page, [r for r in trained if _kind(r) == kind])
    return page


def _kind(record: dict[str, Any]) -> tuple[Any, ...]:
    """What the runs of one table have in common."""
    return tuple(record[name] for name in ("task", "dim", "depth", "steps", "device"))


def _estimators(page: Page, records: Records) -> None:
    seeds, points = len({r["seed"] for r in records}), records[0]["points"]
    section = page.section(
        "Regression at test time",
        f"{points} points on a sphere, values of a piecewise smooth function with noise of {NOISE}; the "
        "estimator is asked for the function elsewhere. Width of the softmax, ridge and gates are chosen on "
        f"other draws. Means over {seeds} functions; bars reach from the best to the worst. A constant "
        "is biased wherever the function leans; a line pays for its slope with variance.",
    )
    for what, title in (
        ("error", "mean squared error"),
        ("bias", "squared bias"),
        ("variance", "variance"),
    ):
        section.figure(_by_dimension(records, what, title))
    section.table(
        ("estimator", "dimension", "error", "squared bias", "variance"),
        [
            (name, str(dim), *(_spread([r[what] for r in own]) for what in _PARTS))
            for dim in sorted({r["dim"] for r in records})
            for name in KNOBS
            if (own := [r for r in records if r["model"] == name and r["dim"] == dim])
        ],
        text_columns=1,
    )


_PARTS = ("error", "bias", "variance")


def _by_dimension(records: Records, what: str, title: str) -> Data:
    series = []
    for name in KNOBS:
        dims = sorted({r["dim"] for r in records})
        groups = [[r[what] for r in records if r["model"] == name and r["dim"] == d] for d in dims]
        series.append(
            Series(
                name,
                dims,
                [statistics.mean(group) for group in groups],
                low=[min(group) for group in groups],
                high=[max(group) for group in groups],
            )
        )
    heading = f"{title[0].upper()}{title[1:]} against dimension"
    return lines(heading, series, Axis("dimension of the points", "1"), Axis(title, "1"))


def _spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def _trained(page: Page, records: Records) -> None:
    first = records[0]
    sizes = ", ".join(f"{name} {value}" for name, value in first["sizes"].items())
    section = page.section(
        f"Trained: {first['task']}",
        f"Shown is the {first['measure']}, on fresh data; {sizes}. {first['depth']} layers of width "
        f"{first['dim']} and {first['heads']} heads, {first['steps']} steps of {first['batch']} "
        "sequences; mean and standard deviation over seeds.",
    )
    rows = []
    for name in dict.fromkeys(r["model"] for r in records):
        own = [r for r in records if r["model"] == name]
        scores = [r["score"] for r in own]
        every = " ".join(f"{score:.3f}" for score in scores)
        seconds = f"{statistics.mean(r['seconds'] for r in own):.0f} s"
        rows.append((name, _spread(scores), every, f"{own[0]['parameters']:,}", seconds))
    section.table(("layers", "score", "seeds", "weights", "time"), rows, text_columns=1)
