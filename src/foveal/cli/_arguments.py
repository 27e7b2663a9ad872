"""What users write on the command line, as values: grids, pattern expressions, options."""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import operator
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal import patterns
from foveal._errors import CacheError, DeviceError, PatternError, ScoreError, UnknownNameError
from foveal.patterns.base import Pattern
from foveal.scores import Entmax, LocalLinear, Softmax
from foveal.scores.base import Score

if TYPE_CHECKING:
    import torch

PATTERNS: dict[str, Callable[..., Pattern]] = {
    "Dense": patterns.Dense,
    "Causal": patterns.Causal,
    "Sliding": patterns.Sliding,
    "Neighborhood": patterns.Neighborhood,
    "Documents": patterns.Documents,
    "Strided": patterns.Strided,
    "Fixed": patterns.Fixed,
    "Axial": patterns.Axial,
    "Partition": patterns.Partition,
    "Rectangle": patterns.Rectangle,
    "Scales": patterns.Scales,
    "Sphere": patterns.Sphere,
}
_SCORES: dict[str, Callable[..., Score]] = {
    "Softmax": Softmax,
    "Entmax": Entmax,
    "LocalLinear": LocalLinear,
}
_JOINS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}
_LONGEST = 2000
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def grid(text: str) -> tuple[int, ...]:
    """`24x24`, `24,24` or `4096`: one to three positive lengths."""
    pieces = text.lower().replace(",", "x").split("x")
    if not 1 <= len(pieces) <= 3 or not all(p.strip().isdecimal() and int(p) for p in pieces):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; one to three positive lengths are needed, such as 4096 or 24x24"
        )
    return tuple(int(piece) for piece in pieces)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; a whole number above 0 is needed")
    return int(text)


def seconds(text: str) -> float:
    """`90s`, `5m` or `1h` in seconds; a plain number is seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}; a time is needed, such as 90s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def lengths(text: str) -> tuple[int, ...]:
    """`100,28,0,12`: lengths of packed documents."""
    pieces = text.split(",")
    if not all(piece.strip().isdecimal() for piece in pieces):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; lengths joined by commas are needed, such as 512,300,212"
        )
    return tuple(int(piece) for piece in pieces)


def usable_device(name: str) -> torch.device:
    """A device by its name.

    Raises DeviceError for a name that PyTorch does not know, and for a GPU that is not here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError("device", repr(name), "a device such as cuda:0 is needed") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device", repr(name), "PyTorch finds no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError("device", repr(name), f"an index below {count} is needed")
    return device


def option(text: str) -> tuple[str, Any]:
    """`name=value`: a number, bool, tuple or word; `7x7` is a tuple."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"got {text!r}; NAME=VALUE is needed, such as window=13")
    return name, option_value(value)


def from_file(text: str, what: str) -> Any:
    """What NAME is in the Python file of `FILE.py:NAME`; `what` it is needed for names the errors."""
    path, _, name = text.rpartition(":")
    if not name.isidentifier() or not Path(path).is_file():
        raise CacheError(what, repr(text), "FILE.py:NAME of a function in that file is needed")
    names = runpy.run_path(path)
    if name not in names:
        raise UnknownNameError(f"{what} of {path}", name, tuple(n for n in names if n[0] != "_"))
    return names[name]


def option_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pieces = text.split("x")
        if len(pieces) > 1 and all(piece.isdecimal() for piece in pieces):
            return tuple(int(piece) for piece in pieces)
        return {"true": True, "false": False}.get(text.lower(), text)


def pattern(text: str) -> Pattern:
    """A pattern written as in Python: `Neighborhood(window=13) & Causal()`; nothing is evaluated.

    Names are those of the pattern classes, with or without a module in front; arguments are
    literals; `&` and `|` join.  Raises PatternError or UnknownNameError.
    """
    try:
        return _joined(_parsed(text))
    except SyntaxError as error:
        raise PatternError("pattern", repr(text), f"it does not parse: {error.msg}") from None
    except _UnreadableError as error:
        raise PatternError("pattern", repr(text), str(error)) from None


def score(text: str) -> Score:
    """A score written as in Python: `Softmax(soft_cap=30.0)`."""
    try:
        built: Score = _constructed(_parsed(text), "score", _SCORES)
        return built
    except SyntaxError as error:
        raise ScoreError("score", repr(text), f"it does not parse: {error.msg}") from None
    except _UnreadableError as error:
        raise ScoreError("score", repr(text), str(error)) from None


def reads_as_pattern(text: str) -> bool:
    """Whether the text is meant as a pattern, not as the name of a system."""
    return not text.isidentifier() or text in PATTERNS


class _UnreadableError(Exception):
    """A well-formed expression that is not a pattern or a score."""


def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise _UnreadableError(f"at most {_LONGEST} characters are needed")
    return ast.parse(text.strip(), mode="eval").body


def _joined(node: ast.expr) -> Pattern:
    if isinstance(node, ast.BinOp):
        for kind, join in _JOINS.items():
            if isinstance(node.op, kind):
                joined: Pattern = join(_joined(node.left), _joined(node.right))
                return joined
        raise _UnreadableError("patterns are joined by & and | only")
    built: Pattern = _constructed(node, "pattern", PATTERNS)
    return built


def _constructed(node: ast.expr, kind: str, known: dict[str, Callable[..., Any]]) -> Any:
    name, positional, named = node, [], []
    if isinstance(node, ast.Call):
        name, positional, named = node.func, node.args, node.keywords
    if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
        name = ast.Name(name.attr)
    if not isinstance(name, ast.Name):
        raise _UnreadableError(f"{ast.unparse(node)} is not a {kind}; write {_example(kind)}")
    if name.id not in known:
        raise UnknownNameError(kind, name.id, tuple(known))
    build = known[name.id]
    arguments = [_literal(each) for each in positional]
    options = {each.arg: _literal(each.value) for each in named if each.arg is not None}
    if len(options) < len(named):
        raise _UnreadableError("** is not understood; write each argument by its name")
    try:
        bound = inspect.signature(build).bind(*arguments, **options)
    except TypeError as error:
        signature = ", ".join(str(p) for p in _untyped(build))
        raise _UnreadableError(f"{error}; {name.id}({signature}) is needed") from None
    return functools.partial(build, *bound.args, **bound.kwargs)()


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _UnreadableError(
            f"{ast.unparse(node)} is not a literal number, tuple or text"
        ) from None


def _untyped(build: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(build).parameters.values()
    return [each.replace(annotation=inspect.Parameter.empty) for each in parameters]


def _example(kind: str) -> str:
    return "Sliding(512)" if kind == "pattern" else "Softmax(soft_cap=30.0)"
