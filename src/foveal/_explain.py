"""explain(): the plan of a call, in numbers and sentences, without running it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from foveal._arguments import named_device, need_tensors, tensors_or_none
from foveal._families import family
from foveal._host import on_host
from foveal._plan import Plan, decide
from foveal._problem import Problem, describe, element_bytes
from foveal._tiles import TileCounts, count_tiles
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Dense
from foveal.probe.ceilings import Ceilings
from foveal.scores.base import Form, Score
from foveal.scores.softmax import Softmax


@dataclass(frozen=True)
class Explanation:
    """What a call of `attend` will do.

    flops counts forward products of visible pairs only; bytes is each of q, k, v, o moved once;
    bound_seconds is the larger of the two over the measured ceilings of this device, or None; method
    says how a problem is computed where it is not by the tiles.
    """

    implementation: str
    pattern: str
    score: str
    refusals: tuple[tuple[str, str], ...]
    tiles: TileCounts
    flops: int
    bytes: int
    bound_seconds: float | None
    method: str | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {"tiles": self.tiles.as_dict()}

    def __str__(self) -> str:
        tiles = self.tiles
        shape = " x ".join(str(side) for side in tiles.q_tile)
        lines = [
            f"runs       {self.implementation}" + (f": {self.method}" if self.method else ""),
            f"pattern    {self.pattern}",
            f"score      {self.score}",
            f"tiles      {tiles.visited:,} of {tiles.total:,} visited "
            f"({tiles.full:,} full, {tiles.partial:,} partial, "
            f"{tiles.skipped:,} skipped) with query tiles of {shape}",
            f"pairs      {tiles.pairs:,} visible per head",
            f"speed-up   at most {tiles.speedup_bound:.2f}x over dense, by tiles",
            f"work       {self.flops / 1e9:,.3f} GFLOP forward, {self.bytes / 1e6:,.2f} MB moved",
        ]
        if self.bound_seconds is not None:
            lines.append(f"bound      {self.bound_seconds * 1e3:,.3f} ms forward on this device")
        lines.extend(f"refused    {name}: {reason}" for name, reason in self.refusals)
        return "\n".join(lines)


@on_host
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Dense(),
    score: Score = Softmax(),
    *,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    ceilings: Ceilings | None = None,
    device: str = "cpu",
) -> Explanation:
    """What `attend` with the same arguments will run, visit and cost; nothing is computed.

    Shapes: as `attend`; tensors on the meta device stand for a call on `device`.
    Options: ceilings, from foveal.probe.ceilings, adds the time bound of this device.
    """
    need_tensors(q=q, k=k, v=v)
    tensors_or_none(cu_seqlens=cu_seqlens)
    problem, device = describe(q, k, v, return_lse), named_device(device)
    if problem.device == "meta":
        problem = dataclasses.replace(problem, device=device)
    plan, form, _ = decide(problem, q.device, pattern, score, cu_seqlens, implementation)
    tiles = count_tiles(plan.pattern, problem)
    heads = problem.batch * problem.q_heads
    pair = form.pair_flops(problem.head_dim, problem.value_dim)
    flops = pair * heads * tiles.all_pairs // tiles.lists
    moved = element_bytes(problem)
    bound = None
    if ceilings is not None:
        bound = max(flops / ceilings.flops_per_second, moved / ceilings.bytes_per_second)
    return Explanation(
        plan.implementation,
        plan.pattern.key,
        score.key,
        plan.refusals,
        tiles,
        flops,
        moved,
        bound,
        _method(plan, problem, form),
    )


def _method(plan: Plan, problem: Problem, form: Form) -> str | None:
    module = family(form.engine).implementations[plan.implementation]
    found: str | None = getattr(module, "method", lambda *_: None)(problem, plan.pattern, form)
    return found
