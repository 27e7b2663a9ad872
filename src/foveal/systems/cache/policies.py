"""Cache policies as operators: the newest query on what is kept of a prompt."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import OptionError
from foveal._judged import judged, need_square
from foveal.caches.policies import (
    ARKV,
    AVL,
    Counts,
    FastGen,
    Held,
    KVCompose,
    KVMerger,
    LtriLLM,
    Mustafar,
    PagedEviction,
    Policy,
    Reading,
    S3Attention,
    ScaleKV,
    SnapKV,
    TaskKV,
)
from foveal.patterns import Dense
from foveal.scores import Softmax
from foveal.systems.base import Claim, Draw, Identity, System

FAMILY = "cache"


@judged
def newest(policy: Policy, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None = None) -> Tensor:
    """o [B, 1, Hq, Dv] of the last query on what a policy keeps of a prompt.

    Shapes: q [B, L, Hq, D], k and v [B, L, Hkv, .]; tokens int64 [B, L], for policies that ask for them.
    """
    held, length = Held(), k.shape[1]
    need_square(q, k)
    if not len(q):  # a cache holds at least one sequence
        return attend(q[:, -1:], k, v, Dense())
    held.append(k, v)
    if policy.due(Counts(length, length, length)):
        keys, values, real, positions = held.everything()
        causal = not isinstance(policy, ScaleKV)
        reading = Reading(
            q, keys, values, real, positions, q.shape[-1] ** -0.5, causal=causal, tokens=tokens
        )
        with torch.set_grad_enabled(isinstance(policy, KVMerger) and torch.is_grad_enabled()):
            decision = policy.settle([policy.vote(reading)], length)[0]
        held.settle(decision)
    return held.attend(q[:, -1:], Softmax())


def policy_op(kind: type[Policy]) -> Callable[..., Tensor]:
    """op(q, k, v, *, option=default, ...) of a policy."""

    def op(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return newest(kind(**options), q, k, v)

    op.__doc__ = newest.__doc__
    return _with_options(op, kind)


def a_vl(q: Tensor, k: Tensor, v: Tensor, *, image: int = 0, **options: Any) -> Tensor:
    """As the others; the first `image` tokens of the prompt are those of an image."""
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image <= k.shape[1]:
        raise OptionError("image", image, f"0 to {k.shape[1]} tokens are needed")
    tokens = (torch.arange(k.shape[1]) < image).long().expand(len(k), -1)
    return newest(AVL(image=1, **options), q, k, v, tokens)


def _with_options(op: Callable[..., Tensor], kind: type[Policy]) -> Callable[..., Tensor]:
    parameters = [
        p for p in inspect.signature(op).parameters.values() if p.kind is not p.VAR_KEYWORD
    ]
    known = {p.name for p in parameters}
    for each in dataclasses.fields(kind):
        if each.name not in known:
            parameters.append(
                inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default)
            )
    op.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return op


def _prompt(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    return draw.qkv((draw.integer(9, 40),), heads=4, kv_heads=2)


def _all(op: Callable[..., Tensor]) -> Identity:
    def claim(draw: Draw) -> Claim:
        return Claim(
            _prompt(draw),
            lambda q, k, v: op(q, k, v, budget=64),
            lambda q, k, v: attend(q[:, -1:], k, v, Dense()),
        )

    return Identity("full_budget", "A budget that covers the prompt: dense attention.", claim)


def _linear(op: Callable[..., Tensor], **options: Any) -> Identity:
    """What is chosen by queries and keys alone is linear in the values."""

    def claim(draw: Draw) -> Claim:
        q, k, v = _prompt(draw)
        w = draw.normal(*v.shape)
        return Claim(
            (v, w),
            lambda v, w: op(q, k, v + 2 * w, budget=8, **options),
            lambda v, w: op(q, k, v, budget=8, **options) + 2 * op(q, k, w, budget=8, **options),
        )

    return Identity("linear_in_values", "Values play no part in the choice.", claim)


def _other_last(op: Callable[..., Tensor], **options: Any) -> Identity:
    """Scaled values: |v| / |k| keeps its order."""

    def claim(draw: Draw) -> Claim:
        q, k, v = _prompt(draw)
        return Claim(
            (v,),
            lambda v: op(q, k, 4 * v, budget=8, **options),
            lambda v: 4 * op(q, k, v, budget=8, **options),
        )

    return Identity("scaled_values", "Values four times as large: the same tokens.", claim)


def _dense_elements(draw: Draw) -> Claim:
    q, k, v = _prompt(draw)
    op = MUSTAFAR.op
    return Claim(
        (q, k, v),
        lambda q, k, v: op(q, k, v, budget=4, sparsity=0.0, recent=2),
        lambda q, k, v: attend(q[:, -1:], k, v, Dense()),
    )


_SHAPES = ({"grid": (4096,), "heads": 8, "kv_heads": 2, "head_dim": 64},)


def _entry(
    name: str, kind: type[Policy], title: str, year: int, paper: str, summary: str, *more: Identity
) -> System:
    op = _with_options(a_vl, AVL) if kind is AVL else policy_op(kind)
    return System(
        name=name,
        title=title,
        year=year,
        paper=paper,
        kind="operator",
        summary=summary,
        op=op,
        identities=(_all(op), *more),
        reference_shapes=_SHAPES,
        family=FAMILY,
        engine="torch",
    )


_SMALL = {"window": 4}
SNAPKV = _entry(
    "snapkv",
    SnapKV,
    "SnapKV: LLM Knows What You are Looking for Before Generation",
    2024,
    "Li et al.; arXiv 2404.14469",
    "The end of the prompt votes, pooled over neighbours, on which tokens each key head keeps.",
    _linear(policy_op(SnapKV), **_SMALL),
)
FASTGEN = _entry(
    "fastgen",
    FastGen,
    "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs",
    2023,
    "Ge et al.; arXiv 2310.01801",
    "Every head keeps the cheapest of nested sets that holds enough of its attention.",
    _linear(policy_op(FastGen)),
)
PAGED_EVICTION = _entry(
    "paged_eviction",
    PagedEviction,
    "PagedEviction: Structured Block-wise KV Cache Pruning for Efficient Large Language Model Inference",
    2025,
    "arXiv 2509.04377",
    "Tokens, then whole pages, leave by the norms of their values and keys.",
    _other_last(policy_op(PagedEviction), page_size=4),
)
ARKV_SYSTEM = _entry(
    "arkv",
    ARKV,
    "ARKV: Adaptive and Resource-Efficient KV Cache Management under Limited Memory Budget for "
    "Long-Context Inference in LLMs",
    2026,
    "Number not established",
    "Tokens are kept, kept in 8 bits or dropped, in shares that the prompt sets per layer.",
    _linear(policy_op(ARKV), **_SMALL),
)
TASK_KV = _entry(
    "task_kv",
    TaskKV,
    "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
    2025,
    "arXiv 2501.15113",
    "Heads far from the mean of their layer keep all tokens, the others first, newest and central ones.",
    _other_last(policy_op(TaskKV), window=4, sink_tokens=2, recent=3),
)
KV_MERGER = _entry(
    "kv_merger",
    KVMerger,
    "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks",
    2024,
    "Wang et al.; arXiv 2407.08454",
    "Runs of like keys become one token each, with Gaussian weights.",
    _linear(policy_op(KVMerger)),
)
KV_COMPOSE = _entry(
    "kv_compose",
    KVCompose,
    "KVCompose: Efficient Structured KV Cache Compression with Composite Tokens",
    2025,
    "arXiv 2509.05165",
    "Each head ranks its own tokens; layers compete for how many ranks they keep.",
    _linear(policy_op(KVCompose), **_SMALL),
)
SCALE_KV = _entry(
    "scale_kv",
    ScaleKV,
    "Memory-Efficient Visual Autoregressive Modeling with Scale-Aware KV Cache Compression",
    2025,
    "arXiv 2505.19602",
    "Drafting layers keep many tokens of earlier image scales, refining layers few, by 16 observers.",
    _linear(policy_op(ScaleKV)),
)
A_VL = _entry(
    "a_vl",
    AVL,
    "A-VL: Adaptive Attention for Large Vision-Language Models",
    2024,
    "arXiv 2409.14846",
    "Image tokens are attended to, stored, or dropped; text tokens kept by their attention.",
    _linear(a_vl, image=5),
)
MUSTAFAR = _entry(
    "mustafar",
    Mustafar,
    "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
    2025,
    "Joo et al.; arXiv 2505.22913",
    "Every token keeps the largest elements of its key and value, packed with a bitmap.",
    Identity("sparsity_0", "Nothing pruned: dense attention.", _dense_elements),
)
LTRI_LLM = _entry(
    "ltri_llm",
    LtriLLM,
    "Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular "
    "Attention Pattern",
    2024,
    "arXiv 2412.04757",
    "The past is cut into spans of self-contained attention; queries vote for the spans at hand.",
    _linear(policy_op(LtriLLM), window=4, span=3, recent=4, sink_tokens=1),
)
S3_ATTENTION = _entry(
    "s3_attention",
    S3Attention,
    "S^3-Attention: Attention-Aligned Endogenous Retrieval for Memory-Bounded Long-Context Inference",
    2026,
    "arXiv 2601.17702",
    "Sparse features of keys index places; spans that share features with the query stay.",
    _linear(policy_op(S3Attention), window=4, recent=3, sink_tokens=1),
)

POLICY_SYSTEMS = (
    SNAPKV,
    FASTGEN,
    PAGED_EVICTION,
    ARKV_SYSTEM,
    TASK_KV,
    KV_MERGER,
    KV_COMPOSE,
    SCALE_KV,
    A_VL,
    MUSTAFAR,
    LTRI_LLM,
    S3_ATTENTION,
)
