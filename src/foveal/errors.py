"""Every exception of the library, under its public name."""

from foveal._errors import (
    CacheError,
    ConfinementError,
    DeviceError,
    DtypeError,
    FovealError,
    MissingDependencyError,
    OutOfPagesError,
    PackingError,
    PatternError,
    RefusedError,
    RuleError,
    ScoreError,
    SelectionError,
    ShapeError,
    TaskError,
    UnknownNameError,
)

__all__ = [
    "CacheError",
    "ConfinementError",
    "DeviceError",
    "DtypeError",
    "FovealError",
    "MissingDependencyError",
    "OutOfPagesError",
    "PackingError",
    "PatternError",
    "RefusedError",
    "RuleError",
    "ScoreError",
    "SelectionError",
    "ShapeError",
    "TaskError",
    "UnknownNameError",
]
