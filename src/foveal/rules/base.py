"""What a rule is: how a state changes with one token, and what of it is linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]
"""A state in parts [N, H, ...], in the order of `Rule.part_shapes`."""


class Token(NamedTuple):
    """One token of N sequences and H value heads, in the precision of the state.

    Shapes: q and k [N, H, Dk], q times the scale; v [N, H, Dv]; log_decay [N, H, 1 or Dk];
    write_gate and log_momentum [N, H, 1] or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    write_gate: Tensor | None
    log_momentum: Tensor | None = None


class Divisor(NamedTuple):
    """o is divided by max(w, floor), or max(|w|, floor) where not `signed`.

    w is the output of one more value column, of ones.  floor: a number, or [T, Hv] without gradient.
    """

    floor: Tensor | float
    signed: bool

    def of(self, weight: Tensor) -> Tensor:
        """What o is divided by, [T, Hv, 1], of the weight [T, Hv, 1]."""
        size = weight if self.signed else weight.abs()
        if isinstance(self.floor, Tensor):
            return torch.maximum(size, self.floor[..., None].to(size.dtype))
        return size.clamp(min=self.floor)


@dataclass(frozen=True)
class Recurrence:
    """S_t = D_t + k_t u_t^T, D_t = Diag(a_t) S_{t-1}, u_t = b_t (v_t - delta D_t^T k_t), o_t = S_t^T q_t.

    All sequences lie one behind the other in T tokens, `lengths` of them each.
    Shapes: q and k [T, H, Dk], v [T, Hv, Dv] with H dividing Hv; log_decay = log a None, [Hv],
    [T, Hv] or [T, Hv, Dk]; write_gate = b [T, Hv] or None; initial [N, Hv, Dk, Dv] or None.  With a
    divisor, states have one more column, the normaliser.
    q is still without its `scale`.  log_momentum [Hv], [T, Hv] or None is for rules that have one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    write_gate: Tensor | None
    initial: Tensor | None
    scale: float
    delta: bool
    lengths: tuple[int, ...]
    log_momentum: Tensor | None = None
    divisor: Divisor | None = None

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32

    @property
    def per_channel(self) -> bool:
        return self.log_decay is not None and self.log_decay.dim() == 3


Finish = Callable[[Tensor, Tensor], tuple[Tensor, Parts]]
"""From o [T, Hv, Dv] and the final state of a recurrence to those of the rule that became it."""


class Rule:
    """How a state changes with each token; an immutable value without tensors.

    `step` is the definition.  A rule with one memory also says how it becomes a plain `Recurrence`,
    which is what the fast implementations run.
    """

    @property
    def key(self) -> str:
        """The rule as it is written."""
        return repr(self)

    def part_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of the state by name, without [N, H]."""
        return {"memory": (head_dim, value_dim)}

    def fresh(self, count: int, heads: int, head_dim: int, value_dim: int, like: Tensor) -> Parts:
        """The state before the first token."""
        return tuple(
            like.new_zeros(count, heads, *shape)
            for shape in self.part_shapes(head_dim, value_dim).values()
        )

    def check(self, decay: str, gated: bool) -> None:
        """Raises RuleError where the rule cannot do with this decay, or without a write gate."""

    def step(self, state: Parts, token: Token) -> tuple[Parts, Tensor]:
        """The state after a token, and o [N, H, Dv]."""
        raise NotImplementedError

    def recurrence(self, plain: Recurrence, initial: Parts | None) -> tuple[Recurrence, Finish]:
        """The same result by a recurrence without normaliser, gates in [0, 1] and one memory.

        `plain` holds the arguments of the call as they came and no initial state.
        """
        raise NotImplementedError


def decayed(memory: Tensor, token: Token) -> Tensor:
    """Diag(a) S of S [N, H, Dk, Dv]."""
    return memory * torch.exp(token.log_decay)[..., None]


def written(memory: Tensor, k: Tensor, u: Tensor) -> Tensor:
    """S + k u^T"""
    return memory + k[..., None] * u[..., None, :]


def read(memory: Tensor, q: Tensor) -> Tensor:
    """S^T q [N, H, Dv]"""
    return (memory * q[..., None]).sum(-2)


def gated(v: Tensor, gate: Tensor | None) -> Tensor:
    return v if gate is None else v * gate


def with_ones(v: Tensor) -> Tensor:
    """v with a column of ones, whose memory is the normaliser."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def joined(initial: Parts | None) -> Tensor | None:
    """A memory [N, H, Dk, Dv] and its normaliser [N, H, Dk] as one memory [N, H, Dk, Dv + 1]."""
    if initial is None:
        return None
    return torch.cat([initial[0], initial[1][..., None]], dim=-1)


def divided(
    linear: Recurrence, run: Callable[[Recurrence], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """o and the final state of a recurrence with a divisor, by one without it."""
    assert linear.divisor is not None
    o, memory = run(dataclasses.replace(linear, v=with_ones(linear.v), divisor=None))
    return o[..., :-1] / linear.divisor.of(o[..., -1:]), memory
