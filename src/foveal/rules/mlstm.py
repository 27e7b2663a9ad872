"""The matrix memory of xLSTM, with an input gate that may be exponential."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal._errors import RuleError
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
class MLSTM(Rule):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, o_t = C_t^T q_t / max(|n_t . q_t|, 1).

    f_t = exp(log_decay), q_t times the scale.  `write_gate` is the gate's pre-activation x, in any
    range: i_t = exp(x) or sigmoid(x).
    Options: input_gate "exponential" keeps C and n divided by exp(m_t), m_t = max(m_{t-1} +
    log_decay_t, x_t), so that nothing overflows; "sigmoid" needs no m.  normalised=False leaves the
    division out, with "sigmoid" only.
    State: "exponential": (memory C / e^m [N, H, Dk, Dv], normaliser n / e^m [N, H, Dk], log_scale m
    [N, H]); "sigmoid": (memory, normaliser) or, not normalised, the memory alone.
    Limits: needs write_gate; the decay is fixed or per token; no gradient through m, which o does
    not depend on.
    Paper: xLSTM (2405.04517); Tiled Flash Linear Attention (2503.14376).
    """

    input_gate: Literal["exponential", "sigmoid"] = "exponential"
    normalised: bool = True

    def __post_init__(self) -> None:
        if self.input_gate not in ("exponential", "sigmoid"):
            raise RuleError("input_gate", self.input_gate, '"exponential" or "sigmoid" is needed')
        if not self.normalised and self.input_gate == "exponential":
            raise RuleError("normalised", False, 'input_gate="sigmoid" is needed without it')

    def part_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        parts: dict[str, tuple[int, ...]] = {"memory": (head_dim, value_dim)}
        if self.normalised:
            parts |= {"normaliser": (head_dim,)}
        return parts | {"log_scale": ()} if self.input_gate == "exponential" else parts

    def check(self, decay: str, gated: bool) -> None:
        if not gated:
            raise RuleError("write_gate", None, "the pre-activation of the input gate is needed")
        if decay == "channel":
            raise RuleError("log_decay", "one per channel", "one per head or per token is needed")

    def fresh(self, count: int, heads: int, head_dim: int, value_dim: int, like: Tensor) -> Parts:
        parts = super().fresh(count, heads, head_dim, value_dim, like)
        if self.input_gate == "exponential":
            return (*parts[:2], torch.full_like(parts[2], -torch.inf))
        return parts

    def step(self, state: Parts, token: Token) -> tuple[Parts, Tensor]:
        assert token.write_gate is not None
        log_decay, x = token.log_decay, token.write_gate
        kept: Parts = ()
        ceiling = torch.ones_like(x)
        if self.input_gate == "exponential":
            previous = state[2][..., None]
            m = torch.maximum(previous + log_decay, x).detach()
            shift = _finite(m)
            log_decay, gate = previous.detach() + log_decay - shift, torch.exp(x - shift)
            ceiling, kept = torch.exp(-shift), (m.squeeze(-1),)
        else:
            gate = torch.sigmoid(x)
        token = token._replace(log_decay=log_decay, write_gate=gate)
        memory = written(decayed(state[0], token), token.k, gated(token.v, gate))
        o = read(memory, token.q)
        if not self.normalised:
            return (memory,), o
        normaliser = state[1] * log_decay.exp() + gated(token.k, gate)
        weight = (normaliser * token.q).sum(-1, keepdim=True)
        return (memory, normaliser, *kept), o / torch.maximum(weight.abs(), ceiling)

    def recurrence(self, plain: Recurrence, initial: Parts | None) -> tuple[Recurrence, Finish]:
        x = plain.write_gate
        assert x is not None
        x = x.to(plain.state_dtype)
        decay = torch.zeros_like(x) if plain.log_decay is None else plain.log_decay.expand_as(x)
        decay = decay.to(plain.state_dtype)
        kept: Parts = ()
        ceiling: Tensor | float = 1.0
        if self.input_gate == "sigmoid":
            gate = torch.sigmoid(x)
        else:
            first = None if initial is None else initial[2].detach()
            m, previous = log_scales(decay.detach(), x.detach(), first, plain.lengths)
            shift = _finite(m)
            decay, gate, ceiling = previous + decay - shift, torch.exp(x - shift), torch.exp(-shift)
            if first is None:
                # Nothing is there to decay, and running sums that pass -inf would lose digits.
                decay = torch.where(previous == -torch.inf, 0.0, decay)
            kept = (_last(m, first, plain.lengths),)
        if not self.normalised:
            memory = None if initial is None else initial[0]
            linear = dataclasses.replace(plain, log_decay=decay, write_gate=gate, initial=memory)
            return linear, lambda o, memory: (o, (memory,))
        linear = dataclasses.replace(
            plain, log_decay=decay, write_gate=gate, initial=joined(initial),
            divisor=Divisor(ceiling, signed=False),
        )  # fmt: skip
        return linear, lambda o, memory: (o, (memory[..., :-1], memory[..., -1], *kept))


def log_scales(
    log_decay: Tensor, x: Tensor, first: Tensor | None, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """m_t = max(m_{t-1} + log_decay_t, x_t) of every token, and m_{t-1}; -inf before the first.

    With F the running sum of log_decay, m_t - F_t is the running maximum of x_t - F_t.
    Shapes: log_decay, x and results [T, H], first [N, H].
    """
    results, previous = [x[:0]], [x[:0]]
    start = 0
    for number, length in enumerate(lengths):
        own = slice(start, start + length)
        start += length
        # Running along the last axis: along the first it is slow on a GPU.
        sums = log_decay[own].double().mT.contiguous().cumsum(1)
        above = x[own].double().mT - sums
        begin = above.new_full(x.shape[1:], -torch.inf) if first is None else first[number].double()
        above = torch.cat([begin[:, None], above], 1)
        if length:
            above = torch.cummax(above, 1).values
        m = (above[:, 1:] + sums).mT.to(x.dtype)
        results.append(m)
        previous.append(torch.cat([begin[None].to(x.dtype), m])[:-1])
    return torch.cat(results), torch.cat(previous)


def _last(m: Tensor, first: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
    stops = torch.tensor(lengths).cumsum(0)
    rows = []
    for number, (length, stop) in enumerate(zip(lengths, stops.tolist(), strict=True)):
        if length:
            rows.append(m[stop - 1])
        else:
            rows.append(m.new_full(m.shape[1:], -torch.inf) if first is None else first[number])
    return torch.stack(rows) if rows else m.new_zeros(0, m.shape[1])


def _finite(m: Tensor) -> Tensor:
    """m with 0 for -inf: a state that holds nothing needs no scale."""
    return torch.where(m == -torch.inf, 0.0, m)
