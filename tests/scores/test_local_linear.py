"""Local linear scores: what they equal, where they are hard to solve, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.probe.solve import solve_report
from foveal.systems.local_linear import solved_slope
from foveal.testing import check_attend

IMPLEMENTATIONS = ["reference", "cpu"]


def draw(source: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=source, dtype=dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_infinite_ridge_is_softmax(implementation: str, source: torch.Generator) -> None:
    q, k, v = (draw(source, 2, 23, 2, 5) for _ in range(3))
    line = fv.attend(q, k, v, fv.Causal(), fv.LocalLinear(1e13), implementation=implementation)
    torch.testing.assert_close(line, fv.attend(q, k, v, fv.Causal()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_line_is_found_again(implementation: str, source: torch.Generator) -> None:
    q, k, slope, start = (draw(source, *n) for n in ((1, 40, 1, 4), (1, 40, 1, 4), (4, 3), (3,)))
    o = fv.attend(
        q, k, k @ slope + start, score=fv.LocalLinear(1e-9), implementation=implementation
    )
    torch.testing.assert_close(o, q @ slope + start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_move_with_a_shift_of_queries_and_keys(
    implementation: str, source: torch.Generator
) -> None:
    """With all weights equal nothing but differences of keys and queries counts."""
    q, k, v = (draw(source, 1, 17, 2, 4) for _ in range(3))
    shift = draw(source, 4)
    score = fv.LocalLinear(0.3, scale=0.0)
    there = fv.attend(q + shift, k + shift, v, score=score, implementation=implementation)
    here = fv.attend(q, k, v, score=score, implementation=implementation)
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9)


def test_the_slope_of_the_system_given_is_the_solution(source: torch.Generator) -> None:
    q, k, v = (draw(source, 2, 19, 2, 4) for _ in range(3))
    given = fv.attend(q, k, v, fv.Causal(), fv.Parallax(solved_slope(q, k, 0.4)))
    solved = fv.attend(q, k, v, fv.Causal(), fv.LocalLinear(0.4))
    torch.testing.assert_close(given, solved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 1.0, 1e2])
def test_rows_with_fewer_keys_than_dimensions(ridge: float, source: torch.Generator) -> None:
    q, k, v = (draw(source, 1, 20, 2, 16, dtype=torch.float32) for _ in range(3))
    score = fv.LocalLinear(torch.full((2,), ridge))
    for verdict in check_attend(q, k, v, fv.Causal(), score, implementation="cpu"):
        assert verdict.ok


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_hot_weights_take_one_value(implementation: str, source: torch.Generator) -> None:
    k, v = 3 * torch.eye(9, dtype=torch.float64)[None, :, None], draw(source, 1, 9, 1, 4)
    order = torch.randperm(9, generator=source)
    q = (40 * k[:, order]).requires_grad_()
    o = fv.attend(q, k, v, score=fv.LocalLinear(0.1), implementation=implementation)
    torch.testing.assert_close(o, v[:, order], rtol=1e-6, atol=1e-6)
    (dq,) = torch.autograd.grad(o.sum(), q)
    assert dq.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_without_keys_is_zero(implementation: str, source: torch.Generator) -> None:
    q, k, v = (draw(source, 1, n, 1, 4).requires_grad_() for n in (7, 4, 4))
    o, lse = fv.attend(
        q, k, v, fv.Causal(), fv.LocalLinear(), return_lse=True, implementation=implementation
    )
    assert (o[:, :3] == 0).all()
    assert (lse[:, :3] == -torch.inf).all()
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][:, :3] == 0).all()


@pytest.mark.parametrize("pattern", [fv.Causal(), fv.Sliding(5), fv.Dense()], ids=repr)
def test_what_is_not_finite_reaches_the_rows_that_see_it(
    pattern: fv.Pattern, source: torch.Generator
) -> None:
    q, k, v = (draw(source, 1, 30, 2, 4) for _ in range(3))
    k[0, 20, 0, 1], v[0, 10, 1, 3], q[0, 4, 1, 0] = torch.nan, torch.inf, torch.nan
    for score in (fv.LocalLinear(), fv.Parallax(draw(source, 1, 30, 2, 4))):
        exact = fv.attend(q, k, v, pattern, score, implementation="reference")
        got = fv.attend(q, k, v, pattern, score, implementation="cpu")
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-8, equal_nan=True)
        seen = pattern.dense_mask((30,), (30,))
        expected = torch.zeros(1, 30, 2, 4, dtype=torch.bool)
        expected[0, seen[:, 20], 0] = True
        expected[0, seen[:, 10], 1, 3] = True
        expected[0, 4, 1] = True
        assert torch.equal(got.isnan(), expected)


def test_the_report_says_what_was_reached(source: torch.Generator) -> None:
    q, k, v = (draw(source, 1, 50, 2, 8, dtype=torch.float32) for _ in range(3))
    solved = solve_report(q, k, v, fv.Causal(), fv.LocalLinear(1.0))
    assert solved.unfinished == 0
    assert solved.ratio <= 1
    stopped = solve_report(q, k, v, fv.Causal(), fv.LocalLinear(1e-3, max_iterations=2))
    assert stopped.most_iterations == 2
    assert stopped.unfinished > 0
    assert stopped.implementation in str(stopped)
    loose = solve_report(q, k, v, fv.Causal(), fv.LocalLinear(1.0, tolerance=1e-2))
    assert loose.mean_iterations < solved.mean_iterations
    with pytest.raises(fv.errors.ScoreError, match="iterates"):
        solve_report(q, k, v, implementation="reference")


def test_the_error_stays_below_the_tolerance(source: torch.Generator) -> None:
    """In standard deviations of the values that a row sees."""
    q, k, v = (draw(source, 1, 60, 2, 8) for _ in range(3))
    exact = fv.attend(q, k, v, score=fv.LocalLinear(0.5), implementation="reference")
    mean = fv.attend(q, k, v)
    spread = (fv.attend(q, k, v * v) - mean * mean).sum(-1).sqrt()
    for tolerance in (1e-1, 1e-2, 1e-4):
        o = fv.attend(q, k, v, score=fv.LocalLinear(0.5, tolerance=tolerance))
        assert ((o - exact).norm(dim=-1) <= tolerance * spread).all()


def test_bad_scores_are_refused() -> None:
    x = torch.zeros(1, 5, 2, 4)
    for make in (
        lambda: fv.LocalLinear(0.0),
        lambda: fv.LocalLinear(-1.0),
        lambda: fv.LocalLinear(1.0, max_iterations=0),
        lambda: fv.LocalLinear(1.0, tolerance=-1.0),
        lambda: fv.LocalLinear(1.0, ridge_grad="approximate"),  # type: ignore[arg-type]
        lambda: fv.attend(x, x, x, score=fv.LocalLinear(torch.ones(3))),
        lambda: fv.attend(x, x, x, score=fv.Parallax(x[:, :4])),
        lambda: fv.attend(x, x, x, score=fv.Parallax(x[..., :3])),
        lambda: fv.attend(x, x, x, score=fv.Softmax() + fv.LocalLinear()),
    ):
        with pytest.raises(fv.errors.ScoreError):
            make()
    with pytest.raises(fv.errors.DtypeError, match="ridge"):
        fv.attend(x, x, x, score=fv.LocalLinear(torch.ones(2, dtype=torch.int64)))
    with pytest.raises(fv.errors.UnknownNameError):
        fv.attend(x, x, x, score=fv.LocalLinear(), implementation="sdpa")


def test_the_plan_is_explained() -> None:
    x = torch.zeros(1, 64, 2, 8)
    told = fv.explain(x, x, x, fv.Causal(), fv.LocalLinear(2.0))
    assert told.implementation == "cpu"
    assert told.score == "LocalLinear(ridge=2.0)"
    assert [name for name, _ in told.refusals] == ["triton"]
    assert told.flops > fv.explain(x, x, x, fv.Causal()).flops


def test_one_operator_under_a_compiler(source: torch.Generator) -> None:
    q, k, v = (draw(source, 1, 12, 2, 4).requires_grad_() for _ in range(3))
    ridge = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> Tensor:
        return fv.attend(q, k, v, fv.Causal(), fv.LocalLinear(ridge))

    plain, found = (
        run(q, k, v, ridge)
        for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True))
    )
    torch.testing.assert_close(found, plain)
    for a, b in zip(
        *(torch.autograd.grad(o.sin().sum(), (q, k, v, ridge)) for o in (found, plain)), strict=True
    ):
        torch.testing.assert_close(a, b)
