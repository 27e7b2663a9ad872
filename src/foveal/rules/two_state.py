"""A memory with momentum: it follows the gradient of its own recall error, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import RuleError
from foveal.rules.base import Parts, Rule, Token, decayed, gated, read, written


@dataclass(frozen=True)
class TwoState(Rule):
    """S_t = e_t S_{t-1} + b_t k_t (v_t - A_t^T k_t)^T, M_t = a_t M_{t-1} + S_t, o_t = scale M_t^T q_t.

    k (v - A^T k)^T is minus half the gradient of |A^T k - v|^2 at A: M learns to recall v under k by
    descent with momentum S.  a_t = exp(log_decay) forgets, b_t = write_gate is twice the step size,
    e_t = exp(log_momentum); without log_momentum there is none, e_t = 0.
    Options: chunk, how many tokens share the memory A at which their gradients are taken, counted from
    the start of each sequence: A is the memory before the run of `chunk` tokens that t lies in.  1 is
    the online rule, A_t = M_{t-1}; more make the recurrence linear inside a run.
    State: (memory M, momentum S), both [N, H, Dk, Dv]; with chunk > 1 also (anchor A [N, H, Dk, Dv],
    place [N, H], the tokens of the run so far).
    Limits: the decay is fixed or per token.  As for `Delta`, keys must have a norm of at most 1; the
    momentum makes steps longer by up to 1 / (1 - e_t).
    Equals: with chunk=1, no momentum and no decay, `Delta()`; with chunk >= L from an empty memory,
    linear attention with weights sum_{i=j..t} (a_t ... a_{i+1}) (e_i ... e_{j+1}).
    Paper: Titans (2501.00663).
    """

    chunk: int = 1

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise RuleError("chunk", self.chunk, "at least 1 is needed")

    def part_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        square = (head_dim, value_dim)
        parts: dict[str, tuple[int, ...]] = {"memory": square, "momentum": square}
        return parts if self.chunk == 1 else parts | {"anchor": square, "place": ()}

    def check(self, decay: str, gated: bool) -> None:
        if decay == "channel":
            raise RuleError("log_decay", "one per channel", "one per head or per token is needed")

    def step(self, state: Parts, token: Token) -> tuple[Parts, Tensor]:
        memory, momentum = state[:2]
        anchor = memory if self.chunk == 1 else state[2]
        u = gated(token.v - read(anchor, token.k), token.write_gate)
        if token.log_momentum is None:
            momentum = token.k[..., None] * u[..., None, :]
        else:
            momentum = written(momentum * token.log_momentum.exp()[..., None], token.k, u)
        memory = decayed(memory, token) + momentum
        o = read(memory, token.q)
        if self.chunk == 1:
            return (memory, momentum), o
        place = (state[3] + 1) % self.chunk
        anchor = torch.where((place == 0)[..., None, None], memory, anchor)
        return (memory, momentum, anchor, place), o
