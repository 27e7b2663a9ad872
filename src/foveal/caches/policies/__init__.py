"""What leaves a cache, and when: one policy per file, found by name."""

from foveal._errors import RefusedError, UnknownNameError
from foveal.caches.policies.a_vl import AVL
from foveal.caches.policies.arkv import ARKV
from foveal.caches.policies.base import Counts, Decision, Merge, Policy, Reading, Vote
from foveal.caches.policies.elastic_cache import DiffusionLayer, ElasticCache, ElasticState
from foveal.caches.policies.fastgen import FastGen
from foveal.caches.policies.held import Held
from foveal.caches.policies.kv_compose import KVCompose
from foveal.caches.policies.kv_merger import KVMerger
from foveal.caches.policies.ltri_llm import LtriLLM
from foveal.caches.policies.mustafar import Mustafar
from foveal.caches.policies.paged_eviction import PagedEviction
from foveal.caches.policies.s3_attention import S3Attention
from foveal.caches.policies.scale_kv import ScaleKV
from foveal.caches.policies.snapkv import SnapKV
from foveal.caches.policies.task_kv import TaskKV

POLICIES: dict[str, type[Policy]] = {
    "a_vl": AVL,
    "arkv": ARKV,
    "fastgen": FastGen,
    "kv_compose": KVCompose,
    "kv_merger": KVMerger,
    "ltri_llm": LtriLLM,
    "mustafar": Mustafar,
    "paged_eviction": PagedEviction,
    "s3_attention": S3Attention,
    "scale_kv": ScaleKV,
    "snapkv": SnapKV,
    "task_kv": TaskKV,
}

__all__ = [
    "ARKV",
    "AVL",
    "POLICIES",
    "Counts",
    "Decision",
    "DiffusionLayer",
    "ElasticCache",
    "ElasticState",
    "FastGen",
    "Held",
    "KVCompose",
    "KVMerger",
    "LtriLLM",
    "Merge",
    "Mustafar",
    "PagedEviction",
    "Policy",
    "Reading",
    "S3Attention",
    "ScaleKV",
    "SnapKV",
    "TaskKV",
    "Vote",
    "policy_class",
]


def policy_class(name: str, beside: tuple[str, ...] = ()) -> type[Policy]:
    """The policy of that name; UnknownNameError, with close matches, when there is none.

    Options: beside, other names that the caller knows.
    """
    if name == "elastic_cache":
        reason = "it refreshes networks that look both ways: foveal.caches.policies.ElasticCache runs one"
        raise RefusedError(name, reason)
    if name not in POLICIES:
        kind = "cache" if beside else "cache policy"
        raise UnknownNameError(kind, name, (*POLICIES, *beside))
    return POLICIES[name]
