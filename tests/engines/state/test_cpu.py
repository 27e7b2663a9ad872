"""Without gradients a CPU takes segments of all heads: the same numbers as the form that has gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveal as fv
from foveal._scan import parts_of
from foveal.engines.state import cpu_two_state, segments
from foveal.engines.tile.workers import Scratch
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("repeated", [True, False])
def test_inverses_of_corners_are_joined(
    repeated: bool, dtype: torch.dtype, source: torch.Generator
) -> None:
    """Keys that repeat make powers of A that are much larger than its inverse."""
    size = segments.CHUNK
    buffers = segments.Buffers(2 * size + 7, 2, dtype, Scratch())
    lower = buffers.take("pairs", size, size)
    drawn = torch.randn(lower.shape, generator=source, dtype=dtype)
    lower.copy_(torch.full_like(drawn, 0.9) if repeated else drawn / 8)
    whole = torch.eye(size, dtype=torch.float64) + lower.double().tril(-1)
    exact = torch.linalg.inv(whole)
    found = buffers.inverse(lower)
    assert torch.equal(found, found.tril())
    # Substitution is as good as one product more; the errors of joined corners go through another.
    growth = exact.abs() @ whole.abs()
    bound = size * torch.finfo(dtype).eps * (growth @ exact.abs())
    if not repeated:
        bound = growth @ bound
    assert ((found.double() - exact).abs() <= bound + 2**-52 * exact.abs().amax()).all()


@pytest.mark.parametrize("steps", [(-0.2, -0.2), (-0.2, -1e-3), (-1e-3, -0.2), (0.0, 0.0)])
@pytest.mark.parametrize("size", [64, 50, 33])
def test_decays_of_momentum_and_memory_keep_their_digits(
    size: int, steps: tuple[float, float], source: torch.Generator
) -> None:
    length = 3 * size - 5

    def gates(step: float) -> Tensor:
        return step * (0.5 + torch.rand(length, 2, generator=source))

    def between(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        factors = [segments.factors_of_tokens(x, length, dtype, size) for x in drawn]
        assert not any(factors[0][1] + factors[1][1])
        at = cpu_two_state._decays(factors[0][0], factors[1][0], length % size)
        buffers = segments.Buffers(length, 2, dtype, Scratch(), size)
        return cpu_two_state._between(at, buffers, size), at.of_momentum

    drawn = [gates(step) for step in steps]
    decays = [torch.zeros(2, 3 * size, dtype=torch.float64) for _ in drawn]
    for own, x in zip(decays, drawn, strict=True):
        own[:, :length] = x.mT
    sums = [x.unflatten(1, (3, size)).transpose(0, 1).cumsum(-1) for x in decays]
    adds, spread = ((x[..., :, None] - x[..., None, :]).exp().tril() for x in sums)
    adds[-1, :, :, length % size :] = 0
    exact = adds @ spread
    of_momentum = (adds @ sums[1].exp()[..., None]).squeeze(-1)
    for dtype, allowed in ((torch.float32, 128 * 2**-24), (torch.float64, 1024 * 2**-53)):
        found, of = between(dtype)
        # Sums of positive numbers: a rounding for each, in float64 also those of the running sums.
        torch.testing.assert_close(found.double(), exact, rtol=allowed, atol=0)
        torch.testing.assert_close(of.double(), of_momentum, rtol=allowed, atol=0)
