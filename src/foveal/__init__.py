"""foveal: every efficient attention mechanism behind one interface."""

from foveal import errors
from foveal._attend import attend
from foveal._explain import Explanation, explain
from foveal._scan import scan, scan_step
from foveal._scan_explain import ScanExplanation, explain_scan
from foveal._scan_map import ChunkMap, scan_map
from foveal._tiles import TileCounts, TileList, Tiles, tiles
from foveal.patterns import (
    Axial,
    Blocks,
    BlockSelection,
    Causal,
    Dense,
    Documents,
    Extent,
    Fixed,
    Neighborhood,
    Partition,
    Pattern,
    Rectangle,
    Rows,
    Scales,
    Sliding,
    Sphere,
    Strided,
    Tree,
)
from foveal.rules import MLSTM, Additive, Delta, Rule
from foveal.scores import Alibi, Bias, KeyBias, RelativeBias, Score, Softmax
from foveal.systems import System, system, systems

__version__ = "0.1.0"

__all__ = [
    "MLSTM",
    "Additive",
    "Alibi",
    "Axial",
    "Bias",
    "BlockSelection",
    "Blocks",
    "Causal",
    "ChunkMap",
    "Delta",
    "Dense",
    "Documents",
    "Explanation",
    "Extent",
    "Fixed",
    "KeyBias",
    "Neighborhood",
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
    "Sphere",
    "Strided",
    "System",
    "TileCounts",
    "TileList",
    "Tiles",
    "Tree",
    "attend",
    "errors",
    "explain",
    "explain_scan",
    "scan",
    "scan_map",
    "scan_step",
    "system",
    "systems",
    "tiles",
]
