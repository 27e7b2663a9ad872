"""Every exception of the library, each with its message template."""

from __future__ import annotations

import difflib

_MOST_LISTED = 40
"""Known names that a message lists where it has a guess."""


class FovealError(Exception):
    """Base class of all errors raised by foveal; they travel between processes."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(
    kind: type[FovealError], args: tuple[object, ...], attributes: dict[str, object]
) -> FovealError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class _ArgumentError(FovealError):
    """An argument that cannot be used: names it, shows what came, says what is needed."""

    def __init__(self, argument: str, got: object, needed: str) -> None:
        super().__init__(f"{argument}: got {got}; {needed}")
        self.argument = argument
        self.got = got
        self.needed = needed


class ShapeError(_ArgumentError, ValueError):
    """A tensor has the wrong rank or sizes, or head counts do not divide."""


class DtypeError(_ArgumentError, TypeError):
    """Tensors of different or unsupported element types."""


class DeviceError(_ArgumentError, ValueError):
    """Tensors on different devices."""


class PatternError(_ArgumentError, ValueError):
    """A pattern whose parameters are out of range, or do not fit the grid."""


class ScoreError(_ArgumentError, ValueError):
    """A score whose parameters or tensors do not fit the problem."""


class RuleError(_ArgumentError, ValueError):
    """A rule whose parameters are out of range, or a state or gate that it cannot use."""


class SelectionError(_ArgumentError, ValueError):
    """A block selection that breaks its contract."""


class PackingError(_ArgumentError, ValueError):
    """`cu_seqlens` that do not describe the packed tensors."""


class RefusedError(FovealError, ValueError):
    """The named implementation cannot run this problem."""

    def __init__(self, implementation: str, reason: str) -> None:
        super().__init__(f"implementation {implementation!r} refuses: {reason}")
        self.implementation = implementation
        self.reason = reason


class UnknownNameError(FovealError, ValueError):
    """A name that is not in a written list (system, implementation, suite, baseline)."""

    def __init__(self, kind: str, name: str, known: tuple[str, ...]) -> None:
        close = difflib.get_close_matches(str(name), known)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        listed = "" if close and len(known) > _MOST_LISTED else f"known: {', '.join(known)}"
        super().__init__(f"{kind}: got {name!r}; {hint}{listed}".rstrip())
        self.name = name
        self.known = known


class MissingDependencyError(FovealError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; {purpose} needs it: pip install 'foveal[{extra}]'"
        )
        self.package = package


class CacheError(_ArgumentError, ValueError):
    """Arguments that do not fit a cache, or a cache that cannot do what was asked."""


class OutOfPagesError(FovealError, RuntimeError):
    """A cache has too few free pages for what was asked; nothing was changed."""

    def __init__(self, needed: int, free: int, pages: int, page_size: int) -> None:
        super().__init__(
            f"pages: {needed} more are needed and {free} of {pages} (of {page_size} tokens) are free; "
            "the cache is unchanged: free or evict sequences, or build it with more pages"
        )
        self.needed = needed
        self.free = free
        self.pages = pages


class ConfinementError(FovealError, RuntimeError):
    """Code that nobody trusts cannot be confined here as it has to be."""


class TaskError(FovealError, ValueError):
    """A task of the kernel search that cannot be judged, or a file that describes none."""


class OptionError(_ArgumentError, ValueError):
    """An option of a layer or a system of the wrong kind, or out of range."""
