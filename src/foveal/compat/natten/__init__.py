"""NATTEN 0.21 by its own names: `import foveal.compat.natten as natten`.

Operators and modules take NATTEN's arguments with NATTEN's meaning.  Arguments that steer its
kernels (tile shapes, schedules, splits) are accepted and mean nothing here; a value other than the
default is answered by an `IgnoredArgumentWarning` that says so.  Beyond NATTEN: a window of one token,
float64, gradients through the lse, and the unfused pair with relative position biases, which it dropped.
"""

from foveal.compat.natten.fused import attention, merge_attentions, na1d, na2d, na3d
from foveal.compat.natten.ignored import IgnoredArgumentWarning
from foveal.compat.natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from foveal.compat.natten.settings import (
    are_deterministic_algorithms_enabled,
    get_memory_usage_preference,
    is_kv_parallelism_in_fused_na_enabled,
    set_memory_usage_preference,
    use_deterministic_algorithms,
    use_kv_parallelism_in_fused_na,
)
from foveal.compat.natten.unfused import (
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
    na_av,
    na_qk,
)

__all__ = [
    "IgnoredArgumentWarning",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "are_deterministic_algorithms_enabled",
    "attention",
    "get_memory_usage_preference",
    "is_kv_parallelism_in_fused_na_enabled",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na_av",
    "na_qk",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]
