"""Where keys and values live between the steps of a decoder, and the policies that act on them."""

import importlib as _importlib
from typing import Any as _Any

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

# Found on first use: policies stand on the verbs that read these caches.
_POLICIES = (
    "ARKV",
    "AVL",
    "ElasticCache",
    "FastGen",
    "KVCompose",
    "KVMerger",
    "LtriLLM",
    "Mustafar",
    "PagedEviction",
    "S3Attention",
    "ScaleKV",
    "SnapKV",
    "TaskKV",
)


def __getattr__(name: str) -> _Any:
    if name != "policies" and name not in _POLICIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module("foveal.caches.policies")
    return module if name == "policies" else getattr(module, name)
