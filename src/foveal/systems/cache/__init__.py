"""What lives in a cache, where, and what leaves it; projections that make it small."""

from foveal.systems.base import System
from foveal.systems.cache.editing import ATTENTION_EDITING
from foveal.systems.cache.policies import POLICY_SYSTEMS
from foveal.systems.cache.projections import PROJECTION_SYSTEMS
from foveal.systems.cache.stores import STORE_SYSTEMS

SYSTEMS: tuple[System, ...] = (
    *POLICY_SYSTEMS,
    *STORE_SYSTEMS,
    *PROJECTION_SYSTEMS,
    ATTENTION_EDITING,
)
