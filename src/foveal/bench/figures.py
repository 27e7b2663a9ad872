"""Plotly figures as plain data, in one style.  Every axis title carries its unit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

PALETTE = ("#0b7285", "#e8590c", "#5f3dc4", "#868e96", "#2b8a3e", "#c2255c", "#1864ab", "#e67700")
SEQUENTIAL = ((0.0, "#f1f6f8"), (0.35, "#9fd0d9"), (0.7, "#2f94a5"), (1.0, "#083d48"))

_BAR, _GAP, _NAME = 9, 10, 36
"""Height in pixels of a bar, of the gap between groups, of a name of two lines."""

Data = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, in which unit, on which scale."""

    title: str
    unit: str = ""
    log: bool = False
    ticks: Sequence[float] = ()

    def layout(self, values: Iterable[float | None] = ()) -> Data:
        """The axis as plotly wants it; a logarithmic one gets ticks that suit the values."""
        label = f"{self.title} [{self.unit}]" if self.unit else self.title
        style: Data = {"title": {"text": label}, "automargin": True, "linecolor": "#adb5bd"}
        style |= {"gridcolor": "#edf0f4", "zerolinecolor": "#ced4da", "ticks": "outside"}
        style |= {"tickcolor": "#ced4da"}
        ticks = self.ticks
        if self.log:
            style["type"] = "log"
            ticks = ticks or _log_ticks([value for value in values if value])
        if ticks:
            style |= {"tickvals": list(ticks), "ticktext": [f"{tick:,g}" for tick in ticks]}
        return style


@dataclass(frozen=True)
class Series:
    """Points of one line or one group of bars; `low` and `high` bound the spread."""

    name: str
    x: Sequence[Any]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: str | None = None
    dashed: bool = False
    notes: Sequence[str] = ()

    def error_bars(self) -> Data:
        if not self.low:
            return {}
        above = [h - y for h, y in zip(self.high, self.y, strict=True) if y is not None]
        below = [y - lo for lo, y in zip(self.low, self.y, strict=True) if y is not None]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        return {"error_y": bars | {"thickness": 1.2, "width": 3}}


def layout(
    title: str,
    x: Axis,
    y: Axis,
    height: int = 400,
    legend: bool = True,
    series: Sequence[Series] = (),
) -> Data:
    """The common look: title on top left, legend below the plot."""
    heights = [value for each in series for value in (*each.y, *each.low, *each.high)]
    return {
        "title": {"text": title, "x": 0, "xanchor": "left", "font": {"size": 15}},
        "font": {"family": "system-ui, 'Segoe UI', 'Liberation Sans', sans-serif", "size": 13},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 44, "b": 48},
        "xaxis": x.layout([value for each in series for value in each.x] if x.log else ()),
        "yaxis": y.layout(heights),
        "showlegend": legend,
        "legend": {"orientation": "h", "yanchor": "top", "y": -0.3, "x": 0},
        "hoverlabel": {"align": "left"},
    }


def lines(
    title: str, series: Sequence[Series], x: Axis, y: Axis, height: int = 400, legend: bool = True
) -> Data:
    """Lines with points, one per series."""
    data = []
    for index, each in enumerate(series):
        colour = each.colour or PALETTE[index % len(PALETTE)]
        trace: Data = {"type": "scatter", "mode": "lines+markers", "name": each.name}
        trace |= {"x": list(each.x), "y": list(each.y), "marker": {"size": 7, "color": colour}}
        trace |= {"line": {"color": colour, "width": 2, "dash": "dot" if each.dashed else "solid"}}
        data.append(trace | each.error_bars() | _hover(each))
    return {"data": data, "layout": layout(title, x, y, height, legend, series)}


def bars(
    title: str,
    series: Sequence[Series],
    names: Axis,
    values: Axis,
    height: int | None = None,
    legend: bool = True,
) -> Data:
    """Groups of horizontal bars from top to bottom, one colour per series: names stay legible."""
    data = []
    for index, each in enumerate(series):
        colour = each.colour or PALETTE[index % len(PALETTE)]
        trace: Data = {"type": "bar", "orientation": "h", "name": each.name}
        trace |= {"x": list(each.y), "y": list(each.x)}
        pattern = {"shape": "/", "size": 5, "fillmode": "replace"} if each.dashed else {}
        trace |= {"marker": {"color": colour, "pattern": pattern}}
        if spread := each.error_bars():
            trace["error_x"] = spread["error_y"]
        data.append(trace | _hover(each))
    groups = len(dict.fromkeys(name for each in series for name in each.x))
    height = height or 130 + groups * max(_BAR * len(series) + _GAP, _NAME)
    style = layout(title, values, names, height, legend) | {"barmode": "group"}
    lengths = [value for each in series for value in (*each.y, *each.low, *each.high)]
    style |= {"xaxis": values.layout(lengths), "bargap": 0.24, "bargroupgap": 0.06}
    style["yaxis"] |= {"autorange": "reversed", "showgrid": False, "ticks": ""}
    style["legend"] |= {"yanchor": "bottom", "y": 1.0, "traceorder": "normal"}
    style["title"] |= {"y": 1.0, "yref": "container", "yanchor": "top", "pad": {"t": 12}}
    style["margin"] |= {"t": 76}
    return {"data": data, "layout": style}


def heat_map(
    title: str,
    values: Sequence[Sequence[float | None]],
    x: Axis,
    y: Axis,
    unit: str,
    *,
    x_labels: Sequence[Any] | None = None,
    y_labels: Sequence[Any] | None = None,
    limits: tuple[float, float] | None = None,
    height: int = 400,
) -> Data:
    """A matrix as colours, first row on top; `unit` labels the colour bar."""
    trace: Data = {"type": "heatmap", "z": values, "colorscale": [list(c) for c in SEQUENTIAL]}
    trace |= {"colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 14}}
    trace |= {
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "%{x}, %{y}: %{z:.4g} " + unit + "<extra></extra>",
    }
    for name, labels in (("x", x_labels), ("y", y_labels)):
        if labels is not None:
            trace[name] = list(labels)
    if limits is not None:
        trace |= {"zmin": limits[0], "zmax": limits[1]}
    style = layout(title, x, y, height, legend=False)
    style["yaxis"] |= {"autorange": "reversed", "gridcolor": "#fff"}
    style["xaxis"] |= {"gridcolor": "#fff"}
    return {"data": [trace], "layout": style}


@dataclass(frozen=True)
class Cell:
    """A cell of a labelled map: its value (None: no colour), what stands in it, and a note to hover."""

    value: float | None
    text: str
    note: str = ""


def labelled_map(
    title: str,
    cells: Sequence[Sequence[Cell]],
    x: Axis,
    y: Axis,
    unit: str,
    *,
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    height: int = 400,
) -> Data:
    """A heat map with a text in every cell; grey text where there is no value."""
    values = [[cell.value for cell in row] for row in cells]
    known = [value for row in values for value in row if value is not None]
    most = max(known, default=1.0)
    plot = heat_map(
        title, values, x, y, unit, x_labels=x_labels, y_labels=y_labels, limits=(0.0, most)
    )
    plot["data"][0] |= {
        "text": [["<br>".join(textwrap.wrap(cell.note, 70)) for cell in row] for row in cells],
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": True,
    }
    style = plot["layout"] | {"height": height, "plot_bgcolor": "#f4f5f7"}
    plain = {"showgrid": False, "ticks": "", "showline": False, "zeroline": False}
    style["xaxis"] |= plain | {"side": "top", "tickangle": 0, "tickfont": {"size": 10}}
    style["yaxis"] |= plain | {"tickfont": {"size": 12}}
    style["title"] |= {"y": 0.985, "yanchor": "top"}
    style["margin"] |= {"t": 96, "b": 12}
    style["annotations"] = [
        {
            "x": column,
            "y": row,
            "text": cell.text,
            "showarrow": False,
            "font": {"size": 12 if cell.value is not None else 10.5, "color": _ink(cell, most)},
        }
        for row, line in enumerate(cells)
        for column, cell in enumerate(line)
    ]
    return {"data": plot["data"], "layout": style}


def _ink(cell: Cell, most: float) -> str:
    """A colour that is legible on the cell."""
    if cell.value is None:
        return "#8a93a3"
    return "#fff" if cell.value > 0.5 * most else "#1d2330"


def _log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5, 10, ... over the values; only powers of ten when they span four decades."""
    if not values:
        return []
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1,) if last - first > 4 else (1, 2, 5)
    return [step * 10.0**power for power in range(first, last + 1) for step in steps]


def _hover(series: Series) -> Data:
    if not series.notes:
        return {}
    return {"text": list(series.notes), "hovertemplate": "%{text}<extra>%{fullData.name}</extra>"}
