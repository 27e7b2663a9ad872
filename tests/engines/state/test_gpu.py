"""The delta rule on a Hopper: chunks by bulk copies, and what these leave to another kernel."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.testing import poisoned_allocations
from foveal.testing.bounds import INPUTS, check, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
BF16, F16 = torch.bfloat16, torch.float16
PACKED = (0, 1, 1, 64, 130, 321)
# Decay, dtype, (B, L, H, Hv, Dk, Dv), other fields of a problem of `gpu_state`.
CASES: list[tuple[str, torch.dtype, tuple[int, ...], dict[str, Any]]] = [
    ("channel", BF16, (1, 321, 2, 4, 128, 128), {"packed": PACKED}),
    ("channel", BF16, (1, 321, 1, 2, 64, 64), {"packed": PACKED, "steep": True, "piece": 1}),
    ("channel", BF16, (2, 131, 2, 2, 128, 64), {"initial": False}),
    ("channel", BF16, (1, 259, 1, 2, 64, 128), {"piece": 1, "gated": False}),
    ("channel", BF16, (1, 200, 2, 2, 128, 128), {"steep": True}),
    ("channel", F16, (1, 131, 1, 2, 128, 128), {}),
    ("token", BF16, (1, 321, 2, 4, 128, 128), {"packed": PACKED}),
    ("token", BF16, (2, 131, 2, 2, 64, 128), {"steep": True, "gated": False}),
    ("token", F16, (1, 259, 1, 2, 128, 64), {"piece": 1}),
    ("token", F16, (1, 321, 1, 2, 64, 64), {"packed": PACKED, "steep": True, "piece": 1}),
]


@pytest.fixture(scope="module")
def cases() -> Any:
    """`gpu_state`, whose references stay on the CPU: they take memory that other tests may fill."""
    path = Path(__file__).resolve().parents[3] / "scripts" / "gpu_state.py"
    spec = importlib.util.spec_from_file_location("gpu_state_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.DEVICE = "cpu"
    return module


@pytest.fixture(autouse=True)
def as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.engines.state import task

    monkeypatch.setattr(
        task, "piece_of", task.piece_of
    )  # set back after a test that cuts otherwise


def there(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cuda() for name, x in inputs.items()}


def seed(source: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=source))


@pytest.mark.parametrize(("decay", "dtype", "sizes", "more"), CASES)
def test_results_and_gradients(
    decay: str, dtype: torch.dtype, sizes: Any, more: Any, cases: Any, source: torch.Generator
) -> None:
    """Calls with and without gradients; of the latter the second repeats launches with other tensors."""
    problem = cases.Problem(fv.Delta(), decay, dtype, sizes, **more)
    cases.in_pieces(problem)
    with poisoned_allocations():
        problem.silent(there(problem.draw(seed(source))))
        inputs = problem.draw(seed(source))
        got = problem.run(there(inputs), "triton") | problem.silent(there(inputs))
    found = cases.verdicts(problem, inputs, {name: x.cpu() for name, x in got.items()})
    assert not [str(verdict) for verdict in found if not verdict.ok]


@pytest.mark.parametrize("decay", ["channel", "token", "none"])
def test_repeated_calls_are_equal(decay: str, cases: Any, source: torch.Generator) -> None:
    problem = cases.Problem(fv.Delta(), decay, BF16, (1, 700, 2, 2, 128, 128), piece=3)
    cases.in_pieces(problem)
    calls = [there(problem.draw(seed(source))) for _ in range(2)]
    with poisoned_allocations():
        rounds = [[problem.silent(inputs) for inputs in calls] for _ in range(3)]
    for again in rounds[1:]:
        for first, found in zip(rounds[0], again, strict=True):
            assert all(torch.equal(first[name], found[name]) for name in first)
    assert not torch.equal(*(found[f"{cases.SILENT}o"] for found in rounds[0]))


def hard(problem: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Head 0 with a chunk whose inverse float16 cannot hold and one that is steep.

    Writes of -0.5 grow without cancelling: 1.5^30 times half of the first is more than 65504, and
    1.5^12 may not be less for all that the kernel knows, though results in float16 have room for it.
    """
    grown = slice(70, 100 if problem.dtype == BF16 else 82)
    inputs["k"][:, grown, 0] = inputs["k"][:, 70:71, 0]
    inputs["write_gate"][:, grown, 0] = -0.5
    inputs["log_decay"][:, grown, 0] = 0
    inputs["log_decay"][:, 215:225, 0] -= 60
    return inputs


def of_heads(results: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """o and the state of each head by themselves: results of head 0 are far larger."""
    o, state = (x.detach().cpu() for x in results)
    found = {f"o {h}": o[:, :, h] for h in range(o.shape[2])}
    return found | {f"state {h}": state[:, h] for h in range(o.shape[2])}


def run(
    inputs: dict[str, Tensor], implementation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    calls = {name: x.to(dtype) if name in ("q", "k", "v") else x for name, x in inputs.items()}
    if dtype == torch.float64:
        calls = {name: x.double() for name, x in calls.items()}
    o, state = fv.scan(**calls, rule=fv.Delta(), return_state=True, implementation=implementation)
    assert isinstance(state, Tensor)
    return o, state


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("decay", "dtype", "dim"),
    [("channel", BF16, 128), ("channel", BF16, 64), ("token", BF16, 128), ("token", F16, 64)],
)
def test_what_is_left(
    decay: str,
    dtype: torch.dtype,
    dim: int,
    gradients: bool,
    cases: Any,
    source: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from foveal._recent import Recent
    from foveal.engines.state import bulk_channels
    from foveal.engines.state import triton as edition

    name = f"launch_{decay}s_bulk"
    real, flags = getattr(bulk_channels, name), []

    def kept(*arguments: Any) -> Tensor:
        flags.append(real(*arguments))
        return flags[-1]

    monkeypatch.setattr(bulk_channels, name, kept)
    monkeypatch.setattr(edition, "_REPLAYS", Recent(64))  # a repetition would not come by
    problem = cases.Problem(fv.Delta(), decay, dtype, (1, 323, 2, 2, dim, dim), initial=False)
    inputs = hard(problem, problem.draw(seed(source)))
    on = {n: x.requires_grad_(gradients) for n, x in there(inputs).items()}
    with poisoned_allocations():
        got = of_heads(run(on, "triton", dtype))
    left = torch.zeros(6, 2)
    left[1, 0] = 1
    left[3, 0] = decay == "channel"
    assert [x.view(6, 2).tolist() for x in flags if not x.is_meta] == [left.tolist()]
    agrees(cases, problem, inputs, got)


def agrees(cases: Any, problem: Any, inputs: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """By the rule of `foveal.testing.bounds`."""
    exact = of_heads(run(inputs, "chunk", torch.float64))
    errors = dict.fromkeys(exact, 0.0)
    found = []
    for number in range(INPUTS):
        near = inputs if number == 0 else cases._neighbour(inputs, number)
        true = exact if number == 0 else of_heads(run(near, "chunk", torch.float64))
        o, (state,) = problem._plain(near, None, None)
        plain = of_heads((o, state))
        errors = {n: max(errors[n], error(plain[n], true[n])) for n in exact}
        found = [check(n, got[n], errors[n], exact[n]) for n in exact]
        if all(verdict.ok for verdict in found):
            return
    assert not [str(verdict) for verdict in found if not verdict.ok]
