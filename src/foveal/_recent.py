"""What was found for the last few keys, so that it is found once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The values of the `size` keys that were used last; the key used longest ago is forgotten."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: dict[Hashable, Value] = {}

    def get(self, key: Hashable) -> Value | None:
        # Taken out and put back: the order of the dictionary is the order of use.
        value = self._values.pop(key, None)
        if value is not None:
            self._values[key] = value
        return value

    def put(self, key: Hashable, value: Value) -> None:
        self._values[key] = value
        # Listed in one step: another thread may put at the same time.
        for oldest in list(self._values)[: -self._size]:
            self._values.pop(oldest, None)
