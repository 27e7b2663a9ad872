"""Without gradients a CPU takes segments of all heads: the same numbers as the form that has gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveal as fv
from foveal._scan import parts_of
from foveal.engines.state import segments
from foveal.testing.bounds import check_near, error, neighbour

RULES = [
    (fv.Additive(), "none"),
    (fv.Additive(), "channel"),
    (fv.Additive(normalised=True), "token"),
    (fv.Delta(), "none"),
    (fv.Delta(), "fixed"),
    (fv.Delta(), "channel"),
    (fv.MLSTM(), "token"),
    (fv.MLSTM("sigmoid"), "token"),
    (fv.TwoState(), "token"),
    (fv.TwoState(chunk=48), "token"),
    (fv.TwoState(chunk=48), "none"),
]
LENGTHS = (600, 1, 570, 0)


def inputs(
    rule: fv.Rule, decay: str, steep: bool, source: torch.Generator, length: int = sum(LENGTHS)
) -> dict[str, Tensor]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=source, dtype=torch.float64)

    tokens = (1, length, 4)
    q, k = (uniform(1, length, 2, 20) for _ in range(2))
    found = {"q": q, "k": F.normalize(k, dim=-1), "v": uniform(*tokens, 12) - 0.5}
    shapes = {"fixed": (4,), "token": tokens, "channel": (*tokens, 20)}
    if decay != "none":
        gate = -uniform(*shapes[decay]) * 0.2
        if steep:
            gate = torch.where(uniform(*gate.shape) < 0.01, gate * 300, gate)
        found["log_decay"] = gate
    found["write_gate"] = uniform(*tokens)
    if isinstance(rule, fv.TwoState):
        found["log_momentum"] = -uniform(*tokens) * (1.0 if steep else 0.1)
        found["write_gate"] *= 0.05  # momentum lengthens the steps: longer ones blow every error up
    return found


@pytest.mark.parametrize("elements", [2**18, 2**14], ids=["one segment", "segments"])
@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize(("rule", "decay"), RULES)
def test_equals_the_form_that_has_gradients(
    rule: fv.Rule,
    decay: str,
    steep: bool,
    elements: int,
    source: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "_SEGMENT", elements)
    given = inputs(rule, decay, steep, source)
    packed = torch.tensor([0, *LENGTHS]).cumsum(0)
    found, last = fv.scan(**given, rule=rule, cu_seqlens=packed, return_state=True)
    given["v"].requires_grad_()
    expected, end = fv.scan(**given, rule=rule, cu_seqlens=packed, return_state=True)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-10)
    for part, other in zip(parts_of(last), parts_of(end), strict=True):
        torch.testing.assert_close(part, other.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize(("rule", "decay"), RULES)
def test_float32_is_as_good_as_plain_computations(
    rule: fv.Rule, decay: str, steep: bool, source: torch.Generator
) -> None:
    lengths = (700, 1, 63, 64, 65, 650)
    packed = torch.tensor([0, *lengths]).cumsum(0)
    given = inputs(rule, decay, steep, source, sum(lengths))
    low = {name: x.float() for name, x in given.items()}
    options = {"rule": rule, "cu_seqlens": packed, "return_state": True}

    def results(x: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
        o, state = fv.scan(**x, **options, implementation=implementation)
        parts = {f"part {n} of the state": part for n, part in enumerate(parts_of(state))}
        return {name: each.detach() for name, each in ({"o": o} | parts).items()}

    def with_gradients(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return results(x | {"v": x["v"].detach().requires_grad_()}, "chunk")

    def errors_at(number: int) -> dict[str, float]:
        near = {name: neighbour(x, source) if number else x for name, x in low.items()}
        truths = with_gradients({name: x.double() for name, x in near.items()})
        return {name: error(plain, truths[name]) for name, plain in with_gradients(near).items()}

    exact = results({name: x.double() for name, x in low.items()}, "reference")
    verdicts = check_near(results(low, "chunk"), exact, errors_at)
    assert all(verdict.ok for verdict in verdicts), ", ".join(map(str, verdicts))


@pytest.mark.parametrize("rule", [fv.TwoState(), fv.TwoState(chunk=33)], ids=lambda rule: rule.key)
def test_no_momentum(rule: fv.Rule, source: torch.Generator) -> None:
    given = inputs(rule, "token", False, source, 610)
    del given["log_momentum"]
    found, last = fv.scan(**given, rule=rule, return_state=True)
    expected, end = fv.scan(**given, rule=rule, return_state=True, implementation="reference")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for part, other in zip(parts_of(last), parts_of(end), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", [fv.Delta(), fv.TwoState()], ids=lambda rule: rule.key)
def test_two_threads_find_the_same(rule: fv.Rule, source: torch.Generator) -> None:
    given = inputs(rule, "token", False, source)
    one = fv.scan(**given, rule=rule)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = fv.scan(**given, rule=rule)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)


def test_a_state_inside_a_run_is_passed_on(source: torch.Generator) -> None:
    rule = fv.TwoState(chunk=48)
    given = inputs(rule, "token", False, source, 900)
    whole, last = fv.scan(**given, rule=rule, return_state=True)
    state, outputs = None, []
    for rows in (slice(0, 310), slice(310, 320), slice(320, 900)):
        own = {name: x[:, rows] for name, x in given.items()}
        o, state = fv.scan(**own, rule=rule, initial_state=state, return_state=True)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-10)
    for part, other in zip(parts_of(state), parts_of(last), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-10)


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
