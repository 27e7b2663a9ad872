"""The pictures of an evaluation: quality against memory, needles, time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from foveal.bench.figures import Axis, Series, heat_map, lines
from foveal.bench.page import Page
from foveal.eval.variants import EXACT

Line = dict[str, Any]


def build(found: Sequence[Line], facts: Sequence[tuple[str, str]]) -> Page:
    """One page from the lines of a run."""
    subject = found[0]["subject"] if found else "no model"
    page = Page(
        f"Quality of {subject}",
        "What systems and cache policies do to a real model: distance from exact attention, facts found "
        "again, time and memory. Exact attention is the yardstick: a small model is no judge of wisdom.",
        list(facts),
    )
    measured = [line for line in found if line["status"] == "measured"]
    for task, add in (("loss", _loss), ("needle", _needle), ("recall", _recall), ("speed", _speed)):
        own = [line for line in measured if line["task"] == task]
        if own:
            add(page, own)
    refused = {(x["variant"], x["reason"]): x for x in found if x["status"] == "refused"}
    if refused:
        rows = [(line["variant"], line["reason"]) for line in refused.values()]
        page.section("Refused").table(("variant", "reason"), rows, text_columns=2)
    return page


def _loss(page: Page, found: list[Line]) -> None:
    section = page.section(
        "Distance from exact attention",
        "The model reads a document, the policy acts, and the tokens behind it are predicted. Divergence "
        "is KL(exact, variant) of the next token, agreement how often both have the same first choice.",
    )
    for length in _lengths(found):
        own = [line for line in found if line["length"] == length]
        section.figure(
            _pareto(own, "divergence", "KL divergence", "nat", f"{length:,} tokens: divergence"),
            _pareto(own, "agreement", "same next token", "share", f"{length:,} tokens: agreement"),
            caption="Each line is one policy over its budgets; left is less memory, and the last point on "
            "the right is exact attention.",
        )
    rows: list[Sequence[object] | str] = []
    for length in _lengths(found):
        rows.append(f"{length:,} tokens")
        for line in _means(x for x in found if x["length"] == length):
            v = line["values"]
            rows.append(
                (
                    _label(line),
                    f"{v['loss']:.3f}",
                    f"{v['divergence']:.4f}",
                    f"{v['agreement']:.1%}",
                    f"{v['full_layer_bytes'] / 1e6:.2f}",
                    f"{v['cache_bytes'] / 1e6:.2f}",
                )
            )
    header = ("variant", "loss [nat]", "KL [nat]", "agreement", "full layers [MB]", "cache [MB]")
    section.table(header, rows, "Full layers: those without a window, on which policies act.")


def _needle(page: Page, found: list[Line]) -> None:
    section = page.section(
        "Needle in a haystack",
        "One made-up fact in a long text, asked for at its end: the share of the tokens of the answer "
        "that the model would write, by depth of the fact and length of the text.",
    )
    groups = _grouped(found, _label)
    depths = sorted({line["depth"] for line in found})
    lengths = _lengths(found)
    figures = []
    for label, own in groups.items():
        cells = {(x["depth"], x["length"]): x["values"]["hits"] for x in _means(own)}
        values = [[cells.get((depth, length)) for length in lengths] for depth in depths]
        figures.append(
            heat_map(
                label,
                values,
                Axis("length", "tokens"),
                Axis("depth", "%"),
                "share",
                x_labels=[f"{length:,}" for length in lengths],
                y_labels=[f"{100 * depth:.0f}" for depth in depths],
                limits=(0.0, 1.0),
                height=280,
            )
        )
    for start in range(0, len(figures), 3):
        section.figure(*figures[start : start + 3])
    rows = []
    for label, own in groups.items():
        means = (_mean(x["values"][name] for x in own) for name in _NEEDLE)
        rows.append((label, *(f"{mean:.3f}" for mean in means)))
    section.table(("variant", "tokens right", "answers right", "loss of the answer [nat]"), rows)


_NEEDLE = ("hits", "found", "answer_loss")


def _recall(page: Page, found: list[Line]) -> None:
    section = page.section(
        "Recall among many facts", "Up to eight facts spread over the text, one of them asked for."
    )
    rows: list[Sequence[object] | str] = []
    for length in _lengths(found):
        rows.append(f"{length:,} tokens")
        for line in _means(x for x in found if x["length"] == length):
            rows.append((_label(line), *(f"{line['values'][name]:.3f}" for name in _NEEDLE)))
    section.table(("variant", "tokens right", "answers right", "loss of the answer [nat]"), rows)


def _speed(page: Page, found: list[Line]) -> None:
    section = page.section("Time and memory", "One run each on the machine below.")
    rows: list[Sequence[object] | str] = []
    for length in _lengths(found):
        rows.append(f"{length:,} tokens")
        for line in (x for x in found if x["length"] == length):
            v = line["values"]
            rows.append(
                (
                    _label(line),
                    f"{v['first_token_seconds']:.2f}",
                    f"{v['tokens_per_second']:.2f}",
                    f"{v['cache_bytes'] / 1e6:.2f}",
                    f"{v['cache_bytes_behind'] / 1e6:.2f}",
                )
            )
    header = ("variant", "first token [s]", "tokens/s", "cache [MB]", "cache at the end [MB]")
    section.table(header, rows)


def _pareto(found: list[Line], name: str, title: str, unit: str, heading: str) -> Any:
    exact = [x["values"] for x in _means(found) if x["variant"] == EXACT]
    series = []
    for label, own in _grouped(found, lambda line: str(line["variant"])).items():
        points = sorted(
            (x["values"]["cache_bytes"] / 1e6, x["values"][name], _label(x)) for x in _means(own)
        )
        if label != EXACT and exact and own[0]["budget"] is not None:
            points.append((exact[0]["full_layer_bytes"] / 1e6, exact[0][name], "exact"))
        series.append(
            Series(
                label,
                [point[0] for point in points],
                [point[1] for point in points],
                notes=[f"{point[2]}: {point[1]:.4g} at {point[0]:.2f} MB" for point in points],
            )
        )
    x = Axis("cache of layers without a window", "MB")
    return lines(heading, series, x, Axis(title, unit), height=480)


def _lengths(found: Iterable[Line]) -> list[int]:
    return sorted({line["length"] for line in found})


def _label(line: Line) -> str:
    options = ", ".join(f"{name}={value}" for name, value in line["options"].items())
    budget = "" if line["budget"] is None else f", {line['budget']:g}"
    return f"{line['variant']}{budget}" + (f" ({options})" if options else "")


def _grouped(found: Iterable[Line], of: Callable[[Line], str]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in found:
        groups.setdefault(of(line), []).append(line)
    return groups


def _means(found: Iterable[Line]) -> list[Line]:
    """One line per label, length and depth: the mean over the parts of the text."""
    groups = _grouped(found, lambda x: f"{_label(x)}|{x['length']}|{x['depth']}")
    return [
        own[0]
        | {"values": {name: _mean(x["values"][name] for x in own) for name in own[0]["values"]}}
        for own in groups.values()
    ]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
