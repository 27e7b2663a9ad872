"""Which pairs of query and key take part: static values, combined with `&` and `|`."""

from foveal.patterns.axial import Axial
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.blocks import Blocks, BlockSelection
from foveal.patterns.combine import Intersection, Union
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.documents import Documents
from foveal.patterns.neighborhood import Neighborhood
from foveal.patterns.partition import Partition
from foveal.patterns.sliding import Sliding
from foveal.patterns.strided import Fixed, Strided

__all__ = [
    "Axial",
    "BlockSelection",
    "Blocks",
    "Causal",
    "Dense",
    "Documents",
    "Extent",
    "Fixed",
    "Intersection",
    "Neighborhood",
    "Partition",
    "Pattern",
    "Sliding",
    "Strided",
    "Union",
]
