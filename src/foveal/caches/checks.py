"""What every cache asks of the numbers and lists that it is given."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import SupportsIndex

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._errors import CacheError, DtypeError


def need_whole(least: int, **arguments: object) -> None:
    """Raises CacheError for an argument that is no integer of at least `least`."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CacheError(name, value, f"an integer of at least {least} is needed")


def whole_numbers(name: str, values: object, count: int | None = None) -> list[int]:
    """The integers of a list or of a tensor [n], `count` of them where that is given."""
    given = values.tolist() if isinstance(values, Tensor) and values.dim() == 1 else values
    found = (
        _indices(given) if isinstance(given, Iterable) and not isinstance(given, Tensor) else None
    )
    if found is None or (count is not None and len(found) != count):
        needed = "a list of integers" if count is None else f"a list of {count} integers"
        raise CacheError(name, values, f"{needed} is needed")
    return found


def sequence_numbers(name: str, values: object, batch: int) -> list[int]:
    """The same, of numbers of sequences."""
    found = whole_numbers(name, values)
    if any(not 0 <= b < batch for b in found):
        raise CacheError(name, found, f"numbers from 0 to {batch - 1} are needed")
    return found


def number_rows(name: str, values: object, batch: int, heads: int) -> list[list[int]]:
    """The integers of `batch` lists of `heads` each."""
    rows = list(values) if isinstance(values, Iterable) else []
    if len(rows) != batch:
        raise CacheError(name, values, f"{batch} lists of {heads} integers are needed")
    return [whole_numbers(name, row, heads) for row in rows]


def need_places(**arguments: object) -> None:
    """Raises for an argument that is no tensor of places or numbers; an empty one may have any dtype."""
    need_tensors(**arguments)
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.numel() and (x.is_floating_point() or x.dtype == torch.bool):
            raise DtypeError(name, x.dtype, "an integer dtype is needed")


def _indices(values: Iterable[SupportsIndex]) -> list[int] | None:
    try:
        return [operator.index(n) for n in values]
    except TypeError:  # something else than an integer
        return None
