"""explain_scan(): the plan of a scan, in numbers and sentences, without running it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from foveal._arguments import named_device
from foveal._host import on_host
from foveal._scan import State, parts_of
from foveal._scan_plan import choose_scan
from foveal.engines.state import triton
from foveal.engines.state.problem import describe_scan
from foveal.rules.additive import Additive
from foveal.rules.base import Rule
from foveal.rules.delta import Delta
from foveal.rules.two_state import TwoState


@dataclass(frozen=True)
class ScanExplanation:
    """What a call of `scan` will do.

    sequences and value_heads count the states, state_bytes is all of them; flops counts the forward
    token by token, 4 Dk Dv per token and value head (6 for the delta rule, 8 with a momentum); bytes
    is each of q, k, v, o and the gates moved once.  pieces counts what the sequences are cut in to be
    worked on at the same time.
    """

    implementation: str
    rule: str
    decay: str
    refusals: tuple[tuple[str, str], ...]
    sequences: int
    value_heads: int
    state_bytes: int
    flops: int
    bytes: int
    pieces: int

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"runs       {self.implementation}",
            f"rule       {self.rule}, decay {self.decay}",
            f"state      {self.state_bytes / 1e6:,.3f} MB in {self.sequences:,} sequences of "
            f"{self.value_heads:,} heads",
            f"split      {self.pieces:,} pieces",
            f"work       {self.flops / 1e9:,.3f} GFLOP forward, {self.bytes / 1e6:,.2f} MB moved",
        ]
        lines.extend(f"refused    {name}: {reason}" for name, reason in self.refusals)
        return "\n".join(lines)


@on_host
def explain_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule = Additive(),
    *,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    log_momentum: Tensor | None = None,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
    device: str = "cpu",
) -> ScanExplanation:
    """What `scan` with the same arguments will run and cost; nothing is computed.

    Shapes: as `scan`; tensors on the meta device stand for a call on `device`.
    """
    initial, device = parts_of(initial_state), named_device(device)
    problem = describe_scan(q, k, v, rule, log_decay, write_gate, initial, cu_seqlens, log_momentum)
    if problem.device == "meta":
        problem = dataclasses.replace(problem, device=device)
    plan = choose_scan(problem, rule, implementation)
    shapes = rule.part_shapes(problem.head_dim, problem.value_dim)
    elements = sum(math.prod(shape) for shape in shapes.values())
    states = len(problem.lengths) * problem.value_heads
    products = 8 if isinstance(rule, TwoState) else 6 if isinstance(rule, Delta) else 4
    gates = (log_decay, write_gate, log_momentum)
    moved = [q, k, v, v, *(x for x in gates if x is not None)]
    return ScanExplanation(
        plan.implementation,
        rule.key,
        problem.decay,
        plan.refusals,
        len(problem.lengths),
        problem.value_heads,
        states * elements * problem.state_dtype.itemsize,
        products * problem.tokens * problem.value_heads * problem.head_dim * problem.value_dim,
        sum(x.numel() * x.dtype.itemsize for x in moved),
        triton.pieces(problem, rule) if plan.module is triton else len(problem.lengths),
    )
