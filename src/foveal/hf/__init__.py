"""Any of this in a model of transformers, in one line."""

from foveal.hf.convert import Conversion, Schedule, convert, restore
from foveal.hf.use import new_cache, register, use, using

__all__ = [
    "Conversion",
    "Schedule",
    "convert",
    "new_cache",
    "register",
    "restore",
    "use",
    "using",
]
