"""Without gradients a CPU takes a few heads at a time: the same numbers as all heads in PyTorch's hands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveal as fv

RULES = [
    (fv.Additive(), "none"),
    (fv.Additive(), "channel"),
    (fv.Additive(normalised=True), "token"),
    (fv.Delta(), "fixed"),
    (fv.Delta(), "channel"),
    (fv.MLSTM(), "token"),
    (fv.TwoState(), "token"),
    (fv.TwoState(chunk=48), "token"),
]
LENGTHS = (600, 1, 570, 0)


def inputs(rule: fv.Rule, decay: str, steep: bool, source: torch.Generator) -> dict[str, Tensor]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=source, dtype=torch.float64)

    tokens = (1, sum(LENGTHS), 4)
    q, k = (uniform(1, sum(LENGTHS), 2, 20) for _ in range(2))
    found = {"q": q, "k": F.normalize(k, dim=-1), "v": uniform(*tokens, 12) - 0.5}
    shapes = {"fixed": (4,), "token": tokens, "channel": (*tokens, 20)}
    if decay != "none":
        gate = -uniform(*shapes[decay]) * 0.2
        if steep:
            gate = torch.where(uniform(*gate.shape) < 0.01, gate * 300, gate)
        found["log_decay"] = gate
    found["write_gate"] = uniform(*tokens)
    if isinstance(rule, fv.TwoState):
        found["log_momentum"] = -uniform(*tokens)
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize(("rule", "decay"), RULES)
def test_equals_the_form_that_has_gradients(
    rule: fv.Rule, decay: str, steep: bool, threads: int, source: torch.Generator
) -> None:
    given = inputs(rule, decay, steep, source)
    packed = torch.tensor([0, *LENGTHS]).cumsum(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, last = fv.scan(**given, rule=rule, cu_seqlens=packed, return_state=True)
    finally:
        torch.set_num_threads(before)
    given["v"].requires_grad_()
    expected, end = fv.scan(**given, rule=rule, cu_seqlens=packed, return_state=True)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-10)
    for part, other in zip(fv._scan.parts_of(last), fv._scan.parts_of(end), strict=True):
        torch.testing.assert_close(part, other.detach(), rtol=1e-9, atol=1e-10)


def test_runs_in_inference_mode_and_after_it(source: torch.Generator) -> None:
    given = inputs(fv.Delta(), "channel", False, source)
    with torch.inference_mode():
        inside = fv.scan(**given, rule=fv.Delta())
    assert torch.equal(inside, fv.scan(**given, rule=fv.Delta()))
    leaf = given["q"].requires_grad_()
    fv.scan(**given, rule=fv.Delta()).sum().backward()
    assert leaf.grad is not None


def test_knows_tokens_that_are_not_finite_apart(source: torch.Generator) -> None:
    given = inputs(fv.Additive(), "channel", False, source)
    given["v"][:, 600] = torch.nan  # the sequence of one token
    packed = torch.tensor([0, *LENGTHS]).cumsum(0)
    found = fv.scan(**given, rule=fv.Additive(), cu_seqlens=packed)
    assert found[:, 600].isnan().all()
    assert found[:, :600].isfinite().all()
    assert found[:, 601:].isfinite().all()
