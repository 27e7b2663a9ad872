"""Small jit functions that a kernel receives as one compile-time value."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Jit functions by name; a kernel calls them as `HOOKS.name(...)`."""

    @property
    def cache_key(self) -> str:
        """What the compiler's disk cache must know: the source of every function."""
        functions = (getattr(self, field.name) for field in dataclasses.fields(self))
        return " ".join(str(function.cache_key) for function in functions)
