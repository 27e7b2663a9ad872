"""The delta rule: a key replaces what was stored under it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from foveal.rules.base import (
    Finish,
    Parts,
    Recurrence,
    Rule,
    Token,
    decayed,
    gated,
    read,
    written,
)


@dataclass(frozen=True)
class Delta(Rule):
    """S_t = D_t + b_t k_t (v_t - D_t^T k_t)^T with D_t = Diag(a_t) S_{t-1}, o_t = scale S_t^T q_t.

    The state decays before it is read.  State: memory [N, H, Dk, Dv].
    Limits: keys must have a norm of at most 1 and b_t at most 2, else the state may grow without
    bound, in every implementation; chunk forms lose digits first.
    Equals: with b = 0 a pure decay; with b = 1, no decay and orthonormal keys, S_L^T k_j = v_j.
    Paper: Gated DeltaNet (2412.06464); with a decay per channel, Kimi Linear (2510.26692).
    """

    def step(self, state: Parts, token: Token) -> tuple[Parts, Tensor]:
        memory = decayed(state[0], token)
        u = gated(token.v - read(memory, token.k), token.write_gate)
        memory = written(memory, token.k, u)
        return (memory,), read(memory, token.q)

    def recurrence(self, plain: Recurrence, initial: Parts | None) -> tuple[Recurrence, Finish]:
        first = None if initial is None else initial[0]
        linear = dataclasses.replace(plain, delta=True, initial=first)
        return linear, lambda o, memory: (o, (memory,))
