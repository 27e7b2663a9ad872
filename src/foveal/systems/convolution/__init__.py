"""Large, dynamic and long convolutions as attention."""

from foveal.systems.base import System
from foveal.systems.convolution import dynamic, generated, long, static

SYSTEMS: tuple[System, ...] = (
    *static.SYSTEMS,
    *dynamic.SYSTEMS,
    *generated.SYSTEMS,
    *long.SYSTEMS,
)
