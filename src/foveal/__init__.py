"""foveal: every efficient attention mechanism behind one interface."""

from foveal import errors
from foveal._attend import attend
from foveal._explain import Explanation, explain
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
    Sliding,
    Strided,
)
from foveal.scores import Alibi, Bias, KeyBias, RelativeBias, Score, Softmax
from foveal.systems import System, system, systems

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "Axial",
    "Bias",
    "BlockSelection",
    "Blocks",
    "Causal",
    "Dense",
    "Documents",
    "Explanation",
    "Extent",
    "Fixed",
    "KeyBias",
    "Neighborhood",
    "Partition",
    "Pattern",
    "RelativeBias",
    "Score",
    "Sliding",
    "Softmax",
    "Strided",
    "System",
    "attend",
    "errors",
    "explain",
    "system",
    "systems",
]
