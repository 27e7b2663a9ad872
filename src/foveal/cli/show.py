"""`foveal show`: one system, its formula, what runs it, and a picture of its pattern."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from foveal._errors import FovealError, PatternError
from foveal.cli import _arguments as arguments
from foveal.cli._text import columns, field, fields, formula, grid_text, table
from foveal.cli.explain import add_options, check_options, chosen_options, find
from foveal.cli.list import as_dict

if TYPE_CHECKING:
    from foveal.patterns.base import Pattern
    from foveal.scores.base import Score
    from foveal.systems.base import System, Tool

GRIDS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((64,), (128,), (256,), (512,), (1024,), (2048,), (4096,), (16384,)),
    2: ((24, 24), (32, 32), (48, 48), (64, 64), (96, 96)),
    3: ((6, 12, 12), (8, 16, 16), (12, 24, 24), (16, 24, 24)),
}
_DENSE_ENOUGH = 0.25
_LARGE = 4096


def add_parser(subparsers: Any) -> None:
    """Adds `show` to the command line."""
    parser = subparsers.add_parser(
        "show",
        help="one system: formula, paper, options, and a picture of its pattern",
        description="One system of the catalogue, or a pattern as in Python: its formula, paper, "
        "options, identities, what runs it, and a picture of the tiles that it visits, written to "
        "NAME.svg in the current folder.",
        epilog="Examples: foveal show gna --window 8 --stride 4;  foveal show "
        "'Sliding(12, sink_tokens=2)' --grid 64 --svg window.svg",
    )
    parser.add_argument("what", metavar="NAME|PATTERN", help="a system, or a pattern as in Python")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="where the picture goes")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a PNG instead of the SVG")
    parser.add_argument(
        "--grid",
        type=arguments.grid,
        metavar="G",
        help="tokens of the picture, such as 64 or 24x24 (default: small, to fit the pattern)",
    )
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON; a picture only on demand")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from foveal.systems import tool, tools

    options = chosen_options(args)
    if arguments.reads_as_pattern(args.what):
        subject: _Subject = _PatternSubject(arguments.pattern(args.what), args.grid)
    elif args.what in {entry.name for entry in tools()}:
        print(_tool_text(tool(args.what), as_json=args.json))
        return 0
    else:
        system = find(args.what)
        subject = _SystemSubject(system, check_options(system, options), args.grid)
    if args.json:
        files = _draw(subject, args) if args.svg or args.png else []
        print(json.dumps(subject.as_dict() | {"files": files}, indent=2, default=str))
        return 0
    files = _draw(subject, args)
    print(subject.text())
    if subject.pattern is None:
        print(field("picture", "none: its operator is not a choice of pairs"))
    for file in files:
        print(field("picture", f"written to {file} ({grid_text(subject.grid)} tokens)"))
    return 0


def _tool_text(entry: Tool, *, as_json: bool) -> str:
    checks = {check.name: check.statement for check in entry.checks}
    if as_json:
        return json.dumps(dataclasses.asdict(entry) | {"checks": checks}, indent=2)
    found = [
        ("does", entry.summary),
        ("paper", entry.paper),
        ("family", f"{entry.family}, {entry.kind}"),
        ("run it", entry.command),
        ("in Python", entry.part.replace(":", ".")),
        *(("check", f"{name}: {statement}") for name, statement in checks.items()),
    ]
    title = textwrap.fill(f"{entry.name}: {entry.title} ({entry.year})", columns())
    return f"{title}\n\n{fields(found)}"


def picture_grid(
    pattern_on: Callable[[tuple[int, ...]], Pattern], candidates: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    """The first grid that the pattern fits and on which it leaves most pairs out.

    `pattern_on(grid)` makes the pattern; `candidates` grow.  When each keeps many pairs, the one
    that keeps the smallest share; raises the last refusal where none does.
    """
    from foveal.patterns.base import Extent
    from foveal.probe.visits import visits

    best: tuple[float, tuple[int, ...]] | None = None
    refusal: FovealError | None = None
    for grid in candidates:
        extent = Extent(grid, grid)
        if best is not None and extent.Lq > _LARGE:
            break
        try:
            pattern = pattern_on(grid)
            pattern.validate(extent)
        except FovealError as error:
            refusal = error
            continue
        density = visits(pattern, extent).pairs / (extent.Lq * extent.Lk)
        best = min(best or (density, grid), (density, grid))
        if density <= _DENSE_ENOUGH:
            return grid
    if best is None:
        raise refusal or PatternError("grid", "no candidate", "one to three axes are needed")
    return best[1]


def _draw(subject: _Subject, args: argparse.Namespace) -> list[str]:
    from foveal.probe.picture import picture, write_png

    if subject.pattern is None:
        if args.svg or args.png:
            raise PatternError("picture", subject.name, "a system that selects pairs is needed")
        return []
    svg = picture(subject.pattern, subject.grid, title=subject.title, caption=subject.caption)
    files = []
    if args.png:
        write_png(svg, args.png)
        files.append(str(args.png))
    if args.svg or not args.png:
        path = args.svg or Path(f"{subject.name}.svg")
        try:
            path.write_text(svg, encoding="utf-8")
        except OSError as error:
            raise _WriteError(f"{path}: {error.strerror}") from None
        files.append(str(path))
    return files


class _WriteError(FovealError):
    """The picture cannot be stored where it was asked for."""


class _Subject(ABC):
    """What is shown: its name, its pattern on the grid of the picture, and its text."""

    name: str
    title: str
    caption: str = ""
    grid: tuple[int, ...] = ()
    pattern: Pattern | None = None

    @abstractmethod
    def text(self) -> str: ...

    @abstractmethod
    def as_dict(self) -> dict[str, Any]: ...


class _PatternSubject(_Subject):
    def __init__(self, pattern: Pattern, grid: tuple[int, ...] | None) -> None:
        self.pattern = pattern
        self.name = "pattern"
        self.title = pattern.key
        self.grid = grid or picture_grid(lambda _: pattern, GRIDS[pattern.rank or 1])

    def text(self) -> str:
        return f"{self.title}\n\n{_formulas(self.pattern, None)}"

    def as_dict(self) -> dict[str, Any]:
        assert self.pattern is not None
        return {"pattern": self.pattern.key, "grid": self.grid}


class _SystemSubject(_Subject):
    def __init__(
        self, system: System, options: dict[str, Any], grid: tuple[int, ...] | None
    ) -> None:
        self.system = system
        self.options = options
        self.name = system.name
        self.title = system.name
        self.caption = system.title
        self.score: Score | None = None
        if system.compose is None:
            return
        self.grid = grid or picture_grid(
            lambda tried: system.pattern(tried, **options), candidate_grids(system, options)
        )
        self.pattern = system.pattern(self.grid, **options)
        self.score = system.score(self.grid, **options)

    def text(self) -> str:
        system = self.system
        layer = f"foveal.layers.{system.layer.__name__}" if system.layer else "none"
        shapes = "; ".join(shape_text(shape) for shape in system.reference_shapes)
        parts = [
            textwrap.fill(f"{system.name}: {system.title} ({system.year})", columns()),
            "",
            fields(
                [
                    ("computes", system.summary),
                    ("paper", system.paper),
                    ("family", f"{system.family}, {system.kind}, engine {system.engine}"),
                    ("layer", layer),
                    ("options", _options_text(system, self.options)),
                    ("shapes", shapes),
                ]
            ),
            "",
            _formulas(self.pattern, self.score, inspect.getdoc(system.op)),
            "",
            fields([("identity", f"{each.name}: {each.statement}") for each in system.identities]),
            "",
            _support(system, self.grid, self.options),
            "",
        ]
        return "\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        system = self.system
        return as_dict(system) | {
            "options": dict(system.defaults) | self.options,
            "identities": {each.name: each.statement for each in system.identities},
            "reference_shapes": [dict(shape) for shape in system.reference_shapes],
            "pattern": self.pattern.key if self.pattern else None,
            "score": self.score.key if self.score else None,
            "grid": self.grid or None,
        }


def candidate_grids(
    system: System, options: Mapping[str, Any] = MappingProxyType({})
) -> list[tuple[int, ...]]:
    """Small grids, then those of the paper, of one rank: the options', else the paper's first."""
    of_paper = [tuple(shape["grid"]) for shape in system.reference_shapes]
    ranks = (len(value) for value in options.values() if isinstance(value, tuple))
    rank = next((rank for rank in ranks if rank in GRIDS), len(of_paper[0]))
    return [*GRIDS[rank], *sorted(grid for grid in of_paper if len(grid) == rank)]


def definition(thing: object) -> str:
    """The formula of a pattern or a score: its docstring up to the options."""
    text = inspect.getdoc(type(thing)) or ""
    kept = []
    for line in text.splitlines():
        if line.startswith(("Options:", "Limits:", "Equals:", "Cost:", "Paper:", "Shapes:")):
            break
        kept.append(line)
    return "\n".join(kept).strip()


def members(pattern: Pattern) -> list[Pattern]:
    """The patterns that a combination is made of, or the pattern itself."""
    return [one for each in getattr(pattern, "members", ()) for one in members(each)] or [pattern]


def _formulas(pattern: Pattern | None, score: Score | None, doc: str | None = None) -> str:
    lines: list[str] = []
    if doc:
        lines.extend((field("operator", ""), formula(doc)))
    if pattern is not None:
        lines.append(field("pattern", pattern.key))
        for kind in {type(each): each for each in members(pattern)}.values():
            lines.append(formula(definition(kind)))
    if score is not None:
        lines.append(field("score", score.key))
        terms = getattr(score, "members", (score,))
        lines += [formula(definition(term)) for term in terms]
    return "\n".join(lines)


def _options_text(system: System, options: dict[str, Any]) -> str:
    shown = dict(system.defaults) | options
    return ", ".join(f"{name}={value!r}" for name, value in shown.items()) or "none"


def shape_text(shape: Any) -> str:
    """A reference shape in words."""
    grid = grid_text(shape["grid"])
    heads = "1 head" if shape["heads"] == 1 else f"{shape['heads']} heads"
    options = "".join(f", {name}={value!r}" for name, value in shape.get("options", {}).items())
    return f"{grid} tokens, {heads} of {shape['head_dim']}{options}"


def _support(system: System, grid: tuple[int, ...], options: dict[str, Any]) -> str:
    shape = dict(system.reference_shapes[0]) | ({"grid": grid, "options": {}} if grid else {})
    on_cpu = system.supports(shape, device="cpu", **options)
    on_cuda = system.supports(shape, device="cuda", **options)
    rows = []
    for name in reversed(on_cpu):
        reasons = dict.fromkeys(r for r in (on_cpu[name], on_cuda[name]) if r)
        marks = tuple("-" if refusal else "yes" for refusal in (on_cpu[name], on_cuda[name]))
        rows.append((name, *marks, "; ".join(reasons)))
    return table(("runs", "cpu", "cuda", "refuses because"), rows)
