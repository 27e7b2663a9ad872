"""The portable GPU edition, written in Triton: NVIDIA sm_80 and later, AMD gfx942."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.engines.tile.column_attend import KeyLists, listed_columns
from foveal.engines.tile.parts import Task
from foveal.engines.tile.token_lists import TokenLists, listed
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.dense import Dense
from foveal.scores.normal import NormalForm

if TYPE_CHECKING:
    from foveal.engines.tile.launch import Sizes

_LARGEST_DIM = 256
# Where tokens list their own blocks.
_LARGEST_BLOCK = 128
_LARGEST_GROUP = 64
# Queries that share a list of keys.
_LARGEST_LIST = 128


def refuses(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    if problem.device != "cuda" and not (problem.device == "cpu" and _interpreted()):
        return f"it runs on CUDA tensors; these are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if problem.dtype == torch.float64:
        return "GPU matrix units have no float64 edition here; use float32 or less"
    if problem.dtype == torch.bfloat16 and problem.device == "cpu":
        return "Triton's interpreter computes bfloat16 products wrongly"
    if max(problem.head_dim, problem.value_dim) > _LARGEST_DIM:
        return (
            f"its tiles hold a head_dim and value_dim of at most {_LARGEST_DIM}; "
            f"here are {problem.head_dim} and {problem.value_dim}"
        )
    narrow = 1 in (problem.head_dim, problem.value_dim) and problem.device == "cuda"
    if narrow and len(problem.extent.q_grid) > 1:
        return "Triton 3.6 does not compile the gradients of one channel on a grid"
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or later; this device has {capability}"
    from foveal.engines.tile.terms import refuses_terms

    if listed(pattern, problem.extent, problem.kv_heads) is not None:
        return _refuses_tokens(problem, pattern, score)
    columns = listed_columns(pattern)
    if columns is not None:
        return _refuses_columns(columns[0], score)
    return refuses_terms(score) or _refuses_pattern(pattern, problem)


def caveat(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    """Why it runs only when named, or None."""
    if not pattern.depends_on_data:
        return None
    lists = listed(pattern, problem.extent, problem.kv_heads)
    if lists is None:
        return None
    from foveal.engines.tile.token_attend import unchecked

    dims = problem.head_dim, problem.value_dim
    missing = unchecked(problem.dtype, *dims, problem.groups, lists.block)
    return None if missing is None else f"lists per token were not checked on a GPU {missing}"


def _refuses_tokens(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    """Why lists of single tokens are not walked, or None."""
    unit = pattern.tile_unit()
    if not score.plain:
        return "where tokens list their own blocks it knows a scale, no soft cap, sink or bias"
    if unit is not None and unit[1] > _LARGEST_BLOCK:
        return f"where tokens list their own blocks these hold at most {_LARGEST_BLOCK} keys, not {unit[1]}"
    if problem.groups > _LARGEST_GROUP:
        return f"where tokens list their own blocks a key head serves at most {_LARGEST_GROUP} query heads"
    return None


def _refuses_columns(selection: KeyLists, score: NormalForm) -> str | None:
    """Why single keys, runs and columns are not walked, or None."""
    rows = selection.queries_per_list
    if not score.plain:
        return "along keys, runs and columns it knows a scale, no soft cap, sink or bias"
    if rows > _LARGEST_LIST:
        return f"its lists of keys serve at most {_LARGEST_LIST} queries each, not {rows}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _refuses_pattern(pattern: Pattern, problem: Problem) -> str | None:
    if pattern.depends_on_data:
        return _refusal(pattern, problem.extent)
    return _kept_refusal(pattern, problem.extent)


@functools.lru_cache(maxsize=256)
def _kept_refusal(pattern: Pattern, extent: Extent) -> str | None:
    return _refusal(pattern, extent)


def _refusal(pattern: Pattern, extent: Extent) -> str | None:
    from foveal.engines.tile.launch import refuses_lists, separable

    parts = pattern.parts(extent)
    if parts:
        reasons = (_refusal(part.pattern, part.extent) for part in parts)
        return next((reason for reason in reasons if reason is not None), None)
    return None if separable(pattern, extent) else refuses_lists(pattern, extent)


LSE_UNIT = math.log(2)


def forward(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o [N, Lq, Hq, Dv] and base-2 lse [N, Hq, Lq] of q [N, Lq, Hq, D], k and v [N, Lk, Hkv, .]."""
    from foveal.engines.tile.forward import forward_launch
    from foveal.engines.tile.launch import heads_to_pack, scoring, stage
    from foveal.engines.tile.launches import compile_together
    from foveal.engines.tile.repair import repair_launch
    from foveal.engines.tile.terms import local_terms
    from foveal.tuning.tile import FORWARD

    lists = _token_lists(task, q, k)
    if lists is not None:
        from foveal.engines.tile import token_attend

        return token_attend.forward(_rows(q), _rows(k), _rows(v), lists, task.score.scale)
    columns = listed_columns(task.pattern)
    if columns is not None:
        from foveal.engines.tile import column_attend

        return column_attend.forward(_rows(q), _rows(k), _rows(v), *columns, task.score.scale)
    heads = q.shape[2]
    terms = local_terms(task, task.whole)
    packed = heads_to_pack(task, terms, heads // k.shape[2])
    chosen = stage(FORWARD, task, terms, _sizes(q, v), heads, packed)
    score = scoring(task, terms, heads)
    q, k, v = (_rows(x) for x in (q, k, v))
    attended = forward_launch(chosen, q, k, v, task.score.sink, score)
    launches = [attended.launch]
    if not isinstance(task.pattern, Dense):
        launches.append(repair_launch(chosen, q, k, v, attended, score))
    compile_together(launches, (chosen.spec, chosen.config), q)
    for each in launches:
        each()
    return attended.o, attended.lse


def backward(
    task: Task,
    tensors: tuple[Tensor, ...],
    do: Tensor,
    dlse: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, of the parameter of each term, and of the sink."""
    from foveal.engines.tile.gradients import gradients
    from foveal.engines.tile.terms import local_terms

    q, k, v, o, lse = tensors
    score = task.score
    lists = _token_lists(task, q, k)
    if lists is not None:
        from foveal.engines.tile import token_attend

        read = (_rows(q), _rows(k), _rows(v), o, lse)
        shift = dlse if task.with_lse else None
        return token_attend.backward(read, lists, score.scale, do, shift)
    if listed_columns(task.pattern) is not None:
        from foveal.engines.tile import column_attend

        read = (_rows(q), _rows(k), _rows(v), o, lse)
        shift = dlse if task.with_lse else None
        return column_attend.backward(read, task.pattern, task.extent, score.scale, do, shift)
    with torch.enable_grad():
        leaves = [
            term.parameter.detach().requires_grad_(wanted)
            for term, wanted in zip(score.terms, needed[3:], strict=False)
        ]
        sinks = () if score.sink is None else (score.sink,)
        own = dataclasses.replace(task, score=score.with_parameters((*leaves, *sinks)))
        terms = local_terms(own, task.whole)
    differentiable = tuple(term.values.requires_grad for term in terms)
    dq, dk, dv, d_sink, *d_values = gradients(
        own,
        tuple(dataclasses.replace(term, values=term.values.detach()) for term in terms),
        _sizes(q, v),
        (_rows(q), _rows(k), _rows(v), o, lse),
        score.sink,
        do,
        dlse,
        (*needed[:3], score.sink is not None and needed[-1], *differentiable),
    )
    d_leaves = _pull(leaves, [term.values for term in terms], d_values)
    return dq, dk, dv, *d_leaves, *((d_sink,) if sinks else ())


def _token_lists(task: Task, q: Tensor, k: Tensor) -> TokenLists | None:
    lists = listed(task.pattern, task.extent, k.shape[2])
    if lists is None:
        return None
    return dataclasses.replace(lists, indices=lists.indices.expand(len(q), -1, -1, -1))


def _pull(
    leaves: list[Tensor], values: list[Tensor], d_values: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of the parameters, given those of the values made from them."""
    pairs = [(x, d) for x, d in zip(values, d_values, strict=True) if d is not None]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(leaves)
    found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [d for _, d in pairs]))
    return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def _sizes(q: Tensor, v: Tensor) -> Sizes:
    from foveal.engines.tile.launch import Sizes

    return Sizes(q.shape[-1], v.shape[-1], q.dtype, q.device)


def _rows(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()
