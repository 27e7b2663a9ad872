"""One self-contained HTML file: prose, tables, pictures and interactive plots, no network.

    page = Page("Denoising", "Non-local means with a window of 13")
    section = page.section("Speed", "Median of paired samples.")
    section.figure(figures.lines(...), caption="Lower is better.")
    section.table(("system", "time"), [("foveal", "74 ms")])
    section.picture("noisy", png_bytes)
    page.write("report.html")

plotly.js is written into the file once and only when a figure asks for it.  The file carries a
content security policy that forbids every connection, so it cannot reach a network by mistake.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal._errors import MissingDependencyError

Figure = Mapping[str, Any]
"""A plotly figure as plain data: {"data": [...], "layout": {...}}; see `foveal.bench.figures`."""

_PICTURE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"<svg": "image/svg+xml"}


@dataclass
class Section:
    """A titled part of a page; its methods append in reading order."""

    title: str
    blocks: list[str] = field(default_factory=list)
    has_figures: bool = False

    def prose(self, text: str) -> Section:
        """A paragraph; blank lines separate paragraphs, `backticks` mark code."""
        self.blocks += [f"<p>{_inline(part)}</p>" for part in text.split("\n\n") if part.strip()]
        return self

    def figure(self, *figures: Figure, caption: str = "") -> Section:
        """One interactive plot, or several side by side."""
        self.has_figures = True
        cells = "".join(_plot(each) for each in figures)
        self.blocks.append(_captioned(f'<div class="row">{cells}</div>', caption))
        return self

    def table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[object] | str],
        caption: str = "",
        text_columns: int = 1,
    ) -> Section:
        """A table; the first `text_columns` are flush left, the others are aligned as numbers.

        A row that is one string is a heading over the rows that follow.
        """

        def cells(tag: str, row: Sequence[object] | str) -> str:
            if isinstance(row, str):
                return f'<tr><th class="group" colspan="{len(header)}">{_inline(row)}</th></tr>'
            kinds = (' class="text"' if i < text_columns else "" for i in range(len(row)))
            shown = (
                f"<{tag}{k}>{_inline(str(c))}</{tag}>" for k, c in zip(kinds, row, strict=True)
            )
            return "<tr>" + "".join(shown) + "</tr>"

        head, body = cells("th", header), "".join(cells("td", row) for row in rows)
        grid = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
        self.blocks.append(_captioned(f'<div class="wide">{grid}</div>', caption))
        return self

    def picture(self, *pictures: tuple[str, bytes], caption: str = "") -> Section:
        """Pictures side by side, each (label, file content as PNG, JPEG or SVG)."""
        cells = "".join(
            f'<div class="cell"><img alt="{html.escape(label, quote=True)}" '
            f'src="{_data_uri(content)}"><span>{_inline(label)}</span></div>'
            for label, content in pictures
        )
        self.blocks.append(_captioned(f'<div class="row">{cells}</div>', caption))
        return self

    def listing(self, text: str) -> Section:
        """Text as it would stand in a terminal."""
        self.blocks.append(f"<pre>{html.escape(text)}</pre>")
        return self


@dataclass
class Page:
    """A report.  `facts` are (label, value) pairs for the footer: device, versions, command."""

    title: str
    summary: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str, prose: str = "") -> Section:
        self.sections.append(Section(title))
        return self.sections[-1].prose(prose)

    def render(self) -> str:
        plots = any(section.has_figures for section in self.sections)
        links = "".join(
            f'<a href="#s{i}">{html.escape(s.title)}</a>' for i, s in enumerate(self.sections)
        )
        body = "".join(
            f'<section id="s{i}"><h2>{html.escape(s.title)}</h2>{"".join(s.blocks)}</section>'
            for i, s in enumerate(self.sections)
        )
        facts = "".join(
            f"<dt>{_inline(name)}</dt><dd>{_inline(value)}</dd>" for name, value in self.facts
        )
        return _DOCUMENT.format(
            title=html.escape(self.title),
            style=_STYLE,
            library=f"<script>{_plotly_js()}</script>" if plots else "",
            summary=f"<p>{_inline(self.summary)}</p>" if self.summary else "",
            links=f"<nav>{links}</nav>" if len(self.sections) > 1 else "",
            body=body,
            facts=f"<footer><dl>{facts}</dl></footer>" if facts else "",
            script=f"<script>{_SCRIPT}</script>" if plots else "",
        )

    def write(self, path: str | Path) -> Path:
        """Writes the file whole or not at all, and returns its path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        partial.write_text(self.render(), encoding="utf-8")
        return partial.replace(target)


def _inline(text: str) -> str:
    pieces = html.escape(text).split("`")
    if len(pieces) % 2 == 0:
        return "`".join(pieces)
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _captioned(content: str, caption: str) -> str:
    note = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
    return f"<figure>{content}{note}</figure>"


def _data_uri(content: bytes) -> str:
    kind = next((t for magic, t in _PICTURE_TYPES.items() if content.startswith(magic)), None)
    if kind is None:
        raise ValueError("picture: got bytes of an unknown type; PNG, JPEG or SVG is needed")
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _plot(figure: Figure) -> str:
    height = figure.get("layout", {}).get("height", 400)
    text = json.dumps(_plain(figure), allow_nan=False, separators=(",", ":"))
    text = text.replace("</", "<\\/")
    return (
        f'<div class="cell plot" style="height:{height}px">'
        f'<script type="application/json">{text}</script></div>'
    )


def _plain(value: Any) -> Any:
    """JSON data: numbers that are not finite become null, arrays become lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _plotly_js() -> str:
    # The Python half of plotly takes a second to import and is not needed: figures are data.
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        raise MissingDependencyError("plotly", "an HTML report with plots", "report")
    source = Path(found.origin).parent / "package_data" / "plotly.min.js"
    return source.read_text(encoding="utf-8").replace("</script", "<\\/script")


_DOCUMENT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data: blob:">
<link rel="icon" href="data:,">
<title>{title}</title><style>{style}</style>{library}</head>
<body><header><h1>{title}</h1>{summary}</header>{links}<main>{body}</main>{facts}{script}</body></html>
"""

_STYLE = """
:root { --ink: #1d2330; --soft: #5b6475; --line: #e3e7ee; --ground: #f6f7f9; --mark: #0b7285; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
header, nav, main, footer { max-width: 1200px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 34px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
header p { color: var(--soft); margin: 0 0 14px; max-width: 90ch; font-size: 16px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 20px; padding-top: 4px; padding-bottom: 6px; }
nav a { color: var(--mark); text-decoration: none; font-size: 14px; }
nav a:hover { text-decoration: underline; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px 14px; margin: 16px 0; }
h2 { font-size: 19px; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 100ch; }
code { font: .92em ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  background: #eef1f5; border-radius: 4px; padding: .05em .3em; overflow-wrap: anywhere; }
pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  background: var(--ground); border-radius: 6px; padding: 12px; overflow-x: auto; }
figure { margin: 4px 0 18px; }
figcaption { color: var(--soft); font-size: 13.5px; margin-top: 6px; max-width: 105ch; }
.row { display: flex; flex-wrap: wrap; gap: 16px; }
.cell { flex: 1 1 320px; min-width: 0; }
.cell img { display: block; width: 100%; height: auto; border-radius: 6px; }
.cell span { display: block; color: var(--soft); font-size: 13.5px; padding: 5px 2px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; font-size: 13.5px; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
.text, .group { text-align: left; white-space: normal; }
th.group { color: var(--ink); padding-top: 14px; }
th:first-child, td:first-child { padding-left: 2px; }
td.text:first-child { min-width: 13em; }
th:last-child, td:last-child { padding-right: 2px; }
tbody tr:hover { background: var(--ground); }
footer { padding-top: 6px; padding-bottom: 44px; color: var(--soft); font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""

_SCRIPT = """
for (const cell of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(cell.firstElementChild.textContent);
  cell.replaceChildren();
  Plotly.newPlot(cell, figure.data, figure.layout,
    {responsive: true, displayModeBar: false});
  cell.title = "Drag to zoom, double-click to see everything again.";
}
"""
