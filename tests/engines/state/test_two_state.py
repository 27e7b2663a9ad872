"""A memory with momentum: the chunk form, the decode loop and any cut are the recurrence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveal as fv
from foveal.testing import poisoned_allocations

RULES = [fv.TwoState(), fv.TwoState(chunk=5), fv.TwoState(chunk=64)]


def draw(
    source: torch.Generator,
    length: int,
    *,
    count: int = 1,
    heads: int = 1,
    momentum: str | None = "token",
    decay: str | None = "token",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Arguments of a scan; gates mix 0 and down to -60."""

    def gate(kind: str | None, *sizes: int) -> Tensor | None:
        if kind is None:
            return None
        shape = sizes[-1:] if kind == "fixed" else sizes
        mild = -0.5 * torch.rand(shape, generator=source, dtype=dtype)
        steep = torch.rand(shape, generator=source) < 0.2
        return torch.where(steep, 120 * mild, mild)

    q, k = (torch.randn(count, length, heads, 5, generator=source, dtype=dtype) for _ in range(2))
    tokens = {
        "q": q,
        "k": F.normalize(k, dim=-1),
        "v": torch.randn(count, length, 2, 3, generator=source, dtype=dtype),
        "log_decay": gate(decay, count, length, 2),
        "log_momentum": gate(momentum, count, length, 2),
        "write_gate": 0.5 * torch.rand(count, length, 2, generator=source, dtype=dtype),
    }
    return {name: x for name, x in tokens.items() if x is not None}


def fresh(rule: fv.TwoState, count: int, source: torch.Generator) -> tuple[Tensor, ...]:
    """A state in the middle of a run, where runs are longer than a token."""
    parts = [torch.rand(count, 2, 5, 3, generator=source, dtype=torch.float64) for _ in range(3)]
    if rule.chunk == 1:
        return tuple(parts[:2])
    places = torch.randint(1, rule.chunk, (count, 1), generator=source).double().expand(-1, 2)
    return (*parts, places.clone())


def results(
    rule: fv.TwoState,
    tokens: dict[str, Tensor],
    state: tuple[Tensor, ...] | None,
    implementation: str | None,
    **options: Any,
) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tokens.items()}
    parts = None
    if state is not None:
        parts = tuple(x.detach().clone().requires_grad_(x.dim() > 2) for x in state)
    o, last = fv.scan(
        **leaves, rule=rule, initial_state=parts, return_state=True,
        implementation=implementation, **options,
    )  # fmt: skip
    found = {"o": o} | {f"state {number}": part for number, part in enumerate(last)}
    differentiable = [x for x in found.values() if x.requires_grad]
    source = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=source).to(x) for x in differentiable]
    wanted = leaves | {
        f"initial {number}": part for number, part in enumerate(parts or ()) if part.requires_grad
    }
    gradients = torch.autograd.grad(
        differentiable, list(wanted.values()), weights, materialize_grads=True
    )
    named = {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()} | named


def agree(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(
            got[name], x, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one token": (1, {}, {}),
    "one token of two sequences, no momentum": (1, {"count": 2, "momentum": None}, {}),
    "one token, fixed gates": (1, {"momentum": "fixed", "decay": "fixed"}, {}),
    "63 tokens": (63, {}, {}),
    "64 tokens, two sequences": (64, {"count": 2}, {}),
    "65 tokens, no momentum": (65, {"momentum": None}, {}),
    "65 tokens, fixed gates, no decay": (65, {"momentum": "fixed", "decay": None}, {}),
    "66 tokens, fixed decay, reverse": (66, {"decay": "fixed"}, {"reverse": True}),
    "packed": (100, {}, {"cu_seqlens": torch.tensor([0, 3, 3, 64, 100])}),
    "packed, no momentum": (
        80,
        {"momentum": None},
        {"cu_seqlens": torch.tensor([0, 0, 65, 66, 80]), "reverse": True},
    ),
    "nothing": (0, {}, {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
@pytest.mark.parametrize("begins", ["fresh", "in a run"])
def test_chunk_form_is_the_recurrence(
    rule: fv.TwoState, name: str, begins: str, source: torch.Generator
) -> None:
    length, drawn, options = CASES[name]
    tokens = draw(source, length, **drawn)
    count = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else drawn.get("count", 1)
    state = fresh(rule, count, source) if begins == "in a run" else None
    exact = results(rule, tokens, state, "reference", **options)
    agree(results(rule, tokens, state, "chunk", **options), exact)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_chunk_form_is_the_recurrence_on_1000_tokens(
    rule: fv.TwoState, source: torch.Generator
) -> None:
    tokens = draw(source, 1000)
    agree(results(rule, tokens, None, "chunk"), results(rule, tokens, None, "reference"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_decode_loop_and_any_cut_are_the_whole(rule: fv.TwoState, source: torch.Generator) -> None:
    tokens = draw(source, 70)
    whole, last = fv.scan(**tokens, rule=rule, return_state=True)
    for sizes in ((1,) * 70, (7, 1, 62), (64, 6)):
        state, outputs, start = None, [], 0
        for size in sizes:
            own = {name: x[:, start : start + size] for name, x in tokens.items()}
            if size == 1:
                q, k, v = (own.pop(name) for name in "qkv")
                o, state = fv.scan_step(q, k, v, rule, state, **own)
            else:
                o, state = fv.scan(**own, rule=rule, initial_state=state, return_state=True)
            outputs.append(o)
            start += size
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


def test_packed_is_each_sequence_alone(source: torch.Generator) -> None:
    edges = (0, 5, 5, 70)
    rule = fv.TwoState(chunk=16)
    tokens, state = draw(source, 70), fresh(rule, 3, source)
    packed, states = fv.scan(
        **tokens, rule=rule, initial_state=state, return_state=True, cu_seqlens=torch.tensor(edges)
    )
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        own = {name: x[:, start:stop] for name, x in tokens.items()}
        first = tuple(part[number : number + 1] for part in state)
        o, last = fv.scan(**own, rule=rule, initial_state=first, return_state=True)
        torch.testing.assert_close(packed[:, start:stop], o)
        for part, own_part in zip(states, last, strict=True):
            torch.testing.assert_close(part[number : number + 1], own_part)


def test_without_momentum_and_decay_the_online_rule_is_the_delta_rule(
    source: torch.Generator,
) -> None:
    tokens = draw(source, 70, momentum=None, decay=None)
    torch.testing.assert_close(
        fv.scan(**tokens, rule=fv.TwoState()), fv.scan(**tokens, rule=fv.Delta())
    )


def test_decay_comes_after_the_read(source: torch.Generator) -> None:
    """M_t = (a - b k k^T) M + b k v^T: the delta rule with gates moved by one token."""
    tokens = draw(source, 40, momentum=None)
    o = fv.scan(**tokens, rule=fv.TwoState(), scale=1.0)
    memory = torch.zeros(2, 5, 3, dtype=torch.float64)
    for t in range(40):
        k, v = tokens["k"][0, t, 0], tokens["v"][0, t]
        for h in range(2):
            a, b = tokens["log_decay"][0, t, h].exp(), tokens["write_gate"][0, t, h]
            turn = a * torch.eye(5, dtype=torch.float64) - b * torch.outer(k, k)
            memory[h] = turn @ memory[h] + b * torch.outer(k, v[h])
            torch.testing.assert_close(o[0, t, h], tokens["q"][0, t, 0] @ memory[h])


def test_grouped_values_are_repeated_keys(source: torch.Generator) -> None:
    tokens = draw(source, 40)
    repeated = tokens | {n: tokens[n].repeat_interleave(2, dim=2) for n in "qk"}
    torch.testing.assert_close(
        fv.scan(**tokens, rule=fv.TwoState()), fv.scan(**repeated, rule=fv.TwoState())
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_reads_no_memory_before_it_is_written(rule: fv.TwoState, source: torch.Generator) -> None:
    tokens, state = draw(source, 70), fresh(rule, 3, source)
    with poisoned_allocations():
        found = results(rule, tokens, state, "chunk", cu_seqlens=torch.tensor([0, 2, 2, 70]))
    assert all(bool(x.isfinite().all()) for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_its_dtype_and_a_float32_state(
    dtype: torch.dtype, source: torch.Generator
) -> None:
    tokens = draw(source, 70, dtype=torch.float32)
    low = tokens | {name: tokens[name].to(dtype) for name in "qkv"}
    o, state = fv.scan(**low, rule=fv.TwoState(), return_state=True)
    exact = fv.scan(**{n: x.double() for n, x in low.items()}, rule=fv.TwoState(),
                    implementation="reference")  # fmt: skip
    assert o.dtype == dtype
    assert state[0].dtype == torch.float32
    error = float((o.double() - exact).abs().max() / exact.abs().max())
    assert error < 1.5 * torch.finfo(dtype).eps + 2e-6


def test_the_plan_says_what_runs() -> None:
    x = torch.zeros(1, 9, 2, 4, device="meta")
    plan = fv.explain_scan(x, x, x, fv.TwoState(), device="cuda")
    assert plan.implementation == "chunk"
    assert dict(plan.refusals)["triton"].startswith("it has no kernel for a rule with two memories")


X = torch.zeros(1, 5, 2, 4)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"log_momentum": torch.zeros(1, 5, 3)}, fv.errors.ShapeError, "log_momentum"),
    "rule": ({"log_momentum": X[..., 0], "rule": fv.Delta()}, fv.errors.RuleError, "TwoState"),
    "channels": ({"log_decay": X}, fv.errors.RuleError, "per token"),
    "parts": ({"initial_state": X}, fv.errors.RuleError, "memory, momentum"),
    "named": ({"implementation": "triton"}, fv.errors.RefusedError, "two memories"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changes, error, text = BAD[name]
    with pytest.raises(error, match=text):
        fv.scan(**({"q": X, "k": X, "v": X, "rule": fv.TwoState()} | changes))
    with pytest.raises(fv.errors.RuleError, match="chunk"):
        fv.TwoState(chunk=0)
