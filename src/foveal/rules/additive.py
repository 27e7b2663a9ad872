"""Linear attention: what is written stays until it decays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from foveal.rules.base import (
    Divisor,
    Finish,
    Parts,
    Recurrence,
    Rule,
    Token,
    decayed,
    gated,
    joined,
    read,
    written,
)


@dataclass(frozen=True)
class Additive(Rule):
    """S_t = Diag(a_t) S_{t-1} + b_t k_t v_t^T, o_t = scale S_t^T q_t.

    Options: normalised also keeps n_t = a_t n_{t-1} + b_t k_t and divides o_t by
    max(scale q_t . n_t, floor): weights that sum to 1 where feature maps are positive.
    State: memory [N, H, Dk, Dv]; normalised: (memory, normaliser [N, H, Dk]).
    Equals: without decay and gate, tril(scale q k^T) v.
    Paper: Transformers are RNNs (2006.16236); with a decay, Lightning Attention-2 (2401.04658).
    """

    normalised: bool = False
    floor: float = 1e-6

    def part_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        parts: dict[str, tuple[int, ...]] = {"memory": (head_dim, value_dim)}
        return parts | {"normaliser": (head_dim,)} if self.normalised else parts

    def step(self, state: Parts, token: Token) -> tuple[Parts, Tensor]:
        memory = written(decayed(state[0], token), token.k, gated(token.v, token.write_gate))
        o = read(memory, token.q)
        if not self.normalised:
            return (memory,), o
        normaliser = state[1] * token.log_decay.exp() + gated(token.k, token.write_gate)
        weight = (normaliser * token.q).sum(-1, keepdim=True)
        return (memory, normaliser), o / weight.clamp(min=self.floor)

    def recurrence(self, plain: Recurrence, initial: Parts | None) -> tuple[Recurrence, Finish]:
        if not self.normalised:
            first = None if initial is None else initial[0]
            return dataclasses.replace(plain, initial=first), lambda o, memory: (o, (memory,))
        divisor = Divisor(self.floor, signed=True)
        linear = dataclasses.replace(plain, initial=joined(initial), divisor=divisor)
        return linear, lambda o, memory: (o, (memory[..., :-1], memory[..., -1]))
