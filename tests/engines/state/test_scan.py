"""The recurrence, its chunk form and the decode loop are one; bad input is named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.testing import poisoned_allocations
from tests.engines.state.problems import Shape, draw, results

RULES = [
    fv.Additive(),
    fv.Additive(normalised=True),
    fv.Delta(),
    fv.MLSTM(),
    fv.MLSTM("sigmoid"),
    fv.MLSTM("sigmoid", normalised=False),
]
SHAPES = {
    "one token": Shape(1),
    "63 tokens": Shape(63, "channel"),
    "64 tokens, fixed decay": Shape(64, "fixed", batch=2),
    "65 tokens, no decay, no gate": Shape(65, "none", gated=False),
    "reverse": Shape(70, reverse=True),
    "packed": Shape(100, cu_seqlens=(0, 3, 3, 64, 100)),
    "packed, per channel, reverse": Shape(
        90, "channel", cu_seqlens=(0, 0, 65, 66, 90), reverse=True
    ),
    "nothing": Shape(0),
}
COMBINATIONS = [
    pytest.param(rule, shape, id=f"{rule.key}-{name}")
    for rule in RULES
    for name, shape in SHAPES.items()
    if not (isinstance(rule, fv.MLSTM) and (shape.decay == "channel" or not shape.gated))
]


def agree(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(
            got[name], x, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("rule", "shape"), COMBINATIONS)
def test_chunk_form_is_the_recurrence(rule: fv.Rule, shape: Shape, source: torch.Generator) -> None:
    inputs = draw(shape, rule, source)
    agree(results(inputs, rule, shape, "chunk"), results(inputs, rule, shape, "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_chunk_form_is_the_recurrence_on_1000_tokens(
    rule: fv.Rule, source: torch.Generator
) -> None:
    shape = Shape(1000, "token", steep=False)
    inputs = draw(shape, rule, source)
    agree(results(inputs, rule, shape, "chunk"), results(inputs, rule, shape, "reference"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_decode_loop_is_the_chunk_form(rule: fv.Rule, source: torch.Generator) -> None:
    shape = Shape(40)
    inputs = draw(shape, rule, source, initial=False)
    tokens = {n: inputs[n] for n in ("q", "k", "v", "log_decay", "write_gate")}
    q, k, v = (tokens.pop(name) for name in "qkv")
    whole, last = fv.scan(q, k, v, rule, **tokens, return_state=True, implementation="chunk")
    state, outputs = None, []
    for t in range(40):
        own = {name: x[:, t : t + 1] for name, x in tokens.items()}
        o, state = fv.scan_step(
            q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], rule, state, **own
        )
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
@pytest.mark.parametrize("cut", [1, 32, 45])
def test_split_sequence_is_the_whole(rule: fv.Rule, cut: int, source: torch.Generator) -> None:
    inputs = draw(Shape(66), rule, source)
    tokens = {n: x for n, x in inputs.items() if n != "initial_state"}
    whole = fv.scan(**inputs, rule=rule, return_state=True)
    before = {n: x[:, :cut] for n, x in tokens.items()}
    after = {n: x[:, cut:] for n, x in tokens.items()}
    state = inputs["initial_state"]
    first, state = fv.scan(**before, rule=rule, initial_state=state, return_state=True)
    second, state = fv.scan(**after, rule=rule, initial_state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, whole[1], rtol=1e-9, atol=1e-9)


def test_packed_is_each_sequence_alone(source: torch.Generator) -> None:
    edges = (0, 5, 5, 70)
    shape = Shape(70, "channel", cu_seqlens=edges)
    inputs = draw(shape, fv.Delta(), source)
    initial = inputs.pop("initial_state")[0]
    packed, states = fv.scan(
        **inputs, rule=fv.Delta(), initial_state=initial, return_state=True,
        cu_seqlens=torch.tensor(edges),
    )  # fmt: skip
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        own = {name: x[:, start:stop] for name, x in inputs.items()}
        first = initial[number : number + 1]
        o, state = fv.scan(**own, rule=fv.Delta(), initial_state=first, return_state=True)
        torch.testing.assert_close(packed[:, start:stop], o)
        torch.testing.assert_close(states[number : number + 1], state)


def test_grouped_values_are_repeated_keys(source: torch.Generator) -> None:
    inputs = draw(Shape(40, heads=2, value_heads=6), fv.Delta(), source)
    inputs["initial_state"] = inputs["initial_state"][0]
    repeated = inputs | {n: inputs[n].repeat_interleave(3, dim=2) for n in "qk"}
    torch.testing.assert_close(
        fv.scan(**inputs, rule=fv.Delta()), fv.scan(**repeated, rule=fv.Delta())
    )


def test_without_decay_and_gate_it_is_linear_attention(source: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 50, 3, 4, generator=source, dtype=torch.float64) for _ in range(3))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).tril() * 0.5
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(fv.scan(q, k, v), expected)


def test_equal_channels_are_a_decay_per_token(source: torch.Generator) -> None:
    inputs = draw(Shape(70), fv.Delta(), source)
    inputs["initial_state"] = inputs["initial_state"][0]
    same = inputs["log_decay"][..., None].expand(-1, -1, -1, 5)
    torch.testing.assert_close(
        fv.scan(**inputs, rule=fv.Delta()),
        fv.scan(**inputs | {"log_decay": same}, rule=fv.Delta()),
    )


def test_a_closed_write_gate_leaves_a_pure_decay(source: torch.Generator) -> None:
    inputs = draw(Shape(33, "fixed", steep=False), fv.Delta(), source)
    initial = inputs.pop("initial_state")[0]
    inputs["write_gate"] = torch.zeros_like(inputs["write_gate"])
    _, state = fv.scan(**inputs, rule=fv.Delta(), initial_state=initial, return_state=True)
    factor = (33 * inputs["log_decay"]).exp()[:, None, None]
    torch.testing.assert_close(state, initial * factor)


def test_the_delta_rule_stores_what_orthonormal_keys_ask_for(source: torch.Generator) -> None:
    k = torch.linalg.qr(torch.randn(8, 8, generator=source, dtype=torch.float64)).Q[None, :, None]
    v = torch.randn(1, 8, 1, 3, generator=source, dtype=torch.float64)
    _, state = fv.scan(k, k, v, fv.Delta(), return_state=True)
    torch.testing.assert_close(torch.einsum("nhkv,nlhk->nlhv", state, k), v)


def test_mlstm_without_a_memory_before_keeps_its_digits(source: torch.Generator) -> None:
    """What is before the first token has a scale of 0: no number of that enters the running sums."""
    q, k, v = (torch.randn(1, 150, 2, 8, generator=source, dtype=torch.float64) for _ in "qkv")
    gates = torch.randn(2, 1, 150, 2, generator=source, dtype=torch.float64)
    cut = torch.tensor([0, 40, 150])
    for where in (None, cut):
        found = [
            fv.scan(
                q, k, v, fv.MLSTM(), log_decay=torch.nn.functional.logsigmoid(gates[0]), write_gate=gates[1],
                cu_seqlens=where, implementation=implementation,
            )
            for implementation in ("reference", "chunk")
        ]  # fmt: skip
        exact, chunked = found
        assert (chunked - exact).norm() < 64 * 2.0**-53 * exact.norm()


def test_mlstm_does_not_overflow() -> None:
    q, k, v = (torch.ones(1, 80, 1, 4) for _ in range(3))
    gate = torch.linspace(-300, 300, 80)[None, :, None]
    decay = torch.full((1, 80, 1), -1e-3)
    for implementation in ("reference", "chunk"):
        o = fv.scan(
            q, k, v, fv.MLSTM(), log_decay=decay, write_gate=gate, implementation=implementation
        )
        assert bool(o.isfinite().all())
        torch.testing.assert_close(o[:, -1], torch.ones(1, 1, 4))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_reads_no_memory_before_it_is_written(rule: fv.Rule, source: torch.Generator) -> None:
    shape = Shape(70, cu_seqlens=(0, 2, 2, 70))
    inputs = draw(shape, rule, source)
    with poisoned_allocations():
        found = results(inputs, rule, shape, "chunk")
    assert all(not bool(x.isnan().any()) for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype_and_a_float32_state(
    dtype: torch.dtype, source: torch.Generator
) -> None:
    inputs = draw(Shape(70, "channel"), fv.Delta(), source, dtype=torch.float32)
    low = {n: inputs[n].to(dtype) for n in "qkv"}
    gates = {n: inputs[n] for n in ("log_decay", "write_gate")}
    o, state = fv.scan(**low, rule=fv.Delta(), **gates, return_state=True)
    exact = fv.scan(
        **{n: x.double() for n, x in low.items()},
        rule=fv.Delta(),
        **{n: x.double() for n, x in gates.items()},
        implementation="reference",
    )
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    error = float((o.double() - exact).abs().max() / exact.abs().max())
    assert error < 1.5 * torch.finfo(dtype).eps + 2e-6


@pytest.mark.parametrize("rule", [fv.Additive(), fv.Delta(), fv.MLSTM(), fv.TwoState()], ids=repr)
def test_an_empty_batch_has_an_empty_result(rule: fv.Rule) -> None:
    q, gate = torch.zeros(0, 5, 2, 4, requires_grad=True), torch.zeros(0, 5, 2)
    o, state = fv.scan(q, q, q, rule, log_decay=gate, write_gate=gate, return_state=True)
    assert o.shape == q.shape
    assert all(len(part) == 0 for part in (state if isinstance(state, tuple) else (state,)))
    o.sum().backward()
    assert q.grad is not None


@pytest.mark.slow
def test_time_is_linear_in_the_length() -> None:
    import time

    def seconds(length: int) -> float:
        q, k, v = (torch.randn(1, length, 2, 32) for _ in range(3))
        k, decay = torch.nn.functional.normalize(k, dim=-1), -torch.rand(1, length, 2)
        best = float("inf")
        for _ in range(3):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            begun = time.process_time()
            fv.scan(*leaves, fv.Delta(), log_decay=decay).sum().backward()
            best = min(best, time.process_time() - begun)
        return best

    seconds(2048)
    assert seconds(16384) < 4 * 2.5 * seconds(4096)


X = torch.zeros(2, 5, 2, 4)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"q": X[0]}, fv.errors.ShapeError, "q: got"),
    "k": ({"k": X[:, :4]}, fv.errors.ShapeError, "k: got"),
    "value heads": ({"v": torch.zeros(2, 5, 3, 4)}, fv.errors.ShapeError, "v: got"),
    "dtype": ({"v": X.double()}, fv.errors.DtypeError, "v: got"),
    "decay": ({"log_decay": torch.zeros(2, 5, 3)}, fv.errors.ShapeError, "log_decay: got"),
    "gate": ({"write_gate": torch.zeros(2, 5, 1)}, fv.errors.ShapeError, "write_gate: got"),
    "state": ({"initial_state": torch.zeros(2, 2, 4, 5)}, fv.errors.ShapeError, "initial_state"),
    "parts": ({"initial_state": (X, X)}, fv.errors.RuleError, "initial_state"),
    "packing": ({"cu_seqlens": torch.tensor([0, 5])}, fv.errors.PackingError, "batch of 1"),
    "rule": ({"rule": "delta"}, fv.errors.RuleError, "rule: got"),
    "no input gate": ({"rule": fv.MLSTM()}, fv.errors.RuleError, "write_gate"),
    "name": ({"implementation": "fast"}, fv.errors.UnknownNameError, "implementation"),
    "refused": ({"implementation": "triton"}, fv.errors.RefusedError, "CUDA"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changes, error, text = BAD[name]
    with pytest.raises(error, match=text):
        fv.scan(**({"q": X, "k": X, "v": X} | changes))


def test_one_step_takes_one_token() -> None:
    with pytest.raises(fv.errors.ShapeError, match="one token"):
        fv.scan_step(X, X, X, fv.Delta(), None)


def test_the_plan_is_explained() -> None:
    x = torch.zeros(2, 50, 4, 16, device="meta", dtype=torch.bfloat16)
    found = fv.explain_scan(x, x, x, fv.Delta(), device="cuda")
    assert found.implementation == "triton"
    assert found.refusals == ()
    normalised = fv.explain_scan(x, x, x, fv.Additive(normalised=True), device="cuda")
    assert normalised.implementation == "triton"
    assert found.state_bytes == 2 * 4 * 16 * 16 * 4
    assert found.flops == 6 * 2 * 50 * 4 * 16 * 16
    long = torch.zeros(1, 64 * 300, 1, 16, device="meta", dtype=torch.bfloat16)
    split = fv.explain_scan(long, long, long, device="cuda", implementation="triton")
    assert split.pieces == 10
    assert "10 pieces" in str(split)
    here = fv.explain_scan(x, x, x, fv.Delta())
    assert here.pieces == 2
    assert here.implementation == "chunk"
    assert dict(here.refusals)["triton"] in str(here)
    assert here.as_dict()["decay"] == "none"
