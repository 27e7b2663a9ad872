"""Where keys and values live between the steps of a decoder."""

from foveal.caches.base import Cache, KVShape
from foveal.caches.contiguous import Contiguous
from foveal.caches.joined import Joined, Shared
from foveal.caches.latent import Latent
from foveal.caches.low_rank import LowRank
from foveal.caches.offloaded import Offloaded
from foveal.caches.paged import Paged
from foveal.caches.pruned import Pruned
from foveal.caches.quantised import Quantised
from foveal.caches.virtual_contiguous import VirtualContiguous

__all__ = [
    "Cache",
    "Contiguous",
    "Joined",
    "KVShape",
    "Latent",
    "LowRank",
    "Offloaded",
    "Paged",
    "Pruned",
    "Quantised",
    "Shared",
    "VirtualContiguous",
]
