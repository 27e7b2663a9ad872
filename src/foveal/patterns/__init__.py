"""Which pairs of query and key take part: static values, combined with `&` and `|`."""

from foveal.patterns.axial import Axial
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.blocks import Blocks, BlockSelection
from foveal.patterns.combine import Intersection, Union
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.documents import Documents
from foveal.patterns.lifetimes import Lifetimes
from foveal.patterns.neighborhood import Neighborhood
from foveal.patterns.partition import Partition
from foveal.patterns.rectangle import Rectangle
from foveal.patterns.rows import Rows
from foveal.patterns.scales import Scales
from foveal.patterns.selections import (
    Chosen,
    ColumnSelection,
    HeadSelection,
    SpanSelection,
    TokenSelection,
)
from foveal.patterns.sliding import Sliding
from foveal.patterns.sphere import Sphere
from foveal.patterns.strided import Fixed, Strided
from foveal.patterns.tree import Tree

__all__ = [
    "Axial",
    "BlockSelection",
    "Blocks",
    "Causal",
    "Chosen",
    "ColumnSelection",
    "Dense",
    "Documents",
    "Extent",
    "Fixed",
    "HeadSelection",
    "Intersection",
    "Lifetimes",
    "Neighborhood",
    "Partition",
    "Pattern",
    "Rectangle",
    "Rows",
    "Scales",
    "Sliding",
    "SpanSelection",
    "Sphere",
    "Strided",
    "TokenSelection",
    "Tree",
    "Union",
]
