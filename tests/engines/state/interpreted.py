"""What a process with Triton's interpreter runs: the Triton edition of the state engine on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import foveal as fv
from foveal.engines.state import task
from foveal.engines.state.launch_join import launch_join
from foveal.testing.bounds import check_near, error
from tests.engines.state.problems import Shape, draw, results

_SIZES = {"head_dim": 10, "value_dim": 18}

CASES: dict[str, tuple[fv.Rule, Shape]] = {
    "delta, per token": (fv.Delta(), Shape(70, "token", **_SIZES)),
    "delta, per channel, packed": (
        fv.Delta(),
        Shape(70, "channel", cu_seqlens=(0, 3, 3, 67, 70), steep=False, **_SIZES),
    ),
    "delta, fixed, no gate": (fv.Delta(), Shape(66, "fixed", gated=False, steep=False, **_SIZES)),
    "additive, in pieces": (fv.Additive(), Shape(200, "token", steep=False, **_SIZES)),
    "mlstm, packed, in pieces": (
        fv.MLSTM(),
        Shape(200, "token", cu_seqlens=(0, 3, 3, 40, 200), steep=False, **_SIZES),
    ),
    "delta, per channel, in pieces": (
        fv.Delta(),
        Shape(200, "channel", cu_seqlens=(0, 3, 3, 40, 200), steep=False, **_SIZES),
    ),
    "additive, per channel, in pieces": (
        fv.Additive(),
        Shape(140, "channel", steep=False, head_dim=10, value_dim=16),
    ),
    "additive, per channel, reverse": (
        fv.Additive(),
        Shape(65, "channel", reverse=True, **_SIZES),
    ),
    "additive, no decay": (fv.Additive(), Shape(63, "none", batch=2, **_SIZES)),
    "normalised": (fv.Additive(normalised=True), Shape(65, "fixed", steep=False, **_SIZES)),
    "mlstm": (fv.MLSTM(), Shape(65, "token", steep=False, **_SIZES)),
    "nothing": (fv.Delta(), Shape(0, **_SIZES)),
}


@contextmanager
def in_pieces(chunks: int) -> Iterator[None]:
    """Cuts sequences in pieces of so many chunks, whatever the plan would do."""
    chosen = task.piece_of
    task.piece_of = lambda *sizes: chunks
    try:
        yield
    finally:
        task.piece_of = chosen


def failures(name: str, seed: int) -> list[str]:
    """What is worse than the precision allows: o, the final state and all gradients."""
    rule, shape = CASES[name]
    # Behind steep gates nothing is left of an initial state: its gradient is all rounding.
    source = torch.Generator().manual_seed(seed)
    inputs = draw(shape, rule, source, torch.float32, initial=not shape.steep)
    exact = results(inputs, rule, shape, "chunk", torch.float64)
    with in_pieces(1 if "in pieces" in name else 99):
        got = results(inputs, rule, shape, "triton")
    # The gradient of a decay sums q dq - k dk over the tokens behind it, which cancel; that of a fixed
    # decay sums those of all tokens.
    terms = sum((inputs[n].double() * exact[f"d{n}"]).abs().sum() for n in "qk")
    terms = terms * shape.length if shape.decay == "fixed" else terms
    sizes = {"dlog_decay": terms}
    if rule == fv.Additive():
        sizes = results(_unsigned(inputs), rule, shape, "chunk", torch.float64, False) | sizes

    def errors_at(number: int) -> dict[str, float]:
        near = _neighbour(inputs, number)
        there = results(near, rule, shape, "chunk", torch.float64)
        plain = results(near, rule, shape, "chunk")
        return {what: error(plain[what], x) for what, x in there.items()}

    verdicts = check_near(got, exact, errors_at, sizes)
    return [str(verdict) for verdict in verdicts if not verdict.ok]


def _unsigned(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose sums are those of the terms without their signs."""
    parts = inputs["initial_state"]
    found = inputs | {name: inputs[name].abs() for name in "qkv"}
    return found | {"initial_state": parts and tuple(part.abs() for part in parts)}


def _neighbour(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    """Inputs further away than a rounding and too near to change how large errors are; 0 is the same."""
    source = torch.Generator().manual_seed(number)

    step = 2.0**-10 if number else 0.0

    def moved(x: Tensor) -> Tensor:
        return x * (1 + step * torch.randn(x.shape, generator=source))

    found = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            found[name] = moved(x)
        elif x is not None:
            found[name] = tuple(moved(part) for part in x)
    return found


def split(seed: int) -> list[float]:
    """Largest differences of the delta rule in pieces of a sequence from the whole, over its size."""
    rule, shape = fv.Delta(), Shape(2200, "token", steep=False, value_heads=1, **_SIZES)
    inputs = draw(shape, rule, torch.Generator().manual_seed(seed), torch.float32)
    with in_pieces(9):
        got = results(inputs, rule, shape, "triton")
    whole = results(inputs, rule, shape, "chunk", torch.float64)
    return [float((got[n] - x).abs().max() / x.abs().max()) for n, x in whole.items()]


def in_half(decay: str, norm: float, seed: int) -> float:
    """Error of o of the delta rule in float16 over its size, with keys of a norm."""
    shape = Shape(130, decay, steep=False, gated=False, head_dim=16, value_dim=16)
    rule, source = fv.Delta(), torch.Generator().manual_seed(seed)
    inputs = draw(shape, rule, source, torch.float32, initial=False)
    tokens = {name: inputs[name].half() for name in "qkv"}
    # Few of them, so that the recurrence itself stays small.
    long = (torch.arange(shape.length) % 16 == 0)[None, :, None, None]
    tokens["k"] = torch.where(long, norm * tokens["k"], tokens["k"]).half()
    wide = {name: x.double() for name, x in tokens.items()}
    log_decay = inputs["log_decay"]
    got = fv.scan(**tokens, rule=rule, log_decay=log_decay, implementation="triton")
    decays = log_decay if log_decay is None else log_decay.double()
    exact = fv.scan(**wide, rule=rule, log_decay=decays, implementation="chunk")
    return float((got.double() - exact).norm() / exact.norm())


def joined(count: int, heads: int, dims: tuple[int, int], first: bool, seed: int) -> float:
    """Largest difference of the states before the pieces of a sequence, and behind it, from a loop."""
    source = torch.Generator().manual_seed(seed)
    dk, dv = dims
    maps = torch.randn(count, heads, dk, dv + dk, generator=source) / dk**0.5
    initial = torch.randn(1, heads, dk, dv, generator=source) if first else None

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    job: Any = SimpleNamespace(dims=dims, heads=heads, lengths=(1,), q=maps, scratch=scratch)
    found, last = launch_join(job, maps, None, initial)
    state = torch.zeros(heads, dk, dv).double() if initial is None else initial[0].double()
    worst = 0.0
    for got, step in zip((*found, last[0]), (*maps.double(), None), strict=True):
        worst = max(worst, float((got - state).abs().max() / state.abs().max().clamp(min=1e-9)))
        if step is not None:
            state = step[..., dv:] @ state + step[..., :dv]
    return worst


def step(seed: int) -> list[float]:
    """Largest differences of one decode step from the definition, for several rules and decays."""
    worst = []
    for rule in (fv.Delta(), fv.Additive(), fv.MLSTM()):
        for decay in ("none", "fixed", "token", "channel"):
            if isinstance(rule, fv.MLSTM) and decay == "channel":
                continue
            shape = Shape(1, decay, batch=2, **_SIZES)
            inputs = draw(shape, rule, torch.Generator().manual_seed(seed), torch.float32)
            tokens = {n: x for n, x in inputs.items() if n != "initial_state"}
            state = inputs["initial_state"]
            pairs = [
                fv.scan_step(**tokens, rule=rule, state=state, implementation=name)
                for name in ("triton", "reference")
            ]
            (o, after), (exact, expected) = pairs
            after, expected = (x if isinstance(x, tuple) else (x,) for x in (after, expected))
            for got, x in zip((o, *after), (exact, *expected), strict=True):
                worst.append(float((got - x).abs().max()))
    return worst
