"""What a decode is asked to do, in numbers that no engine has to check again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._capture import as_one
from foveal._errors import DeviceError, DtypeError, PatternError, ScoreError, ShapeError
from foveal.caches.base import KVShape, Part
from foveal.caches.view import View
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.sliding import Sliding
from foveal.scores.base import Composed, Score
from foveal.scores.bias import Alibi, KeyBias
from foveal.scores.softmax import Softmax


@dataclass(frozen=True)
class DecodeProblem:
    """Sizes and kinds of one decode; `kinds` names how the rows of every part are kept.

    dims: of keys and values, as stored; units: the most lengths that a part holds; latent: values are
    channels of the keys; gaps: tokens were evicted between others; behind: the fewest newer tokens behind
    parts that keep entries with channels.
    """

    batch: int
    Lq: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    kinds: tuple[str, ...]
    dims: tuple[int, ...]
    page_sizes: tuple[int, ...]
    units: int
    latent: bool
    gaps: bool
    behind: int
    needs_grad: bool

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q_heads // self.kv_heads


@dataclass(frozen=True)
class Terms:
    """How a pair counts, and which pairs do.

    Query i of Lq sees stored key j if not causal, or if j <= length + after - Lq + i; with `left`, only
    keys at most `left` positions behind it, and those at the first `sink_tokens` positions.
    Shapes: sink [Hq]; key_bias [B or 1, 1 or Hkv or Hq, at least the longest length]; slopes [Hq].
    """

    scale: float
    soft_cap: float | None = None
    sink: Tensor | None = None
    key_bias: Tensor | None = None
    slopes: Tensor | None = None
    causal: bool = True
    left: int | None = None
    sink_tokens: int = 0


def describe_decode(q: Tensor, shape: KVShape, parts: Sequence[Part]) -> DecodeProblem:
    """Checks the queries against a cache of this shape and these parts."""
    if q.dim() != 4 or q.shape[0] != shape.batch or q.shape[3] != shape.head_dim or not q.shape[1]:
        needed = f"[{shape.batch}, Lq, Hq, {shape.head_dim}] with Lq of at least 1 is needed"
        raise ShapeError("q", list(q.shape), needed)
    if not q.shape[2] or q.shape[2] % shape.kv_heads:
        raise ShapeError("q", list(q.shape), f"heads that the {shape.kv_heads} key heads divide")
    if q.dtype != shape.dtype:
        raise DtypeError("q", q.dtype, f"the dtype of the cache, {shape.dtype}, is needed")
    if q.device != shape.device:
        raise DeviceError("q", q.device, f"the device of the cache, {shape.device}, is needed")
    views = [part.view for part in parts]
    behind = [view.behind for view in views if view.keys.codec.kind == "channels"]
    return DecodeProblem(
        batch=q.shape[0],
        Lq=q.shape[1],
        q_heads=q.shape[2],
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.values,
        dtype=q.dtype,
        device=q.device.type,
        kinds=tuple(view.keys.codec.kind for view in views),
        dims=tuple(n for view in views for n in (view.head_dim, view.value_dim)),
        page_sizes=tuple(view.page_size for view in views),
        units=max(view.lengths.numel() for view in views),
        latent=any(view.values is None for view in views),
        gaps=any(view.positions is not None for view in views),
        behind=min(behind) if behind else 0,
        needs_grad=torch.is_grad_enabled() and q.requires_grad,
    )


def describe_terms(
    problem: DecodeProblem, score: Score, pattern: Pattern, parts: Sequence[Part]
) -> Terms:
    """Checks score and pattern against the problem."""
    members = score.members if isinstance(score, Composed) else (score,)
    found: dict[type, Score] = {}
    for member in members:
        kind = type(member)
        if kind not in (Softmax, KeyBias, Alibi):
            raise ScoreError("score", score.key, "a sum of Softmax, KeyBias and Alibi is needed")
        if kind in found:
            raise ScoreError("score", score.key, f"at most one {kind.__name__} is needed in a sum")
        found[kind] = member
    softmax, bias, alibi = found.get(Softmax, Softmax()), found.get(KeyBias), found.get(Alibi)
    assert isinstance(softmax, Softmax)
    heads = problem.q_heads
    key_bias = bias.tensor if isinstance(bias, KeyBias) else None
    slopes = alibi.slopes if isinstance(alibi, Alibi) else None
    for name, x in (("sink", softmax.sink), ("slopes", slopes)):
        if x is not None and tuple(x.shape) != (heads,):
            raise ScoreError(
                name, list(x.shape), f"one number per query head, [{heads}], is needed"
            )
    if key_bias is not None:
        if len(problem.kinds) > 1:
            raise ScoreError(
                "KeyBias", "a cache of several parts", "a cache built with biased=True is needed"
            )
        sizes, allowed = tuple(key_bias.shape), {1, problem.kv_heads, heads}
        if len(sizes) != 3 or sizes[0] not in (1, problem.batch) or sizes[1] not in allowed:
            needed = (
                f"[{problem.batch} or 1, one of {sorted(allowed)}, the longest length] is needed"
            )
            raise ScoreError("KeyBias", list(sizes), needed)
        if not as_one(key_bias):
            check_key_bias(key_bias, parts[0].view)
    for name, x in (("sink", softmax.sink), ("slopes", slopes), ("KeyBias", key_bias)):
        if x is not None and not x.is_floating_point():
            raise DtypeError(name, x.dtype, "a floating dtype is needed")
        if x is not None and x.device.type != problem.device:
            raise DeviceError(name, x.device, "the device of q is needed")
    scale = problem.head_dim**-0.5 if softmax.scale is None else softmax.scale
    causal, left, sink_tokens = reach(pattern)
    return Terms(scale, softmax.soft_cap, softmax.sink, key_bias, slopes, causal, left, sink_tokens)


def check_key_bias(key_bias: Tensor | None, view: View) -> None:
    """Raises ScoreError for one that is shorter than what the view holds."""
    if key_bias is None:
        return
    longest = max(n for row in view.host_lengths for n in row)
    if key_bias.shape[2] < longest:
        needed = f"at least {longest} of them along the last axis are needed"
        raise ScoreError("KeyBias", list(key_bias.shape), needed)


def reach(pattern: Pattern) -> tuple[bool, int | None, int]:
    """causal, left and sink_tokens of a pattern that a decode takes."""
    if isinstance(pattern, Dense):
        return False, None, 0
    if isinstance(pattern, Causal):
        return True, None, 0
    if isinstance(pattern, Sliding) and pattern.right == 0:
        return True, pattern.left, pattern.sink_tokens
    raise PatternError(
        "pattern", pattern, "Causal(), Dense() or Sliding(left, 0, sink_tokens) is needed"
    )
