"""The tiled edition against the definition: every kind of pattern, outputs and gradients, and its memory."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from tests.engines.local_linear.cases import CASES, KINDS, agree
from tests.watch import Watch


def seed(source: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=source))


@pytest.mark.parametrize("name", CASES)
def test_agrees_in_float64(name: str, source: torch.Generator) -> None:
    for kind in KINDS:
        agree(name, kind, torch.float64, seed(source), "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_in_every_precision(kind: str, dtype: torch.dtype, source: torch.Generator) -> None:
    for name, layout in (
        ("causal", "broadcast"),
        ("grid", "heads_first"),
        ("lists & causal", "strided"),
    ):
        agree(name, kind, dtype, seed(source), "cpu", layout)


def test_never_holds_all_pairs() -> None:
    q, k, v = (torch.randn(1, 2048, 1, 8).requires_grad_() for _ in range(3))
    score = fv.LocalLinear(torch.ones(1, requires_grad=True))
    with Watch() as watch:
        fv.attend(q, k, v, fv.Sliding(63), score, implementation="cpu").sum().backward()
    assert watch.largest < 4 * 2048 * 2048 // 4


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (1, 0, 2, 4), (1, 1, 1, 3)], ids=str)
def test_small_and_empty(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
    o, lse = fv.attend(q, k, v, fv.Causal(), fv.LocalLinear(), return_lse=True)
    assert o.shape == shape
    assert lse.shape == shape[:-1]
    o.sum().backward()
    if shape[1] == 1:
        torch.testing.assert_close(o, v)


def test_no_keys() -> None:
    q, k = torch.randn(1, 3, 1, 4), torch.randn(1, 0, 1, 4)
    for implementation in ("cpu", "reference"):
        o, lse = fv.attend(
            q, k, k, score=fv.LocalLinear(), return_lse=True, implementation=implementation
        )
        assert (o == 0).all()
        assert (lse == -torch.inf).all()
