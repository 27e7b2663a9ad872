"""What a run of tokens does to any state, as one affine map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import RuleError
from foveal._host import on_host
from foveal._scan import scan
from foveal.rules.additive import Additive
from foveal.rules.base import Rule
from foveal.rules.delta import Delta


@dataclass(frozen=True)
class ChunkMap:
    """S' = P S + R, the effect of a run of tokens on the state S before it.

    Shapes: transition P [N, Hv, Dk, Dk], or its diagonal [N, Hv, Dk, 1] for an additive rule;
    addition R [N, Hv, Dk, Dv]; both float32 (float64 for float64 inputs).
    """

    transition: Tensor
    addition: Tensor

    @property
    def diagonal(self) -> bool:
        return self.transition.shape[-1] == 1

    def __call__(self, state: Tensor) -> Tensor:
        """The state after the run."""
        return self._times(state) + self.addition

    def then(self, later: ChunkMap) -> ChunkMap:
        """The map of this run and a later one behind it; associative."""
        return ChunkMap(later._times(self.transition), later(self.addition))

    def _times(self, x: Tensor) -> Tensor:
        return self.transition * x if self.diagonal else self.transition @ x


@on_host
def scan_map(
    k: Tensor,
    v: Tensor,
    rule: Rule,
    *,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> ChunkMap:
    """The affine map S' = P S + R of each sequence, without knowing the state before it.

    With it the pieces of a long sequence are worked on at the same time, on one device or several:
    only (P, R) travel, never tokens; and prefixes are cached.
    Shapes: as for `scan`.  Gradients flow to all arguments.
    Cost: of `scan` with Dk + Dv value channels (`Delta`), or Dv (`Additive`).
    Limits: `Delta()` and `Additive()`; for a normaliser append a column of ones to v.
    Equals: scan_map(...)(S) is the final state of `scan` from S; the map of a sequence is the maps of
    its pieces joined by `then`.
    """
    if isinstance(rule, Delta):
        head_dim, value_dim = k.shape[-1], v.shape[-1]
        wide = torch.cat([v, v.new_zeros(*v.shape[:-1], head_dim)], dim=-1)
        count = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        eye = torch.eye(head_dim, dtype=dtype, device=v.device)
        initial = torch.nn.functional.pad(eye, (value_dim, 0))
        initial = initial.expand(count, v.shape[2], -1, -1)
    elif rule == Additive():
        wide, initial = v, None
    else:
        raise RuleError("rule", rule.key, "fv.Delta() or fv.Additive() is needed")
    _, state = scan(
        k,
        k,
        wide,
        rule,
        log_decay=log_decay,
        write_gate=write_gate,
        initial_state=initial,
        return_state=True,
        cu_seqlens=cu_seqlens,
        implementation=implementation,
    )
    assert isinstance(state, Tensor)
    if isinstance(rule, Delta):
        addition, transition = state.split([v.shape[-1], k.shape[-1]], dim=-1)
        return ChunkMap(transition, addition)
    return ChunkMap(_decay_of_sequences(log_decay, state, k.shape[1], cu_seqlens), state)


def _decay_of_sequences(
    log_decay: Tensor | None, state: Tensor, length: int, cu_seqlens: Tensor | None
) -> Tensor:
    """exp of the sum of log_decay over each sequence [N, Hv, Dk, 1]."""
    if log_decay is None:
        return torch.ones_like(state[..., :1])
    log_decay = log_decay.to(state.dtype)
    if log_decay.dim() == 1:
        lengths = state.new_full((len(state),), length)
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().to(state.dtype)
        sums = (lengths[:, None] * log_decay)[..., None]
    else:
        if log_decay.dim() == 3:
            log_decay = log_decay[..., None]
        if cu_seqlens is None:
            sums = log_decay.sum(1)
        else:
            pieces = log_decay[0].split(cu_seqlens.diff().tolist())
            sums = torch.stack([piece.sum(0) for piece in pieces])
    return sums.exp()[..., None].expand(*state.shape[:-1], 1)
