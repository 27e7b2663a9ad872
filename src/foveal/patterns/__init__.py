"""Which pairs of query and key take part: static values, combined with `&` and `|`."""

from foveal.patterns.axial import Axial
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.blocks import Blocks, BlockSelection
from foveal.patterns.combine import Intersection, Union
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.documents import Documents
from foveal.patterns.neighborhood import Neighborhood
from foveal.patterns.partition import Partition
from foveal.patterns.rectangle import Rectangle
from foveal.patterns.rows import Rows
from foveal.patterns.scales import Scales
from foveal.patterns.sliding import Sliding
from foveal.patterns.sphere import Sphere
from foveal.patterns.strided import Fixed, Strided
from foveal.patterns.tree import Tree

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
    "Rectangle",
    "Rows",
    "Scales",
    "Sliding",
    "Sphere",
    "Strided",
    "Tree",
    "Union",
]
