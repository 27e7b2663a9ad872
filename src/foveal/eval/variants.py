"""What is put into a model for an evaluation: a system, a pattern, or a cache with its budget."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveal import hf
from foveal._errors import SelectionError, UnknownNameError
from foveal.caches.policies import POLICIES
from foveal.hf.fetched import FETCHING, Fetching
from foveal.patterns import Pattern
from foveal.systems import system

EXACT = "dense"
EQUAL = "equal"
PREFIXES = ("attention=", "cache=")


@dataclass(frozen=True)
class Variant:
    """A way to run a model: attention or cache, by name, with its budget and options.

    cache: a name that is both, such as "retrieval_attention", means the cache; policies always do.
    """

    name: str
    budget: int | float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    pattern: Pattern | None = None
    cache: bool = False

    @property
    def is_policy(self) -> bool:
        return self.name in POLICIES

    @property
    def on_host(self) -> bool:
        """Whether old keys lie on the host, and every token that is read alone fetches some."""
        return self.cache and self.name in FETCHING

    @property
    def title(self) -> str:
        """`snapkv`, `cache=louis_kv`"""
        return f"cache={self.name}" if self.on_host else self.name

    @property
    def label(self) -> str:
        """`snapkv, 0.25`"""
        return self.title if self.budget is None else f"{self.title}, {self.budget:g}"

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """The model with this in it; as before behind."""
        options = dict(self.options)
        if self.is_policy:
            with hf.using(model, cache=self.name, budget=self.budget, **options):
                yield
        elif self.on_host:
            with hf.using(model, cache=self.name, **_with_weights(options)):
                yield
        else:
            with hf.using(model, self.pattern or self.name, **options):
                yield


def variants(
    names: list[str], budgets: list[int | float], patterns: dict[str, Pattern]
) -> list[Variant]:
    """Exact attention first, then every name, policies once per budget."""
    found = [Variant(EXACT)]
    for text in names:
        if text in patterns:
            found.append(Variant(text, pattern=patterns[text]))
        else:
            found += _named(text, budgets)
    return found


def reads_as_name(text: str) -> bool:
    """Whether the text is a name with options, or a word in front, and no expression."""
    return ":" in text or text.startswith(PREFIXES)


def _named(text: str, budgets: list[int | float]) -> list[Variant]:
    """`cache=louis_kv:pages=8,page=32`; without a word in front a cache, where there is one of that name."""
    front, colon, behind = text.partition(":")
    kind, equals, name = front.rpartition("=")
    given = re.split(r"[,:](?=\w+=)", behind) if colon else []
    options = tuple(_option(each) for each in given)
    if kind != "attention":
        if name in POLICIES:
            return [Variant(name, budget, options) for budget in budgets]
        if name in FETCHING:
            return [_on_host(name, options)]
    if equals and kind + equals not in PREFIXES:
        raise UnknownNameError("variant", text, PREFIXES)
    if kind == "cache":
        raise UnknownNameError("cache", name, (*POLICIES, *FETCHING))
    if name == EXACT:
        return []
    _known(name)
    return [Variant(name, None, options)]


def _on_host(name: str, options: tuple[tuple[str, Any], ...]) -> Variant:
    """Raises for options that the cache does not have, before a model is loaded."""
    if name == "nosa" and "weights" not in dict(options):
        options = (*options, ("weights", EQUAL))
    Fetching.named(name, _with_weights(dict(options)))
    return Variant(name, None, options, cache=True)


def _with_weights(options: dict[str, Any]) -> dict[str, Any]:
    """`weights=FILE.py:NAME` as the function of that name, `weights=equal` as 0 for every key."""
    from foveal.cli._arguments import from_file

    text = options.get("weights")
    if not isinstance(text, str):
        return options
    return options | {"weights": _equal if text == EQUAL else from_file(text, "weights")}


def _equal(keys: Tensor, layer: int) -> Tensor:
    return keys.new_zeros(keys.shape[:3])


def _option(text: str) -> tuple[str, Any]:
    from foveal.cli._arguments import option

    try:
        return option(text)
    except argparse.ArgumentTypeError:
        needed = "NAME=VALUE is needed behind the name, such as gna:window=129"
        raise SelectionError("variant", repr(text), needed) from None


def _known(name: str) -> None:
    try:
        system(name)
    except UnknownNameError as error:
        known = tuple(dict.fromkeys((*POLICIES, *error.known)))
        raise UnknownNameError("variant", name, known) from None
