"""foveal: every efficient attention mechanism behind one interface."""

import importlib as _importlib
import typing as _typing

from foveal import _operators_verbs as _operators_verbs  # exported programs name its operators
from foveal import errors
from foveal.patterns import (
    Axial,
    Blocks,
    BlockSelection,
    Causal,
    Chosen,
    ColumnSelection,
    Dense,
    Documents,
    Extent,
    Fixed,
    HeadSelection,
    Lifetimes,
    Neighborhood,
    Partition,
    Pattern,
    Rectangle,
    Rows,
    Scales,
    Sliding,
    SpanSelection,
    Sphere,
    Strided,
    TokenSelection,
    Tree,
)
from foveal.scores import (
    Alibi,
    Bias,
    Entmax,
    KeyBias,
    LocalLinear,
    Parallax,
    RelativeBias,
    Score,
    Softmax,
)
from foveal.systems import System, system, systems

if _typing.TYPE_CHECKING:
    from foveal._attend import attend
    from foveal._convolve import convolve
    from foveal._convolve_explain import (
        ConvolutionExplanation,
        explain_convolve,
        explain_fftconv,
        explain_local_mix,
    )
    from foveal._decode import decode
    from foveal._decode_explain import DecodeExplanation, explain_decode
    from foveal._explain import Explanation, explain
    from foveal._fftconv import fftconv
    from foveal._local_mix import local_mix
    from foveal._page_mass import page_mass
    from foveal._scan import scan, scan_step
    from foveal._scan_explain import ScanExplanation, explain_scan
    from foveal._scan_map import ChunkMap, scan_map
    from foveal._tiles import TileCounts, TileList, Tiles, tiles
    from foveal.engines.convolution.strips_problem import Strips
    from foveal.rules import MLSTM, Additive, Delta, Rule, TwoState

__version__ = "0.1.0"

# Found on first use: importing foveal is to take a third of a second at most.
_LATER = {
    "foveal._attend": ("attend",),
    "foveal._convolve": ("convolve",),
    "foveal._convolve_explain": (
        "ConvolutionExplanation",
        "explain_convolve",
        "explain_fftconv",
        "explain_local_mix",
    ),
    "foveal._decode": ("decode",),
    "foveal._decode_explain": ("DecodeExplanation", "explain_decode"),
    "foveal._explain": ("Explanation", "explain"),
    "foveal._fftconv": ("fftconv",),
    "foveal._local_mix": ("local_mix",),
    "foveal._page_mass": ("page_mass",),
    "foveal._scan": ("scan", "scan_step"),
    "foveal._scan_explain": ("ScanExplanation", "explain_scan"),
    "foveal._scan_map": ("ChunkMap", "scan_map"),
    "foveal._tiles": ("TileCounts", "TileList", "Tiles", "tiles"),
    "foveal.engines.convolution.strips_problem": ("Strips",),
    "foveal.rules": ("MLSTM", "Additive", "Delta", "Rule", "TwoState"),
}

_MODULES = ("caches", "hf")

__all__ = [
    "MLSTM",
    "Additive",
    "Alibi",
    "Axial",
    "Bias",
    "BlockSelection",
    "Blocks",
    "Causal",
    "Chosen",
    "ChunkMap",
    "ColumnSelection",
    "ConvolutionExplanation",
    "DecodeExplanation",
    "Delta",
    "Dense",
    "Documents",
    "Entmax",
    "Explanation",
    "Extent",
    "Fixed",
    "HeadSelection",
    "KeyBias",
    "Lifetimes",
    "LocalLinear",
    "Neighborhood",
    "Parallax",
    "Partition",
    "Pattern",
    "Rectangle",
    "RelativeBias",
    "Rows",
    "Rule",
    "Scales",
    "ScanExplanation",
    "Score",
    "Sliding",
    "Softmax",
    "SpanSelection",
    "Sphere",
    "Strided",
    "Strips",
    "System",
    "TileCounts",
    "TileList",
    "Tiles",
    "TokenSelection",
    "Tree",
    "TwoState",
    "attend",
    "convolve",
    "decode",
    "errors",
    "explain",
    "explain_convolve",
    "explain_decode",
    "explain_fftconv",
    "explain_local_mix",
    "explain_scan",
    "fftconv",
    "local_mix",
    "page_mass",
    "scan",
    "scan_map",
    "scan_step",
    "system",
    "systems",
    "tiles",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return _importlib.import_module(f"foveal.{name}")
    for module, names in _LATER.items():
        if name in names:
            found: object = getattr(_importlib.import_module(module), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
