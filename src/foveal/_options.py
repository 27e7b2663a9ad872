"""What the annotations of options allow: one check for layers and for systems by name."""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal

from torch import nn

from foveal._errors import FovealError, OptionError

# Lengths of pieces and counts by which something is divided.
_AT_LEAST_ONE = {
    "block", "chunk", "dim", "frame", "group", "head_dim", "heads", "kv_block", "kv_heads", "page",
    "q_block", "segment", "stride", "tile", "value_dim",
}  # fmt: skip
_SHARES = {"keep", "mass", "rank_share", "sample", "share", "value_keep"}


def check_values(call: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises OptionError for a value that its parameter of `call` cannot take.

    Checked are whole numbers (0 or more, 1 or more for sizes, any where the default is negative), numbers
    (no NaN, shares between 0 and 1), words, flags, choices and tuples of these; whatever else is annotated
    is left to who uses it.
    """
    known = _parameters(call)
    for name in given.keys() & known.keys():
        needed = _misfit(name, *known[name], given[name])
        if needed is not None:
            raise OptionError(name, repr(given[name]), f"{needed} is needed")


def checked(layer: type[nn.Module]) -> None:
    """From now on the arguments of a layer are checked when it is made; what it says itself goes first."""
    made: Callable[..., None] = layer.__init__

    @functools.wraps(made)
    def make(self: Any, *positional: Any, **named: Any) -> None:
        try:
            made(self, *positional, **named)
        except FovealError:
            raise
        except Exception as error:
            _check_call(made, (self, *positional), named, error)
            raise
        _check_call(made, (self, *positional), named, None)

    layer.__init__ = make  # type: ignore[method-assign]


def _check_call(
    call: Callable[..., Any],
    positional: tuple[Any, ...],
    named: Mapping[str, Any],
    cause: Exception | None,
) -> None:
    try:
        given = inspect.signature(call).bind(*positional, **named).arguments
    except TypeError:  # arguments that are missing or unknown, which Python names
        return
    try:
        check_values(call, given)
    except OptionError as error:
        raise error from cause


@functools.lru_cache(maxsize=512)
def _parameters(call: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of every parameter whose annotation can be read here."""
    found: dict[str, tuple[Any, Any]] = {}
    names = getattr(inspect.unwrap(call), "__globals__", {})
    for name, parameter in inspect.signature(call).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, names)
            except NameError:  # a name that is imported for type checkers alone
                continue
        if hint is not parameter.empty:
            found[name] = (hint, parameter.default)
    return found


def _misfit(name: str, hint: Any, default: Any, value: Any) -> str | None:
    """What is needed in the place of a value that does not fit."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        found = [_misfit(name, each, default, value) for each in typing.get_args(hint)]
        told = [each for each in found if each is not None]
        return " or ".join(told) if len(told) == len(found) else None
    if origin is Literal:
        words = typing.get_args(hint)
        return None if value in words else f"one of {', '.join(map(repr, words))}"
    if origin is tuple:
        return _tuple_misfit(name, typing.get_args(hint), value)
    if hint in (None, type(None)):
        return None if value is None else "None"
    if hint is bool:
        return None if isinstance(value, bool) else "True or False"
    if hint is int:
        return _whole_misfit(name, default, value)
    if hint is float:
        return _number_misfit(name, value)
    if hint is str:
        return None if isinstance(value, str) else "a word"
    return None


def _whole_misfit(name: str, default: Any, value: Any) -> str | None:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if isinstance(default, int) and default < 0:
        return None if whole else "a whole number"
    least = int(name in _AT_LEAST_ONE and default != 0)
    return None if whole and value >= least else f"a whole number of at least {least}"


def _number_misfit(name: str, value: Any) -> str | None:
    if hasattr(value, "shape"):  # a tensor or an array in the place of a number
        return None
    number = isinstance(value, Real) and not isinstance(value, bool)
    if name in _SHARES:
        return None if number and 0 <= float(value) <= 1 else "a share from 0 to 1"
    return None if number and not math.isnan(float(value)) else "a number"


def _tuple_misfit(name: str, members: tuple[Any, ...], value: Any) -> str | None:
    if len(members) != 2 or members[1] is not Ellipsis or members[0] not in (int, float, str):
        return None
    fits = isinstance(value, tuple | list) and all(
        _misfit(name, members[0], None, each) is None for each in value
    )
    kind = {int: "whole numbers", float: "numbers", str: "words"}[members[0]]
    return None if fits else f"a tuple of {kind}"
