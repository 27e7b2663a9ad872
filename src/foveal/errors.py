"""Every exception of the library, under its public name."""

from foveal._errors import (
    DeviceError,
    DtypeError,
    FovealError,
    MissingDependencyError,
    PackingError,
    PatternError,
    RefusedError,
    RuleError,
    ScoreError,
    SelectionError,
    ShapeError,
    UnknownNameError,
)

__all__ = [
    "DeviceError",
    "DtypeError",
    "FovealError",
    "MissingDependencyError",
    "PackingError",
    "PatternError",
    "RefusedError",
    "RuleError",
    "ScoreError",
    "SelectionError",
    "ShapeError",
    "UnknownNameError",
]
