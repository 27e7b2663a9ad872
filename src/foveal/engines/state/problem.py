"""The only validation of a scan: tensors become a frozen `ScanProblem`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal._arguments import need_tensors, tensors_or_none
from foveal._errors import DeviceError, DtypeError, PackingError, RuleError, ShapeError
from foveal.rules.base import Parts, Rule
from foveal.rules.two_state import TwoState

Decay = Literal["none", "fixed", "token", "channel"]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ScanProblem:
    """Sizes, dtype, device class and wishes of one scan; `lengths` of all sequences in order."""

    batch: int
    length: int
    lengths: tuple[int, ...]
    heads: int
    value_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    decay: Decay
    gated: bool
    needs_grad: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def describe_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    initial: Parts | None,
    cu_seqlens: Tensor | None,
    log_momentum: Tensor | None = None,
) -> ScanProblem:
    """Checks the arguments of a scan against each other and returns what they describe."""
    if not isinstance(rule, Rule):
        raise RuleError("rule", type(rule), "a rule such as fv.Delta() is needed")
    need_tensors(q=q, k=k, v=v)
    tensors_or_none(
        log_decay=log_decay,
        write_gate=write_gate,
        log_momentum=log_momentum,
        cu_seqlens=cu_seqlens,
    )
    tensors = {"q": q, "k": k, "v": v}
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ShapeError(name, list(tensor.shape), "[B, L, H, D] is needed")
        if tensor.dtype not in _DTYPES:
            raise DtypeError(name, tensor.dtype, "float64, float32, bfloat16 or float16 is needed")
        if tensor.dtype != q.dtype:
            raise DtypeError(name, tensor.dtype, f"the dtype of q, {q.dtype}, is needed")
    if k.shape != q.shape or q.shape[-1] == 0:
        raise ShapeError("k", list(k.shape), f"the shape of q, {list(q.shape)}, is needed, D >= 1")
    batch, length, heads, head_dim = q.shape
    if v.shape[:2] != q.shape[:2] or v.shape[-1] == 0:
        needed = f"[{batch}, {length}, Hv, Dv] is needed, Dv >= 1"
        raise ShapeError("v", list(v.shape), needed)
    value_heads = v.shape[2]
    if heads == 0 or value_heads == 0 or value_heads % heads:
        raise ShapeError("v", list(v.shape), f"the {heads} heads of q must divide its heads")
    problem = ScanProblem(
        batch=batch,
        length=length,
        lengths=_lengths(cu_seqlens, batch, length),
        heads=heads,
        value_heads=value_heads,
        head_dim=head_dim,
        value_dim=v.shape[-1],
        dtype=q.dtype,
        device=q.device.type,
        decay=_decay(log_decay, q, value_heads),
        gated=write_gate is not None,
        needs_grad=torch.is_grad_enabled()
        and any(
            t is not None and t.requires_grad
            for t in (q, k, v, log_decay, write_gate, log_momentum, *(initial or ()))
        ),
    )
    if write_gate is not None and write_gate.shape != (batch, length, value_heads):
        needed = f"{[batch, length, value_heads]} is needed"
        raise ShapeError("write_gate", list(write_gate.shape), needed)
    momentum_shapes = ((value_heads,), (batch, length, value_heads))
    if log_momentum is not None and tuple(log_momentum.shape) not in momentum_shapes:
        needed = " or ".join(str(list(shape)) for shape in momentum_shapes)
        raise ShapeError("log_momentum", list(log_momentum.shape), f"{needed} is needed")
    if log_momentum is not None and not isinstance(rule, TwoState):
        raise RuleError("log_momentum", f"one for {rule.key}", "fv.TwoState() is needed")
    rule.check(problem.decay, problem.gated)
    _check_initial(problem, rule, initial)
    others = [*tensors.items(), ("log_decay", log_decay), ("write_gate", write_gate)]
    others += [("log_momentum", log_momentum)]
    others += [("initial_state", part) for part in initial or ()]
    for name, other in others:
        if other is not None and other.device != q.device:
            raise DeviceError(name, other.device, f"the device of q, {q.device}, is needed")
        if other is not None and not other.dtype.is_floating_point:
            raise DtypeError(name, other.dtype, "a floating dtype is needed")
    return problem


def _decay(log_decay: Tensor | None, q: Tensor, value_heads: int) -> Decay:
    if log_decay is None:
        return "none"
    batch, length, _, head_dim = q.shape
    shapes: dict[tuple[int, ...], Decay] = {
        (value_heads,): "fixed",
        (batch, length, value_heads): "token",
        (batch, length, value_heads, head_dim): "channel",
    }
    if tuple(log_decay.shape) not in shapes:
        known = ", ".join(f"{list(shape)} ({name})" for shape, name in shapes.items())
        raise ShapeError("log_decay", list(log_decay.shape), f"one of {known} is needed")
    return shapes[tuple(log_decay.shape)]


def _lengths(cu_seqlens: Tensor | None, batch: int, length: int) -> tuple[int, ...]:
    if cu_seqlens is None:
        return (length,) * batch
    if batch != 1:
        raise PackingError("q", f"batch {batch}", "with cu_seqlens, a batch of 1 is needed")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype.is_floating_point:
        raise PackingError("cu_seqlens", list(cu_seqlens.shape), "integers [N + 1] are needed")
    offsets = [int(offset) for offset in cu_seqlens.tolist()]
    lengths = tuple(stop - start for start, stop in itertools.pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != length or min(lengths) < 0:
        raise PackingError("cu_seqlens", offsets, f"ascending from 0 to {length} is needed")
    return lengths


def _check_initial(problem: ScanProblem, rule: Rule, initial: Parts | None) -> None:
    if initial is None:
        return
    shapes = rule.part_shapes(problem.head_dim, problem.value_dim)
    if len(initial) != len(shapes):
        needed = f"the parts {', '.join(shapes)} are needed"
        raise RuleError("initial_state", f"{len(initial)} tensors", needed)
    for (name, shape), part in zip(shapes.items(), initial, strict=True):
        whole = (len(problem.lengths), problem.value_heads, *shape)
        if tuple(part.shape) != whole:
            got = f"{name} {list(part.shape)}"
            raise ShapeError("initial_state", got, f"{list(whole)} is needed")
