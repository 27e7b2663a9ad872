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
