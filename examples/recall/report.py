"""Scores against bytes of state, as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from examples.recall.models import MIXERS
from foveal.bench.figures import Axis, Data, Series, lines
from foveal.bench.page import Page

Records = Sequence[dict[str, Any]]


def build(records: Records, command: str) -> Page:
    """The whole report."""
    first = records[0]
    page = Page(
        "State and memory",
        "Two-layer models that differ only in how they mix tokens, trained from nothing: what they "
        "recall, and how well they foresee text, against the bytes that they keep of a sequence.",
        facts=[
            ("device", first["device"]),
            ("PyTorch", first["torch"]),
            ("seconds of training", f"{sum(r['seconds'] for r in records):.0f}"),
            ("command", f"`{command}`"),
        ],
    )
    for length_and_pairs, group in _grouped([r for r in records if r["task"]["name"] == "recall"]):
        length, pairs = length_and_pairs
        section = page.section(
            f"Recall of {pairs} pairs",
            f"A sequence of {length} tokens: {pairs} keys, each followed by a value, then keys "
            "again; the model says what stood behind them. A fixed state holds so many pairs and no "
            "more; keys and values of softmax attention grow with the sequence. Every layer has a "
            "convolution over four tokens, without which only the layers that bring their own can "
            "learn this.",
        )
        section.figure(_plot(group, "right answers", ""), caption="Points are widths of the model.")
        section.table(_HEADER, _rows(group), text_columns=1)
    text = [r for r in records if r["task"]["name"] == "text"]
    if text:
        length = text[0]["task"]["length"]
        section = page.section(
            "The next character of Python's documentation",
            f"Windows of {length} characters of the topics that `help()` shows; the last tenth is "
            "held out and judged. Lower is better.",
        )
        section.figure(_plot(text, "loss", "bits per character"))
        section.table(_HEADER, _rows(text), text_columns=1)
    return page


_HEADER = ("layers", "width", "heads", "state", "weights", "score", "steps", "time")


def _grouped(records: Records) -> Iterable[tuple[tuple[int, int], Records]]:
    kinds = sorted({(r["task"]["length"], r["task"]["pairs"]) for r in records})
    for kind in kinds:
        yield kind, [r for r in records if (r["task"]["length"], r["task"]["pairs"]) == kind]


def _rows(records: Records) -> list[tuple[str, ...]]:
    return [
        (
            r["model"],
            str(r["dim"]),
            str(r["heads"]),
            f"{r['state_bytes'] / 1024:,.1f} KiB",
            f"{r['parameters']:,}",
            f"{r['score']:.3f}",
            str(r["steps"]),
            f"{r['seconds']:.1f} s",
        )
        for r in records
    ]


def _plot(records: Records, title: str, unit: str) -> Data:
    series = []
    for name in MIXERS:
        own = sorted(
            (r for r in records if r["model"] == name), key=lambda r: float(r["state_bytes"])
        )
        if own:
            series.append(
                Series(
                    name,
                    [r["state_bytes"] / 1024 for r in own],
                    [r["score"] for r in own],
                    dashed=name == "softmax",
                    notes=[f"width {r['dim']}: {r['score']:.3f}" for r in own],
                )
            )
    heading = f"{title[0].upper()}{title[1:]} against the state of one sequence"
    return lines(heading, series, Axis("state", "KiB", log=True), Axis(title, unit))
