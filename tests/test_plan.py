"""Which implementation runs, in a fixed order, and a sentence from each that does not."""

from typing import Any

import pytest
import torch

import foveal as fv
from foveal._plan import TILE_IMPLEMENTATIONS


def plan(pattern: fv.Pattern, score: fv.Score = fv.Softmax(), **options: object) -> fv.Explanation:
    q = torch.zeros(1, 32, 4, 8)
    return fv.explain(q, q[:, :, :2], q[:, :, :2], pattern, score, **options)


@pytest.mark.parametrize(
    ("pattern", "score", "options", "chosen"),
    [
        (fv.Dense(), fv.Softmax(), {}, "sdpa"),
        (fv.Causal(), fv.Softmax(scale=0.3), {}, "sdpa"),
        (fv.Sliding(32), fv.Softmax(), {}, "sdpa"),
        (fv.Neighborhood(32), fv.Softmax(), {}, "sdpa"),
        (fv.Causal(), fv.Softmax(scale=-0.3), {}, "cpu"),
        (fv.Dense(), fv.Softmax(), {"return_lse": True}, "cpu"),
        (fv.Dense(), fv.Softmax(soft_cap=3.0), {}, "cpu"),
        (fv.Causal(), fv.Alibi(torch.ones(4)), {}, "cpu"),
        (fv.Sliding(4), fv.Softmax(), {}, "cpu"),
        (fv.Neighborhood(5, dilation=2), fv.Softmax(), {}, "cpu"),
        (fv.Causal(), fv.Softmax(), {"cu_seqlens": torch.tensor([0, 10, 32])}, "cpu"),
        (fv.Causal(), fv.Softmax(), {"cu_seqlens": torch.tensor([0, 32])}, "sdpa"),
    ],
    ids=str,
)
def test_the_first_that_does_not_refuse(
    pattern: fv.Pattern, score: fv.Score, options: dict[str, object], chosen: str
) -> None:
    found = plan(pattern, score, **options)
    assert found.implementation == chosen
    order = list(TILE_IMPLEMENTATIONS)
    assert [name for name, _ in found.refusals] == order[: order.index(chosen)]
    for name, reason in found.refusals:
        assert len(reason.split()) > 3, name
        assert not reason.endswith("."), name


@pytest.mark.parametrize("implementation", ["cpu", "reference", "sdpa"])
def test_the_named_implementation_is_the_one_that_runs(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan(fv.Causal(), implementation=implementation).implementation == implementation
    ran = []
    for name in ("cpu", "reference", "sdpa"):
        module = TILE_IMPLEMENTATIONS[name]

        def recorded(*arguments: object, name: str = name, attend: Any = module.attend) -> Any:
            ran.append(name)
            return attend(*arguments)

        monkeypatch.setattr(module, "attend", recorded)
    q = torch.randn(1, 32, 2, 8)
    fv.attend(q, q, q, fv.Causal(), implementation=implementation)
    assert ran == [implementation]


def test_the_same_sentence_in_the_plan_and_in_the_error() -> None:
    reasons = dict(plan(fv.Sliding(4)).refusals)
    with pytest.raises(fv.errors.RefusedError) as raised:
        plan(fv.Sliding(4), implementation="sdpa")
    assert raised.value.reason == reasons["sdpa"]
