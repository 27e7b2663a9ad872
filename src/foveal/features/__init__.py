"""Feature maps: functions of q and k whose products are the weights of linear attention."""

from foveal.features.slopes import alibi_slopes, linear_slopes
from foveal.features.taylor import taylor

__all__ = ["alibi_slopes", "linear_slopes", "taylor"]
