"""The page that shows what was found: pictures, heat maps, plots, and a reading in plain words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.first_hour.folder import Result, RunFolder
from examples.first_hour.heads import (
    BLOCK,
    BUDGETS,
    PATTERNS,
    SINK_TOKENS,
    SINKS,
    STRIDED,
    TOP_BLOCKS,
    WINDOW,
)
from examples.first_hour.image import PATCH, SIGMA
from foveal.bench import report as bench_report
from foveal.bench.figures import Axis, Data, Series, heat_map, lines
from foveal.bench.measure import summarise
from foveal.bench.page import Page
from foveal.bench.record import Record

_SHOWN_WINDOW = 13
_SHOWN_BUDGET = 128
_PEER = "scikit-image"


@dataclass(frozen=True)
class Results:
    """What the stages found; no language model: `capture` None, and `skipped` says why."""

    environment: dict[str, Any]
    image: Result
    capture: Result | None
    layers: list[Result]
    speed: list[Record]
    skipped: str | None


def build(folder: RunFolder, results: Results) -> Page:
    """The whole report."""
    page = Page("foveal on real input", _summary(results), facts=_facts(results))
    _image(page, folder, results.image)
    if results.capture is None:
        page.section("A language model", results.skipped or "")
    else:
        _language_model(page, results.capture, results.layers)
    _speed(page, results.speed)
    return page


def _summary(results: Results) -> str:
    row = _row(results.image, _SHOWN_WINDOW)["foveal"]
    text = (
        f"A photograph denoised with `fv.attend` (from {results.image['psnr']:.1f} to "
        f"{row['psnr']:.1f} dB in {_median(row):.2g} s)"
    )
    if results.layers:
        text += ", what 72 heads of Gemma-3 270M look at when they read Python's documentation"
    return text + ", and the speed on both shapes. Every number was measured by this run."


def _facts(results: Results) -> list[tuple[str, str]]:
    names = {"device_name": "device", "threads": "threads", "cores": "cores", "load": "load"}
    names |= {"python": "Python", "torch": "PyTorch", "foveal": "foveal", "commit": "commit"}
    facts = [(title, str(results.environment[name])) for name, title in names.items()]
    return [*facts, ("command", "`make demo`")]


def _row(image: Result, window: int) -> Result:
    return next(dict(row) for row in image["windows"] if row["window"] == window)


def _median(entry: Result) -> float:
    return summarise(entry["seconds"]).median


def _image(page: Page, folder: RunFolder, image: Result) -> None:
    height, width, _ = image["shape"]
    shown = _row(image, _SHOWN_WINDOW)
    mask = (height * width) ** 2
    section = page.section(
        "A photograph: non-local means is attention",
        f"Each pixel becomes the mean of the pixels around it whose surroundings look alike. "
        f"Patches of {PATCH}x{PATCH}x3 numbers are queries and keys (D = {3 * PATCH**2}), pixels "
        f"are values (Dv = 3), the weight is a Gaussian of the distance of two patches, and a "
        f"`Neighborhood` bounds the search. The picture has {height}x{width} pixels and white "
        f"noise of standard deviation {SIGMA}. A mask for masked attention would take "
        f"{mask / 1e9:.0f} GB here.",
    )

    def picture(label: str, name: str) -> tuple[str, bytes]:
        return label, (folder.path / f"{name}.png").read_bytes()

    noisy = f"noisy, {image['psnr']:.2f} dB"
    ours, theirs = (f"{name}, {shown[name]['psnr']:.2f} dB" for name in ("foveal", _PEER))
    own = f"foveal-{_SHOWN_WINDOW}"
    section.picture(picture("clean", "clean"), picture(noisy, "noisy"), picture(ours, own))
    section.picture(
        picture(noisy, "noisy-crop"),
        picture(ours, f"{own}-crop"),
        picture(theirs, f"{_PEER}-{_SHOWN_WINDOW}-crop"),
        caption=f"A window of {_SHOWN_WINDOW}x{_SHOWN_WINDOW}; the second row is a detail. PSNR "
        "is of the whole picture.",
    )
    section.figure(_psnr_against_time(image["windows"]))
    section.table(
        ("window", "foveal", "time", "peak", _PEER, "time", "peak"),
        [
            (f"{row['window']}x{row['window']}", *_cells(row["foveal"]), *_cells(row[_PEER]))
            for row in image["windows"]
        ],
        caption=f"{_PEER}'s `denoise_nl_means` in its fast mode is made for this one task: running "
        "sums share the distances of overlapping patches, on one thread. `attend` knows nothing of "
        "that and computes every distance anew. Each keeps one bandwidth for all windows: the one "
        f"of {_PEER}'s own example, and for foveal the best of four on this photograph.",
    )


def _cells(entry: Result) -> tuple[str, str, str]:
    peak = entry["peak_bytes"]
    return (
        f"{entry['psnr']:.2f} dB",
        bench_report.milliseconds(_median(entry)),
        "-" if peak is None else bench_report.megabytes(peak),
    )


def _psnr_against_time(rows: Sequence[Result]) -> Data:
    series = [
        Series(
            name,
            [_median(row[name]) for row in rows],
            [row[name]["psnr"] for row in rows],
            notes=[f"window {row['window']}: {row[name]['psnr']:.2f} dB" for row in rows],
        )
        for name in ("foveal", _PEER)
    ]
    return lines(
        "Quality against time; points are windows of 7, 13 and 21",
        series,
        Axis("time", "s"),
        Axis("PSNR", "dB"),
    )


def _language_model(page: Page, capture: Result, layers: list[Result]) -> None:
    section = page.section(
        "A language model: what the heads look at",
        f"Gemma-3 270M read the first {capture['tokens']:,} tokens of Python's own documentation, "
        "with `fv.attend` as its attention in every layer; its last hidden state differs from that "
        f"of PyTorch's attention by {capture['largest_difference']:.0e} of the largest value. From "
        "the q, k and v of that pass: if every query of a head may keep only so many keys, how "
        "much of its softmax is still there, and how far does its output move?\n\n"
        f"Four patterns share one budget. `{WINDOW}`: the nearest keys. `{SINKS}`: the nearest "
        f"keys and the first {SINK_TOKENS} of the text. `{STRIDED}`: half the budget on the "
        f"nearest keys, half on every s-th key before. `{TOP_BLOCKS}`: the blocks of "
        f"{BLOCK}x{BLOCK} with the largest true mass, per head. That last one is an oracle: it "
        "needs the exact attention to find them, so it is an upper bound for methods that choose "
        "blocks, not a method. A layer with a window of its own (512) is compared with that "
        "window, a full layer with all earlier tokens.",
    )
    section.prose(_reading(layers))
    section.figure(_map(layers, "mass"), _map(layers, "error"), caption=_map_caption())
    section.figure(
        _budget_lines(_of_kind(layers, full=False), "Layers with a window of 512"),
        _budget_lines(_of_kind(layers, full=True), "Full layers"),
        caption="Mean over the heads. A query sees "
        f"{_of_kind(layers, full=False)[0]['keys']:.0f} keys on average in a layer with a window, "
        f"{_of_kind(layers, full=True)[0]['keys']:.0f} in a full one.",
    )
    rows: list[tuple[str, ...] | str] = []
    for full, title in ((False, "layers with a window of 512"), (True, "full layers")):
        group = _of_kind(layers, full)
        rows += [f"{len(group)} {title}", *(_pattern_row(group, each) for each in PATTERNS)]
    section.table(
        ("pattern", "keys", "mass", "error"),
        rows,
        caption=f"Mean over the heads at a budget of {_SHOWN_BUDGET}. Keys: pairs really kept, per "
        "query; the first queries of the text have fewer than the budget, and blocks on the "
        "diagonal count half.",
    )


def _of_kind(layers: list[Result], full: bool) -> list[Result]:
    return [layer for layer in layers if (layer["window"] is None) == full]


def _values(
    layers: Iterable[Result], pattern: str, field: str, budget: int = _SHOWN_BUDGET
) -> list[float]:
    """One number per head of these layers."""
    return [
        value
        for layer in layers
        for row in layer["rows"]
        if row["pattern"] == pattern and row["budget"] == budget
        for value in row[field]
    ]


def _mean(layers: list[Result], pattern: str, field: str = "mass") -> float:
    return statistics.fmean(_values(layers, pattern, field))


def _reading(layers: list[Result]) -> str:
    """What the maps show, in sentences whose numbers come from this run."""
    local, full = _of_kind(layers, full=False), _of_kind(layers, full=True)
    share = f"{_SHOWN_BUDGET} keys"
    window = _values(layers, WINDOW, "mass")
    error = _values(layers, WINDOW, "error")
    gain = _mean(full, SINKS) - _mean(full, WINDOW)
    stride = _mean(layers, STRIDED) - _mean(layers, WINDOW)
    ceiling = {name: _mean(group, TOP_BLOCKS) for name, group in (("local", local), ("full", full))}
    return (
        f"What is seen. With {share} per query a plain window keeps {_mean(local, WINDOW):.0%} of "
        f"the softmax in the layers that have a window of their own and {_mean(full, WINDOW):.0%} "
        f"in the full ones; single heads range from {min(window):.0%} to {max(window):.0%}. "
        f"The first {SINK_TOKENS} tokens of the text {'add' if gain > 0 else 'change'} "
        f"{abs(gain):.0%} of the mass in the full layers: much of it rests where the text begins. "
        f"Spending half the budget on distant keys at a fixed stride "
        f"{'costs' if stride < 0 else 'gains'} {abs(stride):.1%} of the mass against the window. "
        f"The best blocks keep {ceiling['local']:.0%} and {ceiling['full']:.0%}: much of "
        f"what a window misses lies in few blocks, if one knew which. Mass is not error: "
        f"under the window {sum(e > 1 for e in error)} of {len(error)} heads lose an output as "
        f"large as the output itself (error above 1): rows are renormalised over what is kept."
    )


def _map(layers: list[Result], field: str) -> Data:
    """Layers downwards, the heads of each pattern side by side."""
    heads = len(layers[0]["rows"][0][field])
    values, hover = [], []
    for index, layer in enumerate(layers):
        row: list[float | None] = []
        notes = []
        for pattern in PATTERNS:
            found = _values([layer], pattern, field)
            row += [*found, None]
            notes += [f"{pattern}<br>layer {index}, head {h}: {x:.3f}" for h, x in enumerate(found)]
            notes.append("")
        values.append(row[:-1])
        hover.append(notes[:-1])
    titles = {"mass": "Share of the softmax that is kept", "error": "Relative output error"}
    figure = heat_map(
        f"{titles[field]}, {_SHOWN_BUDGET} keys per query",
        values,
        Axis(f"pattern, {heads} heads each"),
        Axis("layer"),
        field,
        limits=(0.0, 1.0),
        height=520,
    )
    centres = [(heads + 1) * i + (heads - 1) / 2 for i in range(len(PATTERNS))]
    names = [pattern.replace(" + ", "<br>+ ").replace("k b", "k<br>b") for pattern in PATTERNS]
    rows = [f"{i} full" if layer["window"] is None else f"{i}" for i, layer in enumerate(layers)]
    figure["layout"]["xaxis"] |= {"tickvals": centres, "ticktext": names, "ticks": ""}
    figure["layout"]["yaxis"] |= {"tickvals": list(range(len(layers))), "ticktext": rows}
    figure["data"][0] |= {"text": hover, "hovertemplate": "%{text}<extra></extra>"}
    return figure


def _map_caption() -> str:
    return (
        "Rows are layers, a column is a head. Error: |o - o kept| / |o| of a head; 1 and above have "
        "one colour."
    )


def _budget_lines(layers: list[Result], title: str) -> Data:
    def mean(pattern: str, field: str, budget: int) -> float:
        return statistics.fmean(_values(layers, pattern, field, budget))

    series = [
        Series(
            pattern + (" (oracle)" if pattern == TOP_BLOCKS else ""),
            [mean(pattern, "keys", budget) for budget in BUDGETS],
            [mean(pattern, "mass", budget) for budget in BUDGETS],
            dashed=pattern == TOP_BLOCKS,
            notes=[f"budget {budget}" for budget in BUDGETS],
        )
        for pattern in PATTERNS
    ]
    x = Axis("keys kept per query", "keys", log=True, ticks=BUDGETS)
    figure = lines(title, series, x, Axis("share of the softmax kept"), height=380)
    figure["layout"]["yaxis"] |= {"range": [0, 1]}
    return figure


def _pattern_row(layers: list[Result], pattern: str) -> tuple[str, ...]:
    formats: dict[str, Callable[[float], str]] = {
        "keys": "{:.0f}".format,
        "mass": "{:.1%}".format,
        "error": "{:.2f}".format,
    }
    return (pattern, *(shown(_mean(layers, pattern, name)) for name, shown in formats.items()))


def _speed(page: Page, records: list[Record]) -> None:
    """The sections of the benchmark report, under this page's titles."""
    measured = bench_report.html(records)
    page.section(
        "Speed on both shapes",
        "Crops of the photograph, one head with patches of 75 and pixels of 3, forward; and the "
        "sliding layer of the language model, 4 query heads on 1 key head of 256, with its window "
        "of 512, forward and backward. " + measured.summary,
    )
    for section in measured.sections:
        section.title = f"Speed: {section.title[0].lower()}{section.title[1:]}"
    page.sections += measured.sections
