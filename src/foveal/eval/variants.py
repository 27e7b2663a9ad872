"""What is put into a model for an evaluation: a system, a pattern, or a policy and a budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from foveal import hf
from foveal._errors import UnknownNameError
from foveal.caches.policies import POLICIES
from foveal.patterns import Pattern
from foveal.systems import system

EXACT = "dense"


@dataclass(frozen=True)
class Variant:
    """A way to run a model: attention or policy, by name, with its budget and options."""

    name: str
    budget: int | float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    pattern: Pattern | None = None

    @property
    def is_policy(self) -> bool:
        return self.name in POLICIES

    @property
    def label(self) -> str:
        """`snapkv, 0.25`"""
        return self.name if self.budget is None else f"{self.name}, {self.budget:g}"

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """The model with this in it; as before behind."""
        options = dict(self.options)
        if self.is_policy:
            with hf.using(model, cache=self.name, budget=self.budget, **options):
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
        name, *given = text.split(":") if text not in patterns else [text]
        options = tuple(_option(each) for part in given for each in part.split(","))
        if text in patterns:
            found.append(Variant(text, pattern=patterns[text]))
        elif name in POLICIES:
            found += [Variant(name, budget, options) for budget in budgets]
        elif name != EXACT:
            _known(name)
            found.append(Variant(name, None, options))
    return found


def _option(text: str) -> tuple[str, Any]:
    from foveal.cli._arguments import option

    return option(text)


def _known(name: str) -> None:
    try:
        system(name)
    except UnknownNameError as error:
        known = tuple(dict.fromkeys((*POLICIES, *error.known)))
        raise UnknownNameError("variant", name, known) from None
