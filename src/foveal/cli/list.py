"""`foveal list`: every system of the catalogue, and what runs it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from typing import TYPE_CHECKING, Any

from foveal.cli._text import columns, field, table

if TYPE_CHECKING:
    from foveal.systems.base import System, Tool

TOOLS = "search"
"""The family whose entries are tools, not operators."""

_WIDE = 110
_FOOT = (
    "reference, cpu, sdpa: whether it runs the defaults on the CPU; cuda: what runs them on a GPU. "
    "`foveal show NAME` has the reasons, the formula and a picture."
)


def add_parser(subparsers: Any) -> None:
    """Adds `list` to the command line."""
    parser = subparsers.add_parser(
        "list",
        help="every system by name, and what runs it",
        description="Every system of the catalogue: its engine, which implementation runs it with "
        "its default options on the shape of its paper, and one line about it.",
    )
    parser.add_argument("--family", help="one family only, such as locality")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from foveal.systems import systems, tools

    if args.family == TOOLS:
        found = [dataclasses.asdict(entry) | {"checks": None} for entry in tools()]
        print(json.dumps(found, indent=2) if args.json else _tool_table(tools()))
        return 0
    entries = systems(args.family)
    if args.json:
        print(json.dumps([as_dict(entry) for entry in entries], indent=2))
        return 0
    for family in dict.fromkeys(entry.family for entry in entries):
        members = [entry for entry in entries if entry.family == family]
        print(_family_table(family, members), end="\n\n")
    if args.family is None:
        print(_tool_table(tools()), end="\n\n")
    print(textwrap.fill(_FOOT, columns()))
    return 0


def as_dict(entry: System) -> dict[str, Any]:
    """An entry as JSON data; `supports` holds null or the sentence of a refusal."""
    return {
        "name": entry.name,
        "title": entry.title,
        "year": entry.year,
        "paper": entry.paper,
        "family": entry.family,
        "kind": entry.kind,
        "engine": entry.engine,
        "summary": entry.summary,
        "layer": entry.layer.__name__ if entry.layer else None,
        "supports": {device: entry.supports(device=device) for device in ("cpu", "cuda")},
    }


def support_header() -> tuple[str, ...]:
    from foveal._plan import TILE_IMPLEMENTATIONS

    return (*reversed(TILE_IMPLEMENTATIONS), "cuda")


def support_row(entry: System) -> tuple[str, ...]:
    """`yes` or `-` per implementation on the CPU, then who runs it on a CUDA device."""
    on_cpu, on_cuda = entry.supports(device="cpu"), entry.supports(device="cuda")
    here = tuple(_mark(on_cpu, name) for name in support_header()[:-1])
    return (*here, next((name for name, refusal in on_cuda.items() if refusal is None), "-"))


def _mark(supports: dict[str, str | None], name: str) -> str:
    if "torch" in supports:
        return "yes" if name == "reference" else "-"
    return "yes" if supports.get(name, "absent") is None else "-"


def _family_table(family: str, members: list[System]) -> str:
    title = f"{family}: {len(members)} systems"
    header = ("name", "engine", *support_header())
    rows = [(entry.name, entry.engine, *support_row(entry)) for entry in members]
    if columns() >= _WIDE:
        wide = [(*row, entry.summary) for row, entry in zip(rows, members, strict=True)]
        return f"{title}\n\n{table((*header, 'what it computes'), wide)}"
    lines = table((*header, ""), [(*row, "") for row in rows]).splitlines()
    summaries = (field("", entry.summary, 3) for entry in members)
    body = (f"{line}\n{summary}" for line, summary in zip(lines[1:], summaries, strict=True))
    return "\n".join([title, "", lines[0], *body])


def _tool_table(entries: tuple[Tool, ...]) -> str:
    title = f"{TOOLS}: {len(entries)} tools, which make or judge kernels"
    if columns() >= _WIDE:
        wide = [(entry.name, entry.command, entry.summary) for entry in entries]
        return f"{title}\n\n{table(('name', 'command', 'what it does'), wide)}"
    parts = [f"{entry.name}\n{field('', entry.summary, 3)}" for entry in entries]
    return "\n".join([title, "", *parts])
