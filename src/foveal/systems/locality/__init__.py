"""Windows, neighborhoods, axes and fixed sparse patterns."""

from foveal.systems.base import System
from foveal.systems.locality.factors import (
    CROSS_AXIS_ATTENTION,
    HT_DEMUCS,
    IFACTFORMER,
    S2_ATTENTION,
    SPARSE_TRANSFORMER,
)
from foveal.systems.locality.grids import HMAR, MVAR, SPHERE_ATTENTION, VAR
from foveal.systems.locality.groups import ESCAIP, HDT
from foveal.systems.locality.neighborhoods import (
    FUSED_NA,
    GNA,
    MEDVIT_DINA,
    NEIGHBORHOOD_ATTENTION,
    TCSR_NA,
)
from foveal.systems.locality.windows import (
    AXIAL_ATTENTION,
    BOX_ATTENTION,
    DILATED_WINDOW_3D,
    LOCAL_WINDOW,
    SLIDING_WINDOW,
    SWIN_WINDOWS,
    TKL_LOCAL_ATTENTION,
)

SYSTEMS: tuple[System, ...] = (
    NEIGHBORHOOD_ATTENTION,
    FUSED_NA,
    GNA,
    TCSR_NA,
    MEDVIT_DINA,
    SLIDING_WINDOW,
    LOCAL_WINDOW,
    SWIN_WINDOWS,
    AXIAL_ATTENTION,
    DILATED_WINDOW_3D,
    TKL_LOCAL_ATTENTION,
    BOX_ATTENTION,
    SPARSE_TRANSFORMER,
    S2_ATTENTION,
    CROSS_AXIS_ATTENTION,
    IFACTFORMER,
    HT_DEMUCS,
    VAR,
    HMAR,
    MVAR,
    SPHERE_ATTENTION,
    HDT,
    ESCAIP,
)
