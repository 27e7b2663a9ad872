"""Draws a pattern: which tiles it visits, and what single queries see.  SVG, written by hand."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor

from foveal._errors import MissingDependencyError, PatternError
from foveal.patterns.base import FULL, PARTIAL, Extent, Pattern, per_axis
from foveal.probe.visits import Visits, visible, visits

WIDTH, HEIGHT = 960, 640

# Told apart by lightness alone, and with every common colour blindness.
_FULL, _PARTIAL, _HIDDEN, _SKIPPED = "#1c5d99", "#f0a52b", "#fbe3b4", "#edf0f3"
_SEEN, _QUERY, _CUT = "#4f9bd4", "#b8321a", "#5b6570"
_INK, _SOFT = "#1d242b", "#5b6570"

_MAP_X, _TOP, _MAP = 76, 148, 428
_SIDE_X, _SIDE = 560, 368
_MOST_ELEMENTS = 160
_MOST_SLICES = 8


def picture(
    pattern: Pattern,
    q_grid: int | tuple[int, ...],
    kv_grid: int | tuple[int, ...] | None = None,
    title: str | None = None,
    caption: str = "",
) -> str:
    """The pattern as one SVG document: its map of tiles, three queries with their keys, counts.

    Options: q_grid and kv_grid in tokens per axis (an integer is one axis; kv_grid None: the grid
    of the queries); title, by default the class of the pattern, and a caption beside it.
    Data-dependent patterns show the first head of the first batch entry.  Tiles are chosen for the
    eye: `explain` tells those of an engine.
    Limits: raises PatternError where the pattern does not fit the grid.
    """
    q_grid = per_axis(q_grid, 1)
    extent = Extent(q_grid, q_grid if kv_grid is None else per_axis(kv_grid, 1))
    pattern.validate(extent)
    if not extent.Lq or not extent.Lk:
        raise PatternError("grid", q_grid, "at least one query and one key are needed")
    small = max(extent.Lq, extent.Lk) <= _MOST_ELEMENTS
    shown = visits(pattern, extent, with_elements=small)
    body = [
        *_title(title or type(pattern).__name__, caption),
        *_header(pattern, extent, shown),
        *_map_panel(shown, extent),
    ]
    if len(extent.kv_grid) == 1:
        below = _strips(pattern, extent, body)
    elif len(extent.kv_grid) == 2:
        below = _fields(pattern, extent, body)
    else:
        below = _slices(pattern, extent, body)
    body.extend(_legend(shown, extent, below))
    return _document(body)


def write_png(svg: str, path: Path) -> None:
    """Converts a picture with cairosvg, rsvg-convert or a headless Chromium, whichever is there."""
    for convert in (_with_cairosvg, _with_rsvg, _with_chromium):
        if convert(svg, path):
            return
    raise MissingDependencyError("cairosvg", "writing a PNG", "png")


def _title(title: str, caption: str) -> list[str]:
    title = _shortened(title, 62)
    name = escape(title)
    rest = escape(_shortened(caption, 118 - 2 * len(title))) if len(title) < 50 else ""
    beside = f'<tspan dx="14" font-size="13" font-weight="400" fill="{_SOFT}">{rest}</tspan>'
    return [
        f'<text x="32" y="46" font-size="22" font-weight="600">{name}{beside if rest else ""}</text>'
    ]


def _header(pattern: Pattern, extent: Extent, shown: Visits) -> list[str]:
    lines = [_text(32, 74, _shortened(pattern.key, 112), size=13, fill=_SOFT, mono=True)]
    queries, keys = _by(extent.q_grid), _by(extent.kv_grid)
    tokens = f"{queries} tokens" if queries == keys else f"{queries} queries, {keys} keys"
    order = ""
    if shown.parts > 1:
        order = f"; sorted into {shown.parts} groups that are attended one by one"
    if shown.k_edges[-1] > extent.Lk:
        order += "; keys across the border are repeated"
    if pattern.depends_on_data:
        order += "; the first of the heads"
    lines.append(_text(32, 98, f"{tokens}{order}", size=13, fill=_SOFT))
    return lines


def _map_panel(shown: Visits, extent: Extent) -> list[str]:
    q_total, k_total = shown.q_edges[-1], shown.k_edges[-1]
    scale = _MAP / max(q_total, k_total)
    width, height = k_total * scale, max(q_total * scale, 24.0)
    x_scale, y_scale = width / k_total, height / q_total
    lines = [_rect(_MAP_X, _TOP, width, height, _SKIPPED)]
    group = f'<g transform="translate({_MAP_X} {_TOP}) scale({x_scale:.6g} {y_scale:.6g})">'
    lines.append(group)
    lines.append(_cells(shown.states == FULL, shown.k_edges, shown.q_edges, _FULL))
    partial = shown.states == PARTIAL
    if shown.elements is None:
        lines.append(_cells(partial, shown.k_edges, shown.q_edges, _PARTIAL))
    else:
        lines.append(_cells(partial, shown.k_edges, shown.q_edges, _HIDDEN))
        inside = _spread(partial, shown) & shown.elements
        unit = range(k_total + 1), range(q_total + 1)
        lines.append(_cells(inside, unit[0], unit[1], _PARTIAL))
    lines.append("</g>")
    thick = 1.0 if width / max(len(shown.k_edges), 1) > 8 else 0.5
    columns = [_MAP_X + edge * x_scale for edge in shown.k_edges[1:-1]]
    rows = [_TOP + edge * y_scale for edge in shown.q_edges[1:-1]]
    lines.append(_grid_lines(_MAP_X, _TOP, width, height, columns, rows, "#fff", thick))
    cut_columns = [_MAP_X + edge * x_scale for edge in shown.k_cuts]
    cut_rows = [_TOP + edge * y_scale for edge in shown.q_cuts]
    if len(cut_rows) <= 24:
        lines.append(_grid_lines(_MAP_X, _TOP, width, height, cut_columns, cut_rows, _CUT, 0.6))
    lines.append(_frame(_MAP_X, _TOP, width, height))
    keys = f"{k_total:,} keys, tiles of {_by(shown.kv_tile)}"
    queries = f"{q_total:,} queries, tiles of {_by(shown.q_tile)}"
    raster = len(extent.kv_grid) == 1 and shown.parts == 1 and k_total == extent.Lk
    if raster:
        for tick in _ticks(k_total):
            lines.append(_text(_MAP_X + tick * x_scale, _TOP - 8, str(tick), 11, anchor="middle"))
        if height > 60:
            for tick in _ticks(q_total):
                y = _TOP + tick * y_scale + 4
                lines.append(_text(_MAP_X - 8, y, str(tick), 11, anchor="end"))
    above = _TOP - (26 if raster else 10)
    lines.append(_text(_MAP_X + width / 2, above, f"{keys} \N{RIGHTWARDS ARROW}", anchor="middle"))
    if height > 160:
        x, y = _MAP_X - (16 + 7 * len(str(q_total)) if raster else 14), _TOP + height / 2
        turned = f'transform="rotate(-90 {x:.4g} {y:.4g})"'
        label = f"\N{LEFTWARDS ARROW} {queries}"
        lines.append(_text(x, y, label, anchor="middle", extra=turned))
    else:
        lines.append(_text(_MAP_X, _TOP + height + 20, f"{queries} \N{DOWNWARDS ARROW}"))
    return lines


def _spread(tiles: Tensor, shown: Visits) -> Tensor:
    """A value per tile as a value per element.  bool [Lq, Lk]"""
    rows = torch.tensor([b - a for a, b in pairwise(shown.q_edges)])
    columns = torch.tensor([b - a for a, b in pairwise(shown.k_edges)])
    return tiles.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _strips(pattern: Pattern, extent: Extent, body: list[str]) -> float:
    """One axis: three queries, each with its keys on a strip; returns where free space begins."""
    body.append(_text(_SIDE_X, _TOP - 10, "what one query sees", weight=600))
    y, shift = _TOP + 8.0, extent.Lk - extent.Lq
    chosen = (("first", 0), ("middle", extent.Lq // 2), ("last", extent.Lq - 1))
    step = _SIDE / extent.Lk
    for name, query in chosen:
        place = query + shift
        keys = visible(pattern, torch.tensor([place]), extent)
        count = int(keys.sum())
        body.append(_text(_SIDE_X, y + 10, f"{name}: query {query} sees {_count(count, 'key')}"))
        body.append(_rect(_SIDE_X, y + 18, _SIDE, 22, _SKIPPED))
        body.append(f'<g transform="translate({_SIDE_X} {y + 18:.4g}) scale({step:.6g} 22)">')
        body.append(_cells(keys, range(extent.Lk + 1), (0, 1), _SEEN))
        body.append("</g>")
        if step >= 4:
            lines = [_SIDE_X + step * column for column in range(1, extent.Lk)]
            body.append(_grid_lines(_SIDE_X, y + 18, _SIDE, 22, lines, [], "#fff", 0.6))
        body.append(_query_mark(_SIDE_X + step * place, y + 18, step, 22))
        y += 64
    return y + 4


def _fields(pattern: Pattern, extent: Extent, body: list[str]) -> float:
    """Two axes: three queries, each with its keys on the grid; the legend stands fourth."""
    rows, columns = extent.kv_grid
    room = 168.0
    cell = min(room / rows, room / columns)
    body.append(_text(_SIDE_X, _TOP - 28, "what one query sees", weight=600))
    places = ((_SIDE_X, _TOP), (_SIDE_X + 200, _TOP), (_SIDE_X, _TOP + 214))
    for (name, query), (x, y) in zip(_chosen(extent.kv_grid), places, strict=True):
        keys = visible(pattern, _flat(query, extent.kv_grid), extent).view(rows, columns)
        label = f"{name}: {_count(int(keys.sum()), 'key')}"
        body.append(_text(x, y - 7, label))
        _field(body, x, y, cell, keys, query)
    return _TOP + 214


def _slices(pattern: Pattern, extent: Extent, body: list[str]) -> float:
    """Three axes: per query one row of slices along the first axis."""
    depth, rows, columns = extent.kv_grid
    body.append(_text(_SIDE_X, _TOP - 10, "what one query sees, slice by slice", weight=600))
    shown = min(depth, _MOST_SLICES)
    gap = 5.0
    side = min((_SIDE - gap * (shown - 1)) / shown, 74.0)
    cell = min(side / columns, side / rows)
    y = _TOP + 14.0
    for name, query in _chosen(extent.kv_grid):
        keys = visible(pattern, _flat(query, extent.kv_grid), extent).view(extent.kv_grid)
        first = min(max(query[0] - shown // 2, 0), depth - shown)
        span = f", slices {first} to {first + shown - 1}" if shown < depth else ""
        body.append(_text(_SIDE_X, y, f"{name}: {_count(int(keys.sum()), 'key')}{span}"))
        for place in range(first, first + shown):
            x = _SIDE_X + (place - first) * (columns * cell + gap)
            own = query[1:] if place == query[0] else None
            _field(body, x, y + 8, cell, keys[place], own)
        y += 8 + rows * cell + 26
    return y + 4


def _field(
    body: list[str], x: float, y: float, cell: float, keys: Tensor, query: Sequence[int] | None
) -> None:
    rows, columns = keys.shape
    body.append(_rect(x, y, columns * cell, rows * cell, _SKIPPED))
    body.append(f'<g transform="translate({x:.5g} {y:.5g}) scale({cell:.6g})">')
    body.append(_cells(keys, range(columns + 1), range(rows + 1), _SEEN))
    body.append("</g>")
    if cell >= 4:
        across = [x + cell * column for column in range(1, columns)]
        down = [y + cell * row for row in range(1, rows)]
        thick = 0.8 if cell >= 6 else 0.4
        body.append(_grid_lines(x, y, columns * cell, rows * cell, across, down, "#fff", thick))
    if query is not None:
        body.append(_query_mark(x + cell * query[1], y + cell * query[0], cell, cell))


def _chosen(grid: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    middle = tuple(length // 2 for length in grid)
    border = (*middle[:-1], grid[-1] - 1)
    return (("middle", middle), ("border", border), ("corner", (0,) * len(grid)))


def _flat(place: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    index = 0
    for coordinate, length in zip(place, grid, strict=True):
        index = index * length + coordinate
    return torch.tensor([index])


def _legend(shown: Visits, extent: Extent, below: float) -> list[str]:
    in_corner = len(extent.kv_grid) == 2
    x = _SIDE_X + (200 if in_corner else 0)
    y = below - 7 if in_corner else below + 16
    entries = [(_FULL, "full", shown.full), (_PARTIAL, "partial", shown.partial)]
    entries += [(_SKIPPED, "skipped", shown.skipped)]
    lines = [_text(x, y, "tiles", weight=600)]
    y += 10
    for colour, name, count in entries:
        lines.append(_rect(x, y, 14, 14, colour, stroke=colour == _SKIPPED))
        lines.append(_text(x + 22, y + 12, name))
        lines.append(_text(x + 168, y + 12, f"{count:,}", anchor="end"))
        y += 21
    density = shown.pairs / (extent.Lq * extent.Lk)
    visited = (shown.full + shown.partial) / max(shown.total, 1)
    lines.append(_text(x, y + 13, f"visits {visited:.1%} of the tiles"))
    lines.append(_text(x, y + 33, f"for {density:.1%} of the pairs"))
    x, y = (x, y + 50) if in_corner else (_SIDE_X + 200, below + 26)
    keys = [(_SEEN, "key that it sees"), (_QUERY, "the query")]
    if shown.elements is not None and shown.partial:
        keys.append((_HIDDEN, "hidden in a partial tile"))
    for colour, name in keys:
        lines.append(_rect(x, y, 14, 14, colour))
        lines.append(_text(x + 22, y + 12, name))
        y += 21
    return lines


def _cells(mask: Tensor, x_edges: Sequence[int], y_edges: Sequence[int], fill: str) -> str:
    """The true cells of a matrix as one path of rectangles, merged along rows and columns."""
    open_runs: dict[tuple[int, int], int] = {}
    rectangles: list[tuple[int, int, int, int]] = []
    for row, values in enumerate([*mask.tolist(), []]):
        runs = set(_runs(values))
        for run in [run for run in open_runs if run not in runs]:
            rectangles.append((*run, open_runs.pop(run), row))
        for run in runs:
            open_runs.setdefault(run, row)
    steps = []
    for left, right, top, bottom in sorted(rectangles, key=lambda r: (r[2], r[0])):
        x, y = x_edges[left], y_edges[top]
        width, height = x_edges[right] - x, y_edges[bottom] - y
        steps.append(f"M{x} {y}h{width}v{height}h-{width}z")
    return f'<path fill="{fill}" d="{"".join(steps)}"/>' if steps else ""


def _runs(values: Iterable[bool]) -> Iterable[tuple[int, int]]:
    """Half-open intervals of consecutive true values."""
    start: int | None = None
    for place, value in enumerate([*values, False]):
        if value and start is None:
            start = place
        elif not value and start is not None:
            yield start, place
            start = None


def _grid_lines(
    x: float,
    y: float,
    width: float,
    height: float,
    columns: Sequence[float],
    rows: Sequence[float],
    colour: str,
    thick: float,
) -> str:
    steps = [f"M{_px(column)} {_px(y)}v{_px(height)}" for column in columns]
    steps += [f"M{_px(x)} {_px(row)}h{_px(width)}" for row in rows]
    if not steps:
        return ""
    return f'<path stroke="{colour}" stroke-width="{thick}" d="{"".join(steps)}"/>'


def _query_mark(x: float, y: float, width: float, height: float) -> str:
    """A frame around a query, never smaller than the eye finds."""
    grow_x, grow_y = max(0.0, (6 - width) / 2), max(0.0, (6 - height) / 2)
    box = (x - grow_x, y - grow_y, width + 2 * grow_x, height + 2 * grow_y)
    left, top, across, down = (_px(value) for value in box)
    return (
        f'<rect x="{left}" y="{top}" width="{across}" height="{down}" rx="1" '
        f'fill="{_QUERY}" stroke="#fff" stroke-width="1"/>'
    )


def _frame(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect x="{_px(x)}" y="{_px(y)}" width="{_px(width)}" height="{_px(height)}" '
        f'fill="none" stroke="{_SOFT}" stroke-width="0.8"/>'
    )


def _rect(x: float, y: float, width: float, height: float, fill: str, stroke: bool = False) -> str:
    line = f' stroke="{_SOFT}" stroke-width="0.6"' if stroke else ""
    return (
        f'<rect x="{_px(x)}" y="{_px(y)}" width="{_px(width)}" height="{_px(height)}" '
        f'fill="{fill}"{line}/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    size: int = 13,
    weight: int = 400,
    fill: str = _INK,
    anchor: str = "start",
    mono: bool = False,
    extra: str = "",
) -> str:
    style = [f'x="{_px(x)}" y="{_px(y)}"']
    if size != 13:
        style.append(f'font-size="{size}"')
    if weight != 400:
        style.append(f'font-weight="{weight}"')
    if fill != _INK:
        style.append(f'fill="{fill}"')
    if anchor != "start":
        style.append(f'text-anchor="{anchor}"')
    if mono:
        style.append('font-family="ui-monospace,DejaVu Sans Mono,monospace"')
    if extra:
        style.append(extra)
    return f"<text {' '.join(style)}>{escape(text)}</text>"


def _document(body: list[str]) -> str:
    inside = "\n".join(line for line in body if line)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" fill="none" font-size="13" '
        f'font-family="system-ui,-apple-system,Segoe UI,DejaVu Sans,sans-serif">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>\n'
        f'<g fill="{_INK}">\n{inside}\n</g>\n</svg>\n'
    )


def _ticks(length: int) -> list[int]:
    """About five round numbers from 0 to the length."""
    steps = (base * 10**power for power, base in product(range(9), (1, 2, 4, 8)))
    step = next(step for step in steps if length / step <= 8)
    return [*range(0, length, step)]


def _by(sides: tuple[int, ...]) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(str(side) for side in sides)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _with_cairosvg(svg: str, path: Path) -> bool:
    try:
        cairosvg = importlib.import_module("cairosvg")
    except (ImportError, OSError):  # OSError: the package is there, the cairo library is not
        return False
    cairosvg.svg2png(bytestring=svg.encode(), write_to=str(path), scale=2)
    return True


def _with_rsvg(svg: str, path: Path) -> bool:
    program = shutil.which("rsvg-convert")
    if program is None:
        return False
    command = [program, "--zoom", "2", "--output", str(path)]
    subprocess.run(command, input=svg.encode(), check=True, capture_output=True)
    return True


def _with_chromium(svg: str, path: Path) -> bool:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "picture.svg")
        page.write_text(svg)
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--force-device-scale-factor=2",
            f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={path.absolute()}",
        )
        command = [program, *options, page.as_uri()]
        finished = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return finished.returncode == 0 and path.exists()
