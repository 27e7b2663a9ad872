"""The GPU edition of the state engine, written in Triton: NVIDIA sm_80 and later, AMD gfx942."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from foveal._recent import Recent
from foveal.engines.common.current import on
from foveal.engines.common.once import once_differentiable
from foveal.engines.state.problem import ScanProblem
from foveal.rules.additive import Additive
from foveal.rules.base import Parts, Recurrence, Rule, divided
from foveal.rules.delta import Delta
from foveal.tuning.state import CHUNK, measuring, piece_of, processors, tuning

if TYPE_CHECKING:
    from foveal.engines.state.task import Gradients

_LARGEST_DIM = 256


def refuses(problem: ScanProblem, rule: Rule) -> str | None:
    if problem.device != "cuda" and not (problem.device == "cpu" and _interpreted()):
        return f"it runs on CUDA tensors; these are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if problem.dtype == torch.float64:
        return "GPU matrix units have no float64 edition here; use float32 or less"
    if problem.dtype == torch.bfloat16 and problem.device == "cpu":
        return "Triton's interpreter computes bfloat16 products wrongly"
    if problem.head_dim > _LARGEST_DIM:
        return f"its tiles hold a head_dim of at most {_LARGEST_DIM}; here is {problem.head_dim}"
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or later; this device has {capability}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def scan(
    problem: ScanProblem, rule: Rule, plain: Recurrence, initial: Parts | None
) -> tuple[Tensor, Parts]:
    """o [T, Hv, Dv] in the dtype of v and the final state."""
    linear, finish = rule.recurrence(plain, initial)
    step = not problem.needs_grad and set(problem.lengths) == {1}
    if step:
        from foveal.engines.state.launch import launch_step as run
    else:
        run = partial(_run, training=problem.needs_grad)
    with on(plain.v.device):
        if linear.divisor is not None and (step or not _in_pieces(linear)):
            o, state = finish(*divided(linear, run))
        else:
            o, state = finish(*run(linear))
    return o.to(plain.v.dtype), state


def pieces(problem: ScanProblem, rule: Rule) -> int:
    """In how many pieces, which start at once, the sequences of a scan are cut."""
    decay = ("none", "fixed", "token", "channel").index(problem.decay)
    sizes = problem.dtype, problem.head_dim, problem.value_heads, problem.value_dim
    bulk = False
    if problem.device == "cuda" and not problem.needs_grad and rule == Additive():
        from foveal.engines.state.task import adds_in_bulk

        bulk = adds_in_bulk(*sizes[:2], problem.value_dim, decay, problem.gated, problem.lengths)
    delta = isinstance(rule, Delta)
    return _pieces(problem.lengths, *sizes, delta, decay, problem.device, bulk)


def _pieces(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    value_dim: int,
    delta: bool,
    decay: int,
    device: str,
    bulk: bool = False,
) -> int:
    found = tuning(dtype, head_dim, delta, decay)
    if bulk:
        found = dataclasses.replace(found, piece=0)
    each = piece_of(lengths, (heads, head_dim + value_dim), delta, found, processors(device))
    return sum(max(-(-length // (each * CHUNK)), 1) for length in lengths)


def _run(linear: Recurrence, training: bool) -> tuple[Tensor, Tensor]:
    if not training and _repeats(linear):
        return _repeated(linear)
    _prepare(linear, training)
    rest = dataclasses.replace(linear, log_decay=None, write_gate=None, initial=None)
    rest = dataclasses.replace(rest, **dict.fromkeys(("q", "k", "v")))  # type: ignore[arg-type]
    o, memory = _StateScan.apply(  # type: ignore[no-untyped-call]
        linear.q,
        linear.k,
        linear.v,
        linear.log_decay,
        linear.write_gate,
        linear.initial,
        rest,
        training,
    )
    return o, memory


_REPLAYS: Recent[Any] = Recent(64)


def _repeats(linear: Recurrence) -> bool:
    """Whether the launches of a forward may be prepared once: the delta rule computes nothing beside them.

    On Hopper with 16 bits, where they are short enough for it to matter.
    """
    from foveal.engines.state.task import has_bulk_copies

    if not (linear.delta and linear.v.device.type == "cuda" and len(linear.v)):
        return False
    if linear.v.dtype not in (torch.bfloat16, torch.float16) or not has_bulk_copies():
        return False
    fixed = linear.log_decay is not None and linear.log_decay.dim() == 1
    seen = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
    tangents = forward_ad._current_level >= 0
    return not (fixed or seen or tangents or measuring())


def _repeated(linear: Recurrence) -> tuple[Tensor, Tensor]:
    """o and the final states without a step of autograd, by launches of an earlier call of this kind."""
    from foveal.engines.state.task import cut_by
    from foveal.engines.tile.replay import replayed

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (linear.q, linear.k, linear.v))
    decay, gate, initial = linear.log_decay, linear.write_gate, linear.initial
    decay = None if decay is None else decay.contiguous()
    gate = None if gate is None else gate.float().contiguous()
    initial = None if initial is None else initial.float().contiguous()
    tensors = (q, k, v, decay, gate, initial)
    given = [x for x in tensors if x is not None]
    kind = (
        q.device, q.dtype, None if decay is None else decay.dtype, gate is None, initial is None,
        linear.scale, linear.lengths, cut_by(),
    )  # fmt: skip
    same = _whole(linear, tensors)
    o, final = replayed(_REPLAYS, kind, given, lambda: _forward(same, False)[:2])
    assert o is not None
    assert final is not None
    return o, final


_PREPARED: set[tuple[Any, ...]] = set()


def _prepare(linear: Recurrence, training: bool) -> None:
    """Compiles all kernels of a new kind of problem side by side, those of its backward too."""
    if linear.v.device.type != "cuda" or not len(linear.v):
        return
    floor = None if linear.divisor is None else linear.divisor.floor
    gates = (linear.log_decay, linear.write_gate, linear.initial)
    tensors = (linear.q, linear.k, linear.v, *gates, floor)
    kinds = tuple(
        (x.dtype, x.shape[1:], x.stride(), x.requires_grad) if isinstance(x, Tensor) else x
        for x in tensors
    )
    decay = 0 if linear.log_decay is None else linear.log_decay.dim()
    sizes = linear.v.dtype, linear.k.shape[-1], linear.v.shape[1], linear.v.shape[2]
    split = _pieces(linear.lengths, *sizes, linear.delta, decay, "cuda") > len(linear.lengths)
    kind = (kinds, linear.delta, training, split, linear.v.device)
    if kind in _PREPARED:
        return
    from foveal.engines.state.task import recorded
    from foveal.engines.tile.compiling import compile_side_by_side

    shapes = _whole(linear, tuple(None if x is None else _shape(x) for x in tensors[:6]))
    if linear.divisor is not None and isinstance(floor, Tensor):
        shapes = dataclasses.replace(shapes, divisor=linear.divisor._replace(floor=_shape(floor)))
    wanted = tuple(x is not None and x.requires_grad for x in gates)
    with recorded() as calls:
        o, final, kept = _forward(shapes, training)
        if training:
            _gradients(shapes, o, final, kept, wanted)
    compile_side_by_side(calls, linear.v.device)
    _PREPARED.add(kind)


def _shape(x: Tensor) -> Tensor:
    """A tensor without memory, of the same shape, strides and type."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class _StateScan(torch.autograd.Function):
    """o [T, Hv, Dv] and the final state [N, Hv, Dk, Dv] of a recurrence."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        write_gate: Tensor | None,
        initial: Tensor | None,
        rest: Recurrence,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        linear = _whole(rest, (q, k, v, log_decay, write_gate, initial))
        o, final, kept = _forward(linear, training)
        ctx.save_for_backward(q, k, v, log_decay, write_gate, initial, *kept)
        ctx.rest = rest
        return o, final

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # a checkpoint gives them once
        inputs, kept = saved[:6], saved[6:]
        linear = _whole(ctx.rest, inputs)
        wanted = ctx.needs_input_grad[3:6]
        return (*_backward(linear, do, dfinal, kept, wanted), None, None)


def _whole(rest: Recurrence, tensors: tuple[Any, ...]) -> Recurrence:
    names = ("q", "k", "v", "log_decay", "write_gate", "initial")
    return dataclasses.replace(rest, **dict(zip(names, tensors, strict=True)))


def _in_pieces(linear: Recurrence) -> bool:
    """Whether the backward is that of an additive rule, of which all pieces start at once."""
    return not (linear.delta or linear.per_channel or linear.k.shape[-1] > 128)


def _forward(linear: Recurrence, training: bool) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """o, the final state, and what the backward of an additive rule needs."""
    from foveal.engines.state.launch import launch_delta, launch_pairs
    from foveal.engines.state.launch_additive import launch_additive
    from foveal.engines.state.task import task

    job = task(linear, training, whole_sums=False)
    shape = (len(job.lengths), job.heads, job.dims[0], job.dims[1] + (linear.divisor is not None))
    initial = None if linear.initial is None else linear.initial.float().contiguous()
    if not len(job.q):
        final = job.scratch(*shape, dtype=torch.float32)
        final = final.zero_() if initial is None else initial.clone()
        return torch.zeros_like(linear.v), final, (None,) * 4
    if linear.delta:
        inside = launch_pairs(job, keep_inverse=False)
        return (*launch_delta(job, inside, initial), ())
    pairs = launch_pairs(job, keep_inverse=False) if job.decay == 3 else None
    o, weight, after, final = launch_additive(job, pairs, initial, _divisor(linear))
    return o, final, (o, *(weight or (None, None)), after) if _in_pieces(linear) else ()


def _divisor(linear: Recurrence) -> Any:
    from foveal.engines.state.launch_additive import Division

    if linear.divisor is None:
        return None
    floor, signed = linear.divisor
    if isinstance(floor, Tensor):
        return Division(floor.float().contiguous(), 0.0, signed)
    return Division(None, floor, signed)


def _backward(
    linear: Recurrence,
    do: Tensor,
    dfinal: Tensor,
    kept: tuple[Any, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    if not len(linear.q):
        dinitial = None if linear.initial is None else dfinal.to(linear.initial.dtype)
        inputs = (linear.q, linear.k, linear.v, linear.log_decay, linear.write_gate)
        return (*(None if x is None else torch.zeros_like(x) for x in inputs), dinitial)
    found = _gradients(linear, do, dfinal, kept, wanted)
    return (
        _of_groups(found.dq, linear.q),
        _of_groups(found.dk, linear.k),
        found.dv,
        _of_decay(found.ddecay, linear.log_decay),
        _as(found.dgate, linear.write_gate),
        _as(found.dinitial, linear.initial),
    )


def _gradients(
    linear: Recurrence,
    do: Tensor,
    dfinal: Tensor,
    kept: tuple[Any, ...],
    wanted: tuple[bool, ...],
) -> Gradients:
    from foveal.engines.state.launch import launch_gradients, launch_pairs, launch_states
    from foveal.engines.state.launch_additive import launch_additive_gradients, launch_division
    from foveal.engines.state.task import task

    job = task(linear, training=True)
    initial = None if linear.initial is None else linear.initial.float().contiguous()
    do, dfinal = do.to(job.q.dtype), dfinal.float().contiguous()
    if _in_pieces(linear):
        o, weight, normaliser, after = kept
        divisor, dweight = _divisor(linear), None
        if divisor is not None:
            do, dweight = launch_division(o, do, weight, divisor)
        return launch_additive_gradients(
            job, initial, after, do.contiguous(), normaliser, dweight, dfinal, wanted
        )
    inside = launch_pairs(job, keep_inverse=True)
    states = launch_states(job, inside, initial)
    return launch_gradients(job, inside, states, do.contiguous(), dfinal, wanted)


def _of_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """The sum over the value heads that read with one head."""
    groups = gradient.shape[1] // x.shape[1]
    if groups == 1:
        return gradient
    summed: Tensor = gradient.unflatten(1, (-1, groups)).sum(2, dtype=torch.float32)
    return summed.to(x.dtype)


def _of_decay(gradient: Tensor | None, log_decay: Tensor | None) -> Tensor | None:
    if gradient is None or log_decay is None:
        return None
    if log_decay.dim() < 3:
        gradient = gradient.sum((0, 1) if log_decay.dim() == 1 else 0)
    return gradient.to(log_decay.dtype)


def _as(gradient: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if gradient is None or x is None else gradient.to(x.dtype)
