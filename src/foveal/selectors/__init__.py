"""How a selection of key blocks is found from q and k: selectors, budgets, and an order of the keys."""

from foveal.selectors.antidiagonal import Antidiagonal
from foveal.selectors.base import Budget, Selector, Tiling, select
from foveal.selectors.budgets import (
    Forced,
    Levels,
    Mass,
    PerHead,
    Projection,
    Threshold,
    TopK,
    TopRatio,
    load_plan,
    save_plan,
)
from foveal.selectors.centroids import Centroids, Clusters, cluster
from foveal.selectors.compressed import Compressed
from foveal.selectors.gated import LearnedGate
from foveal.selectors.key_scores import KeyScores
from foveal.selectors.last_queries import LastQueries
from foveal.selectors.low_bit import LowBit
from foveal.selectors.low_rank import LowRank, key_basis
from foveal.selectors.permute import by_importance, by_residue, permuted
from foveal.selectors.pooled import Pooled
from foveal.selectors.reuse import Reuse
from foveal.selectors.sampled import SampledMax
from foveal.selectors.stripes import Stripes
from foveal.selectors.vertical_slash import VerticalSlash

__all__ = [
    "Antidiagonal",
    "Budget",
    "Centroids",
    "Clusters",
    "Compressed",
    "Forced",
    "KeyScores",
    "LastQueries",
    "LearnedGate",
    "Levels",
    "LowBit",
    "LowRank",
    "Mass",
    "PerHead",
    "Pooled",
    "Projection",
    "Reuse",
    "SampledMax",
    "Selector",
    "Stripes",
    "Threshold",
    "Tiling",
    "TopK",
    "TopRatio",
    "VerticalSlash",
    "by_importance",
    "by_residue",
    "cluster",
    "key_basis",
    "load_plan",
    "permuted",
    "save_plan",
    "select",
]
