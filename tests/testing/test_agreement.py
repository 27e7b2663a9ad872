import dataclasses

import pytest
import torch

import foveal as fv
from foveal._plan import TILE_IMPLEMENTATIONS
from foveal.engines.tile import cpu, reference
from foveal.testing import Sizes, check_attend, qkv


class Wrong:
    """The tiled edition with one result spoilt."""

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def refuses(self, problem, pattern, score):
        return None

    def attend(self, *arguments):
        return self.spoil(*cpu.attend(*arguments))


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * (1 + 1e-4)


def test_names_every_result(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((20,), q_heads=2), source)
    score = fv.Softmax(sink=torch.ones(2)) + fv.Alibi(torch.ones(2))
    verdicts = check_attend(q, k, v, fv.Causal(), score)
    assert [verdict.name for verdict in verdicts] == [
        "o", "lse", "dq", "dk", "dv", "dSoftmax.sink", "dAlibi.slopes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda o, lse: (o * (1 + 1e-4), lse), "o: error"),
        (lambda o, lse: (o, lse + 1e-3), "lse: error"),
        (lambda o, lse: (ScaledGradient.apply(o), lse), "dv: error"),
        (lambda o, lse: (o, lse.detach() + 0 * lse), "dq: error"),
        (lambda o, lse: (o.bfloat16().float(), lse), "o: error"),
        (lambda o, lse: (o.index_fill(1, torch.tensor([7]), torch.nan), lse), "o: error inf"),
    ],
)
def test_sees_what_is_wrong(
    spoil: object, named: str, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TILE_IMPLEMENTATIONS, "cpu", Wrong(spoil))
    q, k, v = qkv(Sizes((60,), q_heads=2), source)
    with pytest.raises(AssertionError, match=named):
        check_attend(q, k, v, fv.Sliding(9), implementation="cpu")


def test_half_precision_is_not_an_excuse(
    source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TILE_IMPLEMENTATIONS, "cpu", Wrong(lambda o, lse: (o + 0.1, lse)))
    q, k, v = qkv(Sizes((60,), q_heads=2), source, torch.bfloat16)
    with pytest.raises(AssertionError, match="o: error"):
        check_attend(q, k, v, fv.Sliding(9), implementation="cpu")


def test_accepts_the_reference_itself(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((6, 5), q_heads=2), source)
    assert reference.refuses is not None
    check_attend(q, k, v, fv.Neighborhood(3), implementation="reference")


class Edition:
    def __init__(self, attend) -> None:
        self.attend = attend

    def refuses(self, problem, pattern, score):
        return None


@pytest.mark.parametrize(
    ("dtype", "left"), [(torch.float32, 60), (torch.float16, 20), (torch.bfloat16, 4)]
)
@pytest.mark.parametrize("shift", [-1, 1], ids=["a key dropped", "a key too many"])
def test_sees_one_pair_too_few_or_too_many(
    shift: int,
    dtype: torch.dtype,
    left: int,
    source: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend(problem, pattern, score, geometry, q, k, v):
        o, lse = reference.attend(problem, pattern, score, geometry, q, k, v)
        wrong = fv.Sliding(pattern.left + shift)
        there = dataclasses.replace(geometry, pattern=wrong)
        row = reference.attend(problem, wrong, score, there, q, k, v)
        last = (x[:, -1:] for x in row)
        return tuple(torch.cat([x[:, :-1], y], 1) for x, y in zip((o, lse), last, strict=True))

    monkeypatch.setitem(TILE_IMPLEMENTATIONS, "cpu", Edition(attend))
    q, k, v = qkv(Sizes((70,), q_heads=4, head_dim=16), source, dtype)
    with pytest.raises(AssertionError, match=r"> .* allowed"):
        check_attend(q, k, v, fv.Sliding(left), implementation="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sees_sums_kept_in_half_precision(
    dtype: torch.dtype, source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(problem, pattern, score, geometry, q, k, v):
        o, lse = reference.attend(problem, pattern, score, geometry, q, k, v)
        weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(score.scale).float().softmax(-1)
        total = torch.zeros_like(o)
        for first in range(0, k.shape[1], 4):
            keys = slice(first, first + 4)
            part = torch.einsum("bhij,bjhd->bihd", weights[..., keys].to(dtype), v[:, keys])
            total = total + part
        return o + (total - o).detach(), lse

    monkeypatch.setitem(TILE_IMPLEMENTATIONS, "cpu", Edition(attend))
    q, k, v = qkv(Sizes((32,), (2048,), head_dim=8), source, dtype)
    with pytest.raises(AssertionError, match="o: error"):
        check_attend(q, k, v + 3, fv.Dense(), implementation="cpu")


def test_sees_sums_of_float32_kept_in_bfloat16(
    source: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        TILE_IMPLEMENTATIONS, "cpu", Wrong(lambda o, lse: (o + (o.bfloat16() - o).detach(), lse))
    )
    q, k, v = qkv(Sizes((60,), q_heads=2), source)
    with pytest.raises(AssertionError, match="o: error"):
        check_attend(q, k, v, fv.Sliding(9), implementation="cpu")


def test_luck_of_the_plain_computation_refuses_nobody(source: torch.Generator) -> None:
    """Results of one number, where a single plain computation errs too little in 3 of 10 cases."""
    for _ in range(40):
        q, k, v = qkv(Sizes((24,), head_dim=4), source)
        sink = torch.randn(1, generator=source)
        check_attend(q, k, v, fv.Causal(), fv.Softmax(sink=sink), implementation="cpu")


def test_a_cap_that_is_reached_refuses_nobody(source: torch.Generator) -> None:
    """The slope 1 - t^2 of the cap is a difference of two ones, and all that is left of dq and dk."""
    for _ in range(20):
        sizes = Sizes((15,), (1,), q_heads=2, kv_heads=1, head_dim=20)
        q, k, v = qkv(sizes, source, torch.float64)
        check_attend(3 * q, 2 * k, v, score=fv.Softmax(1.3, soft_cap=1.5), implementation="cpu")
