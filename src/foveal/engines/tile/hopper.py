"""The Hopper edition: warp-specialised kernels in Gluon for compute capability 9.0."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.engines.tile import triton
from foveal.engines.tile.compiling import start_triton
from foveal.engines.tile.lists import WalkLists, walk_lists
from foveal.engines.tile.parts import Task
from foveal.patterns.base import Extent, Pattern
from foveal.scores.normal import NormalForm

_HEAD_DIMS = range(16, 257, 8)
_BACKWARD_DIM = 128


def refuses(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    return (
        _refuses_machine(problem)
        or _refuses_sizes(problem)
        or _refuses_score(score)
        or _refuses_pattern(pattern, problem.extent)
    )


def caveat(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    """Why it runs only when named, or None."""
    if score.terms:
        from foveal.engines.tile.terms import BY_DISTANCE, term_kinds

        if BY_DISTANCE in term_kinds(score):
            return (
                "its slopes by distance were not measured to be faster than those of the portable "
                "edition, so it adds them only when it is named"
            )
    return None


def _refuses_machine(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"it runs on CUDA tensors; these are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not _has_gluon():
        return "this Triton has no Gluon with Hopper instructions; 3.6 or later is needed"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA device is present"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"it is written for compute capability 9.0; this device has {capability}"
    return None


@functools.lru_cache(maxsize=1)
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None


def _refuses_sizes(problem: Problem) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16; the tensors are {problem.dtype}"
    for name, size in (("head_dim", problem.head_dim), ("value_dim", problem.value_dim)):
        if size not in _HEAD_DIMS:
            return f"it needs a {name} from 16 to 256 in steps of 8; here it is {size}"
    if 0 in (problem.batch, problem.extent.Lq, problem.extent.Lk):
        return "it does not take empty tensors"
    return None


def _refuses_score(score: NormalForm) -> str | None:
    if score.terms:
        from foveal.engines.tile.terms import BY_DISTANCE, PER_KEY, refuses_terms, term_kinds

        kinds = term_kinds(score)
        if not kinds < {PER_KEY, BY_DISTANCE}:
            return (
                f"it adds one bias per key or one slope by distance, not {', '.join(sorted(kinds))}"
            )
        reason = refuses_terms(score)
        if reason is not None:
            return reason
    if score.scale <= 0:
        return f"it needs a positive scale; here it is {score.scale}"
    return None


def _refuses_pattern(pattern: Pattern, extent: Extent) -> str | None:
    return _refusal(pattern, extent) if pattern.depends_on_data else _kept(pattern, extent)


@functools.lru_cache(maxsize=256)
def _kept(pattern: Pattern, extent: Extent) -> str | None:
    return _refusal(pattern, extent)


def _refusal(pattern: Pattern, extent: Extent) -> str | None:
    """Why the pattern, or a part that it falls into, is walked neither along boxes nor along lists."""
    pattern = pattern.simplify(extent)
    parts = pattern.parts(extent)
    if parts is not None:
        reasons = (_refusal(part.pattern, part.extent) for part in parts)
        return next((reason for reason in reasons if reason is not None), None)
    if _in_boxes(pattern, extent):
        return None
    unit = pattern.tile_unit()
    if unit is not None and any(size % 128 for size in unit):
        return f"its lists hold blocks of multiples of 128 tokens; here they are {unit}"
    from foveal.engines.tile.launch import refuses_lists

    return refuses_lists(pattern, extent)


def _in_boxes(pattern: Pattern, extent: Extent) -> bool:
    return not pattern.depends_on_data and _has_bounds(pattern, extent)


@functools.lru_cache(maxsize=256)
def _has_bounds(pattern: Pattern, extent: Extent) -> bool:
    return pattern.bounds(extent) is not None


LSE_UNIT = 1.0


def forward(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse [N, Hq, Lq] of q [N, Lq, Hq, D], k and v [N, Lk, Hkv, D]."""
    start_triton()
    from foveal.engines.tile.hopper_forward import launch_forward

    pattern, lists = task.pattern, None
    if not _in_boxes(pattern, task.extent):
        pattern, lists = _lists(task, q.shape[2], max(q.shape[3], v.shape[3]), q.device)
    score, term = task.score, None
    if score.terms:
        from foveal.engines.tile.terms import local_terms

        (term,) = local_terms(task, task.whole)
    return launch_forward(
        pattern, task.extent, score.scale, q, k, v,
        lists=lists, soft_cap=score.soft_cap, sink=score.sink, term=term,
    )  # fmt: skip


def backward(
    task: Task,
    tensors: tuple[Tensor, ...],
    do: Tensor,
    dlse: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and of the sink; tensors are q, k, v, o and lse.

    By the kernels of the portable edition with a soft cap, with terms other than biases per key that
    need no gradient, where Dv is not D or more than 128, along lists in whose tested tiles some token sees
    more than two intervals, and with lists or biases where gradients have to repeat.
    """
    from foveal.engines.tile.hopper_backward import launch_backward

    score = task.score
    q, k, v, o, lse = tensors
    dims = q.shape[3], v.shape[3]
    own = dims[0] == dims[1] and dims[0] <= _BACKWARD_DIM
    own &= score.soft_cap is None and _adds(task, dims[0], needed)
    pattern, lists, biases = task.pattern, None, None
    if own and not _in_boxes(pattern, task.extent):
        static = _static_intervals(task)
        own = static is not None and not torch.are_deterministic_algorithms_enabled()
        if static is not None and own:
            pattern, lists = static, _backward_lists(task, q.shape[2], q.device)
    if not own:
        return triton.backward(task, (q, k, v, o, lse / triton.LSE_UNIT), do, dlse, needed)
    if score.terms:
        from foveal.engines.tile.terms import local_terms

        (term,) = local_terms(task, task.whole)
        biases = term.values.detach()
    found = launch_backward(
        pattern,
        task.extent,
        score.scale,
        q,
        k,
        v,
        o,
        lse,
        do,
        dlse,
        lists=lists,
        biases=biases,
    )
    none = (None,) * len(score.terms)
    if score.sink is None:
        return *found, *none
    sink = _sink_gradient(score.sink, o, lse, do, dlse) if needed[-1] else None
    return *found, *none, sink


def _adds(task: Task, head_dim: int, needed: tuple[bool, ...]) -> bool:
    """Whether the own backward adds the terms of the score: biases per key that need no gradient."""
    from foveal.engines.tile.hopper_plan import joint_pays
    from foveal.engines.tile.terms import PER_KEY, term_kinds

    terms = task.score.terms
    if not terms:
        return True
    if term_kinds(task.score) != {PER_KEY} or any(needed[3 : 3 + len(terms)]):
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    along_boxes = _in_boxes(task.pattern, task.extent)
    return not along_boxes or joint_pays(task.pattern, task.extent, head_dim)


def _sink_gradient(sink: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor) -> Tensor:
    """sum of exp(sink - lse) (dlse - o do) over the queries.  [Hq]"""
    delta = torch.einsum("nlhd,nlhd->nhl", o.float(), do.float()) - dlse
    share = torch.exp(sink.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(share * delta).sum((0, 2)).to(sink.dtype)


def _static_intervals(task: Task) -> Pattern | None:
    """What the tested tiles of lists hide, where a token sees one or two intervals of the others."""
    from foveal.engines.tile.launch import static_part

    static = static_part(task.pattern)
    return static if static is not None and _few_intervals(static, task.extent) else None


@functools.lru_cache(maxsize=64)
def _few_intervals(pattern: Pattern, extent: Extent) -> bool:
    from foveal.engines.tile.spans import spans

    bounds = pattern.bounds(extent)
    if bounds is not None:
        return len(bounds.lower) == 1
    if len(extent.kv_grid) > 1:
        return False
    return all(spans(pattern, extent, by_key) is not None for by_key in (False, True))


def _backward_lists(task: Task, heads: int, device: torch.device) -> tuple[WalkLists, WalkLists]:
    """The lists of queries and of keys."""
    from foveal.engines.tile.hopper_plan import JOINT_KEYS, JOINT_QUERIES
    from foveal.engines.tile.launch import writes

    call = task.pattern, task.extent, JOINT_QUERIES, JOINT_KEYS, heads, device
    found = writes(task.pattern)
    if found is None:
        return walk_lists(*call), walk_lists(*call, by_key=True)
    return _kept_lists(*call, found), _kept_lists(*call, found, True)


def _lists(
    task: Task, heads: int, head_dim: int, device: torch.device
) -> tuple[Pattern, WalkLists]:
    """What the tested tiles hide, and the lists; kept until they are written to."""
    from foveal.engines.tile.hopper_plan import list_tiles
    from foveal.engines.tile.launch import static_part, writes

    static = static_part(task.pattern)
    assert static is not None
    call = task.pattern, task.extent, *list_tiles(head_dim), heads, device
    found = writes(task.pattern)
    return static, walk_lists(*call) if found is None else _kept_lists(*call, found)


@functools.lru_cache(maxsize=24)
def _kept_lists(
    pattern: Pattern,
    extent: Extent,
    q_tile: int,
    kv_tile: int,
    heads: int,
    device: torch.device,
    written: tuple[int, ...],
    by_key: bool = False,
) -> WalkLists:
    return walk_lists(pattern, extent, q_tile, kv_tile, heads, device, by_key)
