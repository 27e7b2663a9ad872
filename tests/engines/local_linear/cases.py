"""Problems on which the editions of local linear attention are compared with the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import foveal as fv
from foveal.testing import Sizes, check_attend, qkv
from foveal.testing.agreement import Agreement
from foveal.testing.inputs import Layout

KINDS = ("solved", "detached", "given")


@dataclass(frozen=True)
class Case:
    """Sizes and a pattern; `pattern` draws its lists from a source."""

    sizes: Sizes
    pattern: Callable[[torch.Generator], fv.Pattern]
    cu_seqlens: tuple[int, ...] | None = None


def _lists(source: torch.Generator) -> fv.Pattern:
    mask = torch.rand(1, 2, 3, 3, generator=source) < 0.6
    return fv.Blocks(fv.BlockSelection.from_block_mask(mask, 16, 16))


CASES: dict[str, Case] = {
    "causal": Case(Sizes((37,), None, 2, 4, 2, 12, 7), lambda source: fv.Causal()),
    "dense": Case(Sizes((21,), (34,), 1, 2, 1, 9), lambda source: fv.Dense()),
    "window": Case(Sizes((41,), None, 1, 2, 2, 8), lambda source: fv.Sliding(6, 2)),
    "packed": Case(
        Sizes((40,), None, 1, 2, 1, 8), lambda source: fv.Causal(), (0, 7, 7, 8, 29, 40)
    ),
    "grid": Case(Sizes((7, 8), None, 1, 2, 1, 8), lambda source: fv.Neighborhood((3, 5))),
    "volume": Case(Sizes((3, 4, 5), None, 1, 1, 1, 5), lambda source: fv.Neighborhood(3)),
    "dilated": Case(Sizes((8, 9), None, 1, 2, 2, 6), lambda source: fv.Neighborhood(3, dilation=2)),
    "axes": Case(Sizes((5, 6), None, 1, 2, 2, 6), lambda source: fv.Axial(0) | fv.Axial(1)),
    "strided": Case(Sizes((36,), None, 1, 1, 1, 8), lambda source: fv.Strided(6)),
    "spans": Case(Sizes((41,), None, 1, 2, 2, 8), lambda source: fv.Sliding(5, sink_tokens=2)),
    "lists": Case(Sizes((45,), None, 1, 2, 2, 8), _lists),
    "lists & causal": Case(
        Sizes((45,), None, 1, 2, 1, 8), lambda source: _lists(source) & fv.Causal()
    ),
    "one channel": Case(Sizes((11,), None, 1, 2, 2, 1), lambda source: fv.Causal()),
}


def score_of(kind: str, q: Tensor, source: torch.Generator) -> fv.Score:
    """A score with a tensor of its own for each kind."""
    if kind == "given":
        return fv.Parallax(0.3 * torch.randn(q.shape, generator=source).to(q))
    ridge = (0.3 + torch.rand(q.shape[-2], generator=source)).to(q)
    return fv.LocalLinear(ridge, ridge_grad="detached" if kind == "detached" else "exact")


def agree(
    name: str,
    kind: str,
    dtype: torch.dtype,
    seed: int,
    implementation: str,
    layout: Layout = "strided",
) -> None:
    """Raises AssertionError where output, lse or a gradient is further off than its precision allows."""
    source = torch.Generator().manual_seed(seed)
    case = CASES[name]
    q, k, v = qkv(case.sizes, source, dtype, layout)
    pattern, score = case.pattern(source), score_of(kind, q, source)
    cut = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32)
    if dtype != torch.float64:
        check_attend(q, k, v, pattern, score, cu_seqlens=cut, implementation=implementation)
        return
    problem = Agreement(q, k, v, pattern, score, cut)
    found, exact = (problem.results(each) for each in (implementation, "reference"))
    for result, value in exact.items():
        torch.testing.assert_close(found[result], value, rtol=1e-9, atol=1e-9)
