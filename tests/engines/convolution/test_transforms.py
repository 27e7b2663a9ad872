"""torch.func reads convolutions on a CPU: gradients, maps and both; second derivatives are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import foveal as fv

Call = Callable[..., Tensor]
CASES: dict[str, tuple[Call, tuple[tuple[int, ...], ...]]] = {
    "local_mix": (lambda w, v: fv.local_mix(w, v, 3), ((2, 4, 5, 2, 9), (2, 4, 5, 2, 3))),
    "local_mix, shift": (
        lambda w, v: fv.local_mix(w, v, 3, border="shift"),
        ((2, 8, 2, 3), (2, 8, 2, 4)),
    ),
    "convolve": (fv.convolve, ((2, 12, 4), (4, 5))),
    "convolve, cpu": (
        lambda x, w, b: fv.convolve(x, w, bias=b, implementation="cpu"),
        ((2, 6, 7, 4), (4, 5, 3), (4,)),
    ),
    "convolve, cpu, dilated": (
        lambda x, w: fv.convolve(x, w, dilation=2, channels_first=True, implementation="cpu"),
        ((2, 4, 9, 18), (4, 3, 8)),
    ),
    "convolve, torch": (
        lambda x, w: fv.convolve(x, w, implementation="torch"),
        ((2, 6, 7, 4), (2, 4, 3, 3)),
    ),
    "fftconv": (fv.fftconv, ((2, 12, 4), (4, 12))),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_maps_are_those_of_each_call(name: str, source: torch.Generator) -> None:
    call, shapes = CASES[name]
    many = [torch.randn(3, *s, dtype=torch.float64, generator=source) for s in shapes]
    places = tuple(range(len(many)))

    def loss(*inputs: Tensor) -> Tensor:
        return call(*inputs).sin().sum()

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(loss(*leaves), leaves)

    each = [tuple(x[entry] for x in many) for entry in range(3)]
    want = [gradients(*inputs) for inputs in each]
    together = tuple(torch.stack(found) for found in zip(*want, strict=True))
    mapped = torch.func.vmap(call)
    torch.testing.assert_close(mapped(*many), torch.stack([call(*inputs) for inputs in each]))
    torch.testing.assert_close(torch.func.grad(loss, places)(*each[0]), want[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss, places))(*many), together)
    of_map = torch.func.grad(lambda *x: mapped(*x).sin().sum(), places)
    torch.testing.assert_close(of_map(*many), together)
    one_for_all = torch.func.vmap(loss, in_dims=(0, *(None,) * (len(many) - 1)))
    found = torch.func.grad(lambda x: one_for_all(x, *each[0][1:]).sum())(many[0])
    alone = [gradients(x, *each[0][1:])[0] for x in many[0]]
    torch.testing.assert_close(found, torch.stack(alone))


@pytest.mark.parametrize("name", ["local_mix", "local_mix, shift", "convolve, cpu"])
def test_a_second_derivative_of_some_inputs_is_refused(name: str, source: torch.Generator) -> None:
    call, shapes = CASES[name]
    leaves = [
        torch.randn(s, dtype=torch.float64, generator=source, requires_grad=True) for s in shapes
    ]
    loss = call(*leaves).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    for x in leaves[:2]:
        with pytest.raises(fv.errors.RefusedError, match="second derivative; 'reference' has"):
            torch.autograd.grad(gradient.square().sum(), x, allow_unused=True, retain_graph=True)


def test_the_reference_has_a_second_derivative(source: torch.Generator) -> None:
    w = torch.randn(1, 5, 2, 3, dtype=torch.float64, generator=source)
    v = torch.randn(1, 5, 2, 2, dtype=torch.float64, generator=source)

    def mix(w: Tensor, v: Tensor) -> Tensor:
        return fv.local_mix(w, v, 3, implementation="reference")

    assert torch.autograd.gradgradcheck(mix, (w.requires_grad_(), v.requires_grad_()))
