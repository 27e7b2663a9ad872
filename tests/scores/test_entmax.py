"""alpha-entmax: what the weights are, and that tiles give what the definition says."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.engines.entmax.solve import threshold, weights
from foveal.testing import Sizes, qkv
from tests.engines.entmax.agree import Problem, agree

ALPHAS = [1.5, 2.0, 1.2]


def projected(s: torch.Tensor) -> torch.Tensor:
    """The nearest point of the simplex, by sorting."""
    order = torch.sort(s, dim=-1, descending=True).values
    place = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    total = order.cumsum(-1) - 1
    inside = (order * place > total).sum(-1, keepdim=True)
    return (s - total.gather(-1, inside - 1) / inside).clamp_min(0.0)


def scores(source: torch.Generator, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_add_to_one_and_ignore_a_shift(alpha: float, source: torch.Generator) -> None:
    s = scores(source, 5, 17)
    p = weights(s, alpha)
    torch.testing.assert_close(p.sum(-1), torch.ones(5, dtype=p.dtype))
    torch.testing.assert_close(weights(s + 7.5, alpha), p)


def test_two_is_the_projection_on_the_simplex(source: torch.Generator) -> None:
    s = scores(source, 6, 13)
    torch.testing.assert_close(weights(s, 2.0), projected(s))


def test_near_one_is_softmax(source: torch.Generator) -> None:
    s = scores(source, 6, 13)
    torch.testing.assert_close(weights(s, 1 + 1e-6), s.softmax(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_scores_share_equally(alpha: float) -> None:
    p = weights(torch.zeros(2, 50, dtype=torch.float64), alpha)
    torch.testing.assert_close(p, torch.full_like(p, 0.02))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_of_scores_and_alpha(alpha: float, source: torch.Generator) -> None:
    s = scores(source, 3, 7).requires_grad_()
    a = torch.tensor(alpha - 0.03, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weights, (s, a))


def test_an_empty_row_has_no_weights() -> None:
    s = torch.full((2, 4), -torch.inf, dtype=torch.float64, requires_grad=True)
    p = weights(s, 1.5)
    assert not p.any()
    (gradient,) = torch.autograd.grad(p.sum(), s)
    assert not gradient.any()
    assert bool((threshold(s.detach(), 2.0) == torch.inf).all())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    "pattern",
    [fv.Dense(), fv.Causal(), fv.Sliding(7, 0, sink_tokens=2), fv.Causal() & fv.Strided(3)],
    ids=str,
)
def test_tiles_agree_with_the_definition(
    pattern: fv.Pattern, alpha: float, source: torch.Generator
) -> None:
    q, k, v = qkv(Sizes((45,), None, 2, 4, 2, 8, 5), source)
    agree(Problem(q, k, v, pattern, alpha), "cpu")


def test_grids_and_documents(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((7, 9), None, 1, 2, 1, 8), source)
    agree(Problem(q, k, v, fv.Neighborhood((3, 5)), 1.5), None)
    q, k, v = qkv(Sizes((40,), None, 1, 2, 2, 8), source)
    cut = torch.tensor([0, 3, 3, 29, 40], dtype=torch.int32)
    agree(Problem(q, k, v, fv.Causal(), 1.5, cut), None)


def test_a_row_that_sees_nothing_is_zero(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((9,), (4,), 1, 1, 1, 8), source)
    for implementation in ("cpu", "reference"):
        x = q.clone().requires_grad_()
        o = fv.attend(x, k, v, fv.Causal(), fv.Entmax(), implementation=implementation)
        assert not o[:, :5].any()
        (gradient,) = torch.autograd.grad(o.sum(), x)
        assert bool(gradient.isfinite().all())


def test_alpha_per_head(source: torch.Generator) -> None:
    q, k, v = (x.double() for x in qkv(Sizes((12,), None, 2, 4, 2, 8), source))
    alpha = torch.tensor([1.2, 1.5, 1.7, 2.0], dtype=torch.float64)
    o = fv.attend(q, k, v, fv.Causal(), fv.Entmax(alpha))
    for h in range(4):
        own = (q[:, :, h : h + 1], *(x[:, :, h // 2 : h // 2 + 1] for x in (k, v)))
        alone = fv.attend(*own, fv.Causal(), fv.Entmax(float(alpha[h])))
        torch.testing.assert_close(o[:, :, h : h + 1], alone)


def test_runs_under_compile(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((20,), None, 1, 2, 2, 8), source)

    def call(q: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = fv.attend(q, k, v, fv.Causal(), fv.Entmax(1.5))
        return out

    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(q), call(q))


@pytest.mark.parametrize("alpha", [1.0, 2.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(fv.errors.ScoreError, match="alpha"):
        fv.Entmax(alpha)


def test_what_does_not_go_together_is_refused(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((6,), None, 1, 2, 2, 8), source)
    with pytest.raises(fv.errors.ScoreError):
        fv.attend(q, k, v, score=fv.Entmax() + fv.Alibi(torch.ones(2)))
    with pytest.raises(fv.errors.ScoreError, match=r"\[2\]"):
        fv.attend(q, k, v, score=fv.Entmax(torch.full((3,), 1.5)))
    with pytest.raises(fv.errors.FovealError, match="log-sum-exp"):
        fv.attend(q, k, v, score=fv.Entmax(), return_lse=True)
