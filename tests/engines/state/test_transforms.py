"""Compilers and torch.func read a scan on a CPU, short or long: no branch of it depends on values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.engines.state.segments import LONG

RULES = [fv.Additive(), fv.Delta(), fv.MLSTM()]
Call = Callable[..., Tensor]


class _Module(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


def _problem(rule: fv.Rule, length: int, source: torch.Generator) -> tuple[Call, list[Tensor]]:
    gated = not isinstance(rule, fv.Additive)

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
        gates = {"write_gate": gate} if gated else {}
        return fv.scan(q, k, v, rule, log_decay=decay, **gates)

    q, k, v = (torch.randn(2, length, 2, 4, generator=source) for _ in range(3))
    decay, gate = (torch.rand(2, length, 2, generator=source) for _ in range(2))
    return call, [q, torch.nn.functional.normalize(k, dim=-1), v, -0.2 * decay, gate]


@pytest.mark.parametrize("length", [70, LONG + 5])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_reader_finds_the_same(rule: fv.Rule, length: int, source: torch.Generator) -> None:
    call, inputs = _problem(rule, length, source)
    expected = call(*inputs)
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)
    exported = torch.export.export(_Module(call), tuple(inputs)).module()
    mapped = torch.func.vmap(lambda *own: call(*(x[None] for x in own))[0])
    for name, run in (("compile", compiled), ("export", exported), ("vmap", mapped)):
        torch.testing.assert_close(run(*inputs), expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_gradients_of_a_mapped_scan_are_those_of_each(
    rule: fv.Rule, source: torch.Generator
) -> None:
    call, (q, k, v, decay, gate) = _problem(rule, 70, source)

    def loss(v: Tensor, *others: Tensor) -> Tensor:
        q, k, decay, gate = (x[None] for x in others)
        return call(q, k, v[None], decay, gate).square().sum()

    leaf = v.clone().requires_grad_()
    call(q, k, leaf, decay, gate).square().sum().backward()
    found = torch.func.vmap(torch.func.grad(loss))(v, q, k, decay, gate)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-4)
