"""The class of a pattern by which sizes of kernels are looked up."""

from __future__ import annotations

from foveal.patterns.base import Pattern
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.documents import Packed
from foveal.tuning.tables import CAUSAL, DENSE, DOCUMENTS, LISTS, WINDOW

_WHOLE: dict[type[Pattern], str] = {Dense: DENSE, Causal: CAUSAL}


def kind_of(pattern: Pattern, intervals: bool) -> str:
    """DENSE, CAUSAL, WINDOW, LISTS or DOCUMENTS; intervals: whether the pattern is a product of intervals."""
    found = _WHOLE.get(type(pattern))
    if found is not None:
        return found
    if not intervals:
        return LISTS
    return DOCUMENTS if _packed(pattern) else WINDOW


def _packed(pattern: Pattern) -> bool:
    members: tuple[Pattern, ...] = getattr(pattern, "members", ())
    return isinstance(pattern, Packed) or any(_packed(member) for member in members)
