"""What a process with Triton's interpreter runs: the Triton edition on the CPU, in tiny tiles."""

from __future__ import annotations

import torch

import foveal as fv
from foveal.testing.bounds import check
from tests.engines.local_linear.cases import agree as agree_by
from tests.engines.tile.interpreted import ready, start

__all__ = ["agree", "contained", "decoded", "first_rows", "ready", "start"]


def agree(name: str, kind: str, dtype: torch.dtype, seed: int) -> None:
    """Raises AssertionError where a case is further off than its precision allows."""
    agree_by(name, kind, dtype, seed, "triton")


def _draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source) for shape in shapes]


def decoded(seed: int, pattern: fv.Pattern, ridge: float) -> list[bool]:
    """Whether o and lse of few queries on many keys are as good as float32 allows."""
    q, k, v = _draw(seed, (2, 2, 4, 12), (2, 531, 2, 12), (2, 531, 2, 20))
    score = fv.LocalLinear(ridge)
    results = [
        fv.attend(
            *(x.to(dtype) for x in (q, k, v)), pattern, score,
            return_lse=True, implementation=implementation,
        )
        for implementation, dtype in (
            ("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64),
        )
    ]  # fmt: skip
    return [check("", *each).ok for each in zip(*results, strict=True)]


def first_rows(seed: int, ridge: float) -> float:
    """The largest error, relative to o, in 16 bits where rows have fewer keys than dimensions."""
    tensors = _draw(seed, *((1, 18, 1, 16),) * 3)
    q, k, v = (x.half() for x in tensors)
    score = fv.LocalLinear(ridge)
    o = fv.attend(q, k, v, fv.Causal(), score, implementation="triton")
    wide = (x.double() for x in (q, k, v))
    exact = fv.attend(*wide, fv.Causal(), score, implementation="reference")
    return float((o - exact).abs().max() / exact.abs().max())


def contained(seed: int, pattern: fv.Pattern) -> bool:
    """Whether NaN reaches the rows that see it and no others."""
    q, k, v, r = _draw(seed, *((1, 40, 2, 8),) * 4)
    k[0, 25, 0, 1], v[0, 10, 1, 3], q[0, 4, 1, 0] = torch.nan, torch.inf, torch.nan
    for score in (fv.LocalLinear(), fv.Parallax(r)):
        exact = fv.attend(q, k, v, pattern, score, implementation="reference")
        got = fv.attend(q, k, v, pattern, score, implementation="triton")
        if not torch.equal(got.isnan(), exact.isnan()):
            return False
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3, equal_nan=True)
    return True
