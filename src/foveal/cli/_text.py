"""Plain text that fits the terminal: wrapped fields and tables, readable without colour."""

from __future__ import annotations

import itertools
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

_NARROWEST, _WIDEST = 70, 120
_SECTION = re.compile(r" +((?:Shapes|Options|Cost|Limits|Equals|Paper): )")


def columns() -> int:
    """Columns of the terminal, between 70 and 120; 100 where there is none."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, _NARROWEST), _WIDEST)


def field(label: str, text: str, indent: int = 11) -> str:
    """`label      text`, wrapped, the text in its own column."""
    room = columns() - indent
    lines = [
        line
        for paragraph in text.splitlines() or [""]
        for line in textwrap.wrap(paragraph, room, break_on_hyphens=False) or [""]
    ]
    first = f"{label:<{indent - 1}} {lines[0]}".rstrip()
    return "\n".join([first, *(f"{'':<{indent}}{line}".rstrip() for line in lines[1:])])


def fields(pairs: Iterable[tuple[str, str]], indent: int = 11) -> str:
    return "\n".join(field(label, text, indent) for label, text in pairs)


def formula(text: str, indent: int = 11) -> str:
    """Prose of a docstring wrapped; its indented lines kept, those too long continued further in."""
    room = columns() - indent
    lines: list[str] = []
    for is_prose, group in itertools.groupby(
        text.splitlines(), lambda line: line[:1].strip() != ""
    ):
        if is_prose:
            for paragraph in _SECTION.sub(r"\n\1", " ".join(group)).splitlines():
                lines += textwrap.wrap(paragraph, room, break_on_hyphens=False)
            continue
        for line in group:
            own = " " * (len(line) - len(line.lstrip()) + 2)
            lines += textwrap.wrap(line, room, subsequent_indent=own) or [""]
    return "\n".join(f"{'':<{indent}}{line}".rstrip() for line in lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the last one wraps at the edge of the terminal."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header) - 1)]
    start = sum(widths) + 2 * len(widths)
    lines = []
    for row in cells:
        front = "".join(f"{cell:<{w}}  " for cell, w in zip(row[:-1], widths, strict=True))
        last = textwrap.wrap(row[-1], max(columns() - start, 20), break_on_hyphens=False) or [""]
        lines.append((front + last[0]).rstrip())
        lines.extend(" " * start + line for line in last[1:])
    return "\n".join(lines)


def grid_text(grid: Iterable[int]) -> str:
    return " x ".join(str(length) for length in grid)
