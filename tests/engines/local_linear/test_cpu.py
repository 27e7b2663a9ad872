"""The tiled edition against the definition: every kind of pattern, outputs and gradients, and its memory."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.engines.local_linear.iterate import conjugate_gradients
from foveal.testing import check_attend
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


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 1e2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_fewer_keys_than_channels(
    dtype: torch.dtype, ridge: float, source: torch.Generator
) -> None:
    q, k, v = (torch.randn(1, 24, 2, 32, generator=source).to(dtype) for _ in range(3))
    score = fv.LocalLinear(torch.full((2,), ridge, dtype=dtype))
    check_attend(q, k, v, fv.Causal(), score, implementation="cpu")


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 1e2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_see_one_key_or_copies_of_it(
    dtype: torch.dtype, ridge: float, source: torch.Generator
) -> None:
    """The matrix of such a row is its ridge, and its gradients are rounding noise over it."""
    D, L, heads = 16, 40, 2
    k = 6 * torch.eye(D)[torch.randperm(L, generator=source) % D]
    k = k[None, :, None].expand(1, L, heads, D)
    q = 4 * (k + 0.05 * torch.randn(k.shape, generator=source))
    v = torch.randn(k.shape, generator=source)
    score = fv.LocalLinear(torch.full((heads,), ridge, dtype=dtype))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    check_attend(q, k, v, fv.Causal(), score, implementation="cpu")


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e18])
def test_systems_of_any_size_are_solved(size: float, source: torch.Generator) -> None:
    rows = torch.randn(3, 5, 4, 4, generator=source)
    matrix = rows @ rows.mT + torch.eye(4)
    b = size * torch.randn(3, 5, 4, generator=source)
    b[0, 0] = 0.0
    b[1, 1, 2] = torch.nan
    limit = 1e-6 * b.norm(dim=-1, keepdim=True)
    x, _, _ = conjugate_gradients(lambda d: (matrix @ d[..., None])[..., 0], b, limit, 50)
    exact = torch.linalg.solve(matrix.double(), b.double()[..., None])[..., 0]
    for row in ((0, 0), (0, 1), (2, 4)):
        torch.testing.assert_close(x[row].double() / size, exact[row] / size, rtol=1e-3, atol=1e-3)
