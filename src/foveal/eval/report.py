"""The pictures of an evaluation: quality against memory, needles, time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from foveal.bench.figures import PALETTE, Axis, Series, heat_map, lines
from foveal.bench.page import Page
from foveal.eval.variants import EXACT

Line = dict[str, Any]


def build(found: Sequence[Line], facts: Sequence[tuple[str, str]]) -> Page:
    """One page from the lines of a run."""
    subject = found[0]["subject"] if found else "no model"
    page = Page(
        f"Quality of {subject}",
        "What systems, cache policies and caches on the host do to a real model: distance from exact "
        "attention, facts found again, time and memory. Exact attention is the yardstick: a small model "
        "is no judge of wisdom.",
        list(facts),
    )
    measured = [line for line in found if line["status"] == "measured"]
    for task, add in _SECTIONS.items():
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
                    f"{max(v['divergence'], 0.0):.4f}",
                    f"{v['agreement']:.1%}",
                    f"{v['full_layer_bytes'] / 1e6:.2f}",
                    f"{v['cache_bytes'] / 1e6:.2f}",
                    _megabytes(v, "host_bytes"),
                )
            )
    header = ("variant", "loss [nat]", "KL [nat]", "agreement", "full layers [MB]", "cache [MB]")
    caption = "Full layers: those without a window, on which policies act. All but the last on the device."
    section.table((*header, "on the host [MB]"), rows, caption)


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
        hits = {(x["depth"], x["length"]): x["values"]["hits"] for x in _means(own)}
        values = [[hits.get((depth, length)) for length in lengths] for depth in depths]
        figures.append(_depths_by_lengths(label, values, depths, lengths))
    for start in range(0, len(figures), 3):
        section.figure(*figures[start : start + 3])
    rows = []
    for label, own in groups.items():
        means = (_mean(x["values"][name] for x in own) for name in _NEEDLE)
        rows.append((label, *(f"{mean:.3f}" for mean in means)))
    section.table(("variant", "tokens right", "answers right", "loss of the answer [nat]"), rows)


def _depths_by_lengths(
    title: str,
    values: list[list[float | None]],
    depths: Sequence[float],
    lengths: Sequence[int],
) -> Any:
    """One cell per depth and length, its value in it."""
    x_labels = [f"{length:,}" for length in lengths]
    y_labels = [f"{100 * depth:.0f}" for depth in depths]
    figure = heat_map(
        title,
        values,
        Axis("length", "tokens"),
        Axis("depth", "%"),
        "right",
        x_labels=x_labels,
        y_labels=y_labels,
        limits=(0.0, 1.0),
        height=110 + 30 * len(depths),
    )
    figure["data"][0]["showscale"] = False
    style = figure["layout"]
    for axis in ("xaxis", "yaxis"):
        style[axis] |= {"type": "category", "ticks": "", "showline": False, "showgrid": False}
    style["annotations"] = [
        {
            "x": column,
            "y": row,
            "text": f"{value:.2g}",
            "showarrow": False,
            "font": {"size": 12, "color": "#fff" if value > 0.5 else "#1d2330"},
        }
        for row, line in enumerate(values)
        for column, value in enumerate(line)
        if value is not None
    ]
    return figure


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
                    _megabytes(v, "host_bytes"),
                    _megabytes(v, "fetched_bytes"),
                    f"{v['same_tokens']} of {v['new_tokens']}",
                )
            )
    header = ("variant", "first token [s]", "tokens/s", "cache [MB]", "cache at the end [MB]")
    caption = (
        "On the host: keys and values that lie there behind the prompt; fetched: what one token brings "
        "from there. As exact: tokens until the first that exact attention would not have written."
    )
    moved = "on the host [MB]", "fetched [MB]"
    section.table((*header, *moved, "as exact"), rows, caption)


STAGES = {
    "teacher": "as it was",
    "untrained": "new layers",
    "layers": "layers taught",
    "logits": "logits taught",
}


def _conversion(page: Page, found: list[Line]) -> None:
    section = page.section(
        "Other attention in its layers",
        "New layers in the place of old ones learn first the output of the layer that was there, then all "
        "together the logits. Losses are those of text that was held out.",
    )
    layers, logits = [], []
    for line in found:
        curves = line["values"]["layer_curves"].values()
        mean = [sum(step) / len(step) for step in zip(*curves, strict=True)]
        layers.append(Series(line["variant"], list(range(1, len(mean) + 1)), mean))
        curve = line["values"]["logit_curve"]
        logits.append(Series(line["variant"], list(range(1, len(curve) + 1)), curve))
    error = Axis("relative squared error", log=True)
    section.figure(
        lines("Learning the layers", layers, Axis("step"), error),
        lines("Learning the logits", logits, Axis("step"), Axis("KL divergence", "nat", log=True)),
        caption="Left: relative squared error, mean over the layers. Right: KL(as it was, now).",
    )
    rows = [
        (
            line["variant"],
            ", ".join(map(str, line["values"]["numbers"])),
            *(f"{line['values'][stage]:.3f}" for stage in STAGES),
            f"{line['seconds']:.0f}",
        )
        for line in found
    ]
    header = ("kind", "layers", *(f"{title} [nat]" for title in STAGES.values()), "seconds")
    section.table(header, rows, text_columns=2)


def _pareto(found: list[Line], name: str, title: str, unit: str, heading: str) -> Any:
    exact = [x["values"] for x in _means(found) if x["variant"] == EXACT]
    series: list[Series] = []
    for label, own in _grouped(found, lambda line: str(line["variant"])).items():
        points = sorted(
            (x["values"]["full_layer_bytes"] / 1e6, x["values"][name], _label(x))
            for x in _means(own)
        )
        if label != EXACT and exact and own[0]["budget"] is not None:
            points.append((exact[0]["full_layer_bytes"] / 1e6, exact[0][name], "exact"))
        series.append(
            Series(
                label,
                [point[0] for point in points],
                [point[1] for point in points],
                dashed=len(series) >= len(PALETTE),
                notes=[f"{point[2]}: {point[1]:.4g} at {point[0]:.2f} MB" for point in points],
            )
        )
    x = Axis("cache of layers without a window", "MB")
    figure = lines(heading, series, x, Axis(title, unit), height=480)
    figure["layout"]["yaxis"]["tickformat"] = "~g"
    return figure


def _megabytes(values: dict[str, float], name: str) -> str:
    """Nothing for a line that has no such bytes."""
    return f"{values[name] / 1e6:.2f}" if values.get(name) else ""


def _lengths(found: Iterable[Line]) -> list[int]:
    return sorted({line["length"] for line in found})


def named(name: str, options: dict[str, Any]) -> str:
    """A name and its options: `gna (window=129)`."""
    text = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name} ({text})" if text else name


def _label(line: Line) -> str:
    budget = "" if line["budget"] is None else f", {line['budget']:g}"
    return named(f"{line['variant']}{budget}", line["options"])


def _grouped(found: Iterable[Line], of: Callable[[Line], str]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in found:
        groups.setdefault(of(line), []).append(line)
    return groups


def _means(found: Iterable[Line]) -> list[Line]:
    """One line per label, length and depth: the mean over the parts of the text."""
    groups = _grouped(found, lambda x: f"{_label(x)}|{x['length']}|{x['depth']}")
    return [
        own[0] | {"values": {name: _mean(x["values"][name] for x in own) for name in _shared(own)}}
        for own in groups.values()
    ]


def _shared(found: list[Line]) -> list[str]:
    """Values that all lines have: those of an older file may have fewer."""
    return [name for name in found[0]["values"] if all(name in x["values"] for x in found)]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


_SECTIONS = {
    "loss": _loss,
    "needle": _needle,
    "recall": _recall,
    "speed": _speed,
    "conversion": _conversion,
}
