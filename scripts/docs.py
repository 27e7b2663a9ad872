"""Writes docs/reference from docstrings and docs/systems from the catalogue.

python scripts/docs.py            writes the pages
python scripts/docs.py --check    exit status 1 when a page on disk is stale, missing or left over
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal import cli, errors
from foveal._errors import FovealError
from foveal.cli.show import candidate_grids, definition, members, picture_grid, shape_text
from foveal.probe.picture import picture
from foveal.systems import System, systems

DOCS = Path(__file__).resolve().parent.parent / "docs"
_NOTICE = "<!-- Written by scripts/docs.py; edit {source} instead. -->"
_LABEL = re.compile(r"(?:^|(?<=[.)\]`:]) {1,2})(Shapes|Options|Cost|Limits|Equals|Paper): ")


@dataclass(frozen=True)
class Page:
    """A page of the reference: public names of modules, in the order of reading."""

    name: str
    title: str
    intro: str
    module: str
    members: tuple[str, ...] = ()

    def objects(self) -> Iterator[tuple[str, Any]]:
        module = importlib.import_module(self.module)
        for name in self.members or tuple(module.__all__):
            yield name, getattr(module, name)


PAGES = (
    Page(
        "verbs",
        "Verbs",
        "What users call.",
        "foveal",
        (
            "attend",
            "explain",
            "Explanation",
            "scan",
            "scan_step",
            "scan_map",
            "ChunkMap",
            "explain_scan",
            "ScanExplanation",
            "decode",
            "page_mass",
            "explain_decode",
            "DecodeExplanation",
            "convolve",
            "Strips",
            "local_mix",
            "fftconv",
            "explain_convolve",
            "explain_local_mix",
            "explain_fftconv",
            "ConvolutionExplanation",
            "tiles",
            "Tiles",
            "TileCounts",
            "TileList",
            "system",
            "systems",
            "System",
        ),
    ),
    Page(
        "patterns",
        "Patterns",
        "Which pairs of query and key take part. Static values; `&` and `|` combine them.",
        "foveal.patterns",
        (
            "Pattern",
            "Extent",
            "Dense",
            "Causal",
            "Sliding",
            "Neighborhood",
            "Documents",
            "Strided",
            "Fixed",
            "Axial",
            "Partition",
            "Rectangle",
            "Rows",
            "Scales",
            "Sphere",
            "Tree",
            "Blocks",
            "BlockSelection",
            "Chosen",
            "TokenSelection",
            "SpanSelection",
            "ColumnSelection",
            "HeadSelection",
            "Lifetimes",
        ),
    ),
    Page(
        "scores",
        "Scores",
        "How a visible pair counts. `+` combines them.",
        "foveal.scores",
        (
            "Score",
            "Softmax",
            "Bias",
            "KeyBias",
            "Alibi",
            "RelativeBias",
            "Entmax",
            "LocalLinear",
            "Parallax",
        ),
    ),
    Page(
        "rules",
        "Rules",
        "How a state changes with each token.",
        "foveal.rules",
        ("Rule", "Additive", "Delta", "MLSTM", "TwoState"),
    ),
    Page(
        "features",
        "Features",
        "Functions of q and k whose products are the weights of linear attention, and fixed decays.",
        "foveal.features",
    ),
    Page(
        "caches",
        "Caches",
        "Where keys and values live between the steps of a decoder; `decode` reads them.",
        "foveal.caches",
    ),
    Page(
        "policies",
        "Cache policies",
        "What leaves a cache and when; `fv.hf.use(model, cache=NAME)` puts one into a model.",
        "foveal.caches.policies",
    ),
    Page(
        "hf",
        "Hugging Face models",
        "Any of this in a model of transformers, in one line, and back.",
        "foveal.hf",
    ),
    Page(
        "selectors",
        "Selectors and budgets",
        "How a selection of key blocks is found from q and k; `compose.attend_selected` runs it.",
        "foveal.selectors",
    ),
    Page(
        "compose",
        "Compositions",
        "Attention made of several calls: extra keys, queries on a finer grid, padding.",
        "foveal.compose",
    ),
    Page(
        "natten",
        "NATTEN's interface",
        "The operators and modules of NATTEN 0.21 under their own names; arguments that steer its "
        "kernels are answered by an `IgnoredArgumentWarning`.",
        "foveal.compat.natten",
        (
            "na1d",
            "na2d",
            "na3d",
            "NeighborhoodAttention1D",
            "NeighborhoodAttention2D",
            "NeighborhoodAttention3D",
            "attention",
            "merge_attentions",
            "na_qk",
            "na_av",
        ),
    ),
    Page(
        "tiles",
        "Tiles",
        "What a pattern visits and costs, counted before anything runs, and what would cost less.",
        "foveal.probe.tiles",
        (
            "simulate",
            "best_tiles",
            "interior",
            "advice",
            "report",
            "predict",
            "Simulation",
            "Machine",
            "machine",
        ),
    ),
    Page("layers", "Layers", "The distinctive layers of papers, as modules.", "foveal.layers"),
    Page("testing", "Testing", "Shipped for tests of your own patterns.", "foveal.testing"),
    Page(
        "pictures",
        "Pictures",
        "A pattern as SVG.",
        "foveal.probe.picture",
        ("picture", "write_png"),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, tell what is stale")
    args = parser.parse_args()
    wanted = {DOCS / path: text for path, text in pages()}
    present = {
        path for folder in ("reference", "systems") for path in (DOCS / folder).glob("*") if path
    }
    stale = [path for path, text in wanted.items() if _read(path) != text]
    left_over = sorted(present - set(wanted))
    if args.check:
        for path in [*stale, *left_over]:
            print(
                f"stale: {path.relative_to(DOCS.parent)}; python scripts/docs.py", file=sys.stderr
            )
        return int(bool(stale or left_over))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    for path in left_over:
        path.unlink()
    print(f"{len(wanted)} pages, {len(stale)} written, {len(left_over)} removed")
    return 0


def pages() -> Iterator[tuple[str, str]]:
    """Every generated file by its path below docs/."""
    yield "reference/index.md", _reference_index()
    for page in PAGES:
        yield f"reference/{page.name}.md", _reference_page(page)
    yield "reference/errors.md", _errors_page()
    yield "reference/command_line.md", _command_line_page()
    entries = systems()
    yield "systems/index.md", _systems_index(entries)
    for entry in entries:
        drawing = _drawing(entry)
        if drawing is not None:
            yield f"systems/{entry.name}.svg", drawing[1]
        yield f"systems/{entry.name}.md", _system_page(entry, drawing and drawing[0])


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _joined(source: str, *blocks: str) -> str:
    notice = _NOTICE.format(source=source)
    return "\n\n".join([notice, *(block for block in blocks if block)]) + "\n"


def _reference_index() -> str:
    lines = [f"* [{page.title}]({page.name}.md): {page.intro}" for page in PAGES]
    lines.append("* [Errors](errors.md): what is raised on bad input.")
    lines.append("* [Command line](command_line.md): `foveal` and its sub-commands.")
    return _joined("the docstrings", "# Reference", "\n".join(lines))


def _reference_page(page: Page) -> str:
    blocks = [f"# {page.title}", f"{page.intro} Module `{page.module}`."]
    for name, thing in page.objects():
        blocks += _object(name, thing)
    return _joined(f"the docstrings of `{page.module}`", *blocks)


def _object(name: str, thing: Any, level: int = 2) -> list[str]:
    blocks = [f"{'#' * level} {name}"]
    if callable(thing):
        blocks.append(f"```python\n{_signature(name, thing)}\n```")
    blocks.append(markdown(inspect.getdoc(thing) or ""))
    if inspect.isclass(thing):
        for own, value in vars(thing).items():
            if not own.startswith("_") and (method := _method(value)) is not None:
                blocks += _object(f"{name}.{own}", method, level + 1)
    return blocks


def _method(value: Any) -> Any:
    """What to document of a class attribute: documented functions and properties, else None."""
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    documented = isinstance(value, property) or inspect.isfunction(value)
    return value if documented and value.__doc__ else None


def _signature(name: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    pieces: list[str] = []
    seen_star = False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not seen_star:
            pieces.append("*")
        seen_star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        pieces.append(_parameter(parameter))
    result = ""
    if signature.return_annotation is not signature.empty and not inspect.isclass(thing):
        result = f" -> {_type(signature.return_annotation)}"
    line = f"{name}({', '.join(pieces)}){result}"
    if len(line) <= 88:
        return line
    return f"{name}(\n" + "".join(f"    {piece},\n" for piece in pieces) + f"){result}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "Any")


def _parameter(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        text = f"*{text}"
    if parameter.kind is parameter.VAR_KEYWORD:
        text = f"**{text}"
    if parameter.annotation is not parameter.empty:
        text += f": {_type(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        sign = "=" if parameter.annotation is parameter.empty else " = "
        text += f"{sign}{_value(parameter.default)}"
    return text


def _value(default: object) -> str:
    if inspect.isclass(default) or inspect.isfunction(default):
        return str(default.__name__)
    if isinstance(default, tuple) and any(map(inspect.isfunction, default)):
        return f"({', '.join(map(_value, default))})"
    if dataclasses.is_dataclass(default) and _all_defaults(default):
        return f"{type(default).__name__}()"
    key = getattr(default, "key", None)
    return (key if isinstance(key, str) else repr(default)).replace("'", '"')


def _all_defaults(value: Any) -> bool:
    fields = [field for field in dataclasses.fields(value) if field.init]
    return all(getattr(value, field.name) == field.default for field in fields)


def markdown(docstring: str) -> str:
    """A docstring as Markdown: labels in bold on their own, formulas as code, the rest as text."""
    blocks: list[str] = []
    prose: list[str] = []
    code: list[str] = []
    for line in [*docstring.splitlines(), ""]:
        if line.startswith(" "):
            blocks += _prose(prose)
            prose = []
            code.append(line)
            continue
        if code and line:
            blocks.append(_code(code))
            code = []
        if line:
            prose.append(line)
        elif prose:
            blocks += _prose(prose)
            prose = []
        elif code:
            code.append(line)
    if code:
        blocks.append(_code(code))
    return "\n\n".join(blocks)


def _code(lines: list[str]) -> str:
    return f"```text\n{textwrap.dedent(chr(10).join(lines)).strip(chr(10))}\n```"


def _prose(lines: list[str]) -> list[str]:
    if not lines:
        return []
    text = " ".join(line.strip() for line in lines)
    pieces = _LABEL.split(text)
    blocks = [_escaped(pieces[0])] if pieces[0].strip() else []
    for label, rest in zip(pieces[1::2], pieces[2::2], strict=True):
        blocks.append(f"**{label}**: {_escaped(rest)}")
    return blocks


def _escaped(text: str) -> str:
    """Text in which only backticks mean something."""
    pieces = re.sub(r" {2,}", " ", text.strip()).split("`")
    for place in range(0, len(pieces), 2):
        pieces[place] = re.sub(r"([*_\[\]|])", r"\\\1", pieces[place]).replace("<", "&lt;")
    return "`".join(pieces)


def _errors_page() -> str:
    blocks = [
        "# Errors",
        "All are attributes of `foveal.errors` and subclasses of `FovealError`. Each message names "
        "the argument, what came and what is needed.",
    ]
    for name, kind in vars(errors).items():
        if name.startswith("_") or not (inspect.isclass(kind) and issubclass(kind, FovealError)):
            continue
        bases = ", ".join(
            f"`{base.__name__}`"
            for base in kind.__mro__[1:]
            if not base.__name__.startswith("_") and base not in (object, BaseException, Exception)
        )
        blocks.append(f"## {name}")
        blocks.append(markdown(inspect.getdoc(kind) or ""))
        if bases:
            blocks.append(f"Subclass of {bases}.")
    return _joined("src/foveal/_errors.py", *blocks)


def _command_line_page() -> str:
    whole = cli.parser()
    subparsers = argparse.ArgumentParser().add_subparsers()
    for command in cli.COMMANDS:
        command.add_parser(subparsers)
    blocks = ["# Command line", _escaped(whole.description or ""), _escaped(whole.epilog or "")]
    for name, parser in subparsers.choices.items():
        blocks += [f"## foveal {name}", _escaped(parser.description or "")]
        rows = [
            (_flags(action), (action.help or "").replace("|", "\\|"))
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        blocks += [_table(("argument", "meaning"), rows), _escaped(parser.epilog or "")]
    return _joined("src/foveal/cli", *blocks)


def _flags(action: argparse.Action) -> str:
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    values = " ".join(value) if isinstance(value, tuple) else str(value)
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`".replace("|", "\\|")
    takes_value = action.nargs != 0
    return ", ".join(
        f"`{flag} {values}`" if takes_value else f"`{flag}`" for flag in action.option_strings
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _systems_index(entries: tuple[System, ...]) -> str:
    blocks = [
        "# Systems",
        "Every paper by its name, as `fv.system(name)` returns it and `foveal list` prints it. A name "
        "enters when it works, is tested against its definition and its identities, and can be timed.",
    ]
    for family in dict.fromkeys(entry.family for entry in entries):
        blocks.append(f"## {family}")
        rows = [
            (f"[{entry.name}]({entry.name}.md)", str(entry.year), _escaped(entry.summary))
            for entry in entries
            if entry.family == family
        ]
        blocks.append(_table(("name", "year", "what it computes"), rows))
    return _joined("src/foveal/systems", *blocks)


def _call(entry: System) -> str:
    """A call with the defaults written out, as the formatter would break it."""
    options = (f"{name}={_value(value)}" for name, value in entry.defaults.items())
    parameters = inspect.signature(entry.op).parameters.values()
    tensors = [p.name for p in parameters if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    arguments = [*tensors, *options]
    line = f'o = fv.system("{entry.name}").op({", ".join(arguments)})'
    if len(line) <= 100:
        return line
    together = f"    {', '.join(arguments)}"
    if len(together) > 100:
        together = "\n".join(f"    {argument}," for argument in arguments)
    return f'o = fv.system("{entry.name}").op(\n{together}\n)'


def _drawing(entry: System) -> tuple[tuple[int, ...], str] | None:
    """The grid of the picture and the picture, for systems that select pairs."""
    if entry.compose is None:
        return None
    grid = picture_grid(lambda tried: entry.pattern(tried), candidate_grids(entry))
    return grid, picture(entry.pattern(grid), grid, title=entry.name, caption=entry.title)


def _system_page(entry: System, grid: tuple[int, ...] | None) -> str:
    blocks = [
        f"# {entry.name}",
        f"{_escaped(entry.title)} ({entry.year}). {_escaped(entry.paper)}.",
        _escaped(entry.summary),
    ]
    blocks.append(f"```python\n{_call(entry)}\n```")
    if inspect.getdoc(entry.op):
        blocks.append(markdown(inspect.getdoc(entry.op) or ""))
    if grid is not None:
        alt = f"Tiles visited by {entry.name}, and the keys that single queries see"
        blocks.append(f"![{alt}]({entry.name}.svg)")
        pattern, score = entry.pattern(grid), entry.score(grid)
        blocks.append(f"## Formula\n\nWith its defaults: `{pattern.key}`, `{score.key}`.")
        kinds = {type(each): each for each in members(pattern)}
        blocks += [markdown(definition(each)) for each in kinds.values()]
        blocks += [markdown(definition(each)) for each in getattr(score, "members", (score,))]
    blocks.append("## Identities\n\nEach is a test, for values and gradients.")
    blocks.append(
        "\n".join(f"* `{each.name}`: {_escaped(each.statement)}" for each in entry.identities)
    )
    blocks.append("## What runs it")
    on_cpu, on_cuda = entry.supports(device="cpu"), entry.supports(device="cuda")
    rows = [
        (
            name,
            *(
                f"no: {_escaped(where[name] or '')}" if where[name] else "yes"
                for where in (on_cpu, on_cuda)
            ),
        )
        for name in reversed(on_cpu)
    ]
    blocks.append(_table(("implementation", "cpu", "cuda"), rows))
    facts = [f"* kind: {entry.kind}, engine: {entry.engine}, family: {entry.family}"]
    if entry.layer is not None:
        facts.append(f"* layer: `foveal.layers.{entry.layer.__name__}`")
    for shape in entry.reference_shapes:
        facts.append(f"* shape in the paper: {shape_text(shape)}")
    blocks.append("## Facts\n\n" + "\n".join(facts))
    return _joined("src/foveal/systems", *blocks)


if __name__ == "__main__":
    sys.exit(main())
