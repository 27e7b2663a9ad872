"""Every operator of the catalogue agrees with its definition, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from foveal.systems import system, systems
from foveal.testing.bounds import check_near, error, neighbour
from tests.systems.cache_definitions import CACHE_DEFINITIONS
from tests.systems.convolution_definitions import CONVOLUTION_DEFINITIONS
from tests.systems.definitions import DEFINITIONS, Example
from tests.systems.local_linear_definitions import LOCAL_LINEAR_DEFINITIONS
from tests.systems.sparse_definitions import SPARSE_DEFINITIONS
from tests.systems.sparse_learned_definitions import SPARSE_LEARNED_DEFINITIONS
from tests.systems.sparse_more_definitions import SPARSE_MORE_DEFINITIONS
from tests.systems.state_definitions import STATE_DEFINITIONS

ALL = (
    DEFINITIONS
    | STATE_DEFINITIONS
    | CONVOLUTION_DEFINITIONS
    | LOCAL_LINEAR_DEFINITIONS
    | SPARSE_DEFINITIONS
    | SPARSE_LEARNED_DEFINITIONS
    | SPARSE_MORE_DEFINITIONS
    | CACHE_DEFINITIONS
)

EXAMPLES = [
    pytest.param(name, make, id=f"{name}-{number}")
    for name, makers in ALL.items()
    for number, make in enumerate(makers)
]


def test_every_system_has_a_definition_and_identities() -> None:
    assert [each.name for each in systems()] == list(ALL)
    assert all(each.identities for each in systems())


@pytest.mark.parametrize(("name", "make"), EXAMPLES)
def test_operator_is_its_definition(
    name: str, make: Callable[[torch.Generator], Example], source: torch.Generator
) -> None:
    example = make(source)
    inputs = [x.detach().requires_grad_() for x in example.inputs]
    got = system(name).op(*example.arguments(*inputs), **example.options)
    exact = example.expected(*inputs)
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    weight = torch.randn(exact.shape, generator=source, dtype=torch.float64)
    gradients = (torch.autograd.grad(o, inputs, weight) for o in (got, exact))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "make"), EXAMPLES)
def test_operator_is_as_good_as_float32_allows(
    name: str, make: Callable[[torch.Generator], Example], source: torch.Generator
) -> None:
    example = make(source)
    single = [x.float() for x in example.inputs]
    got = system(name).op(*example.arguments(*single), **example.options)
    exact = example.expected(*(x.double() for x in single))
    assert got.dtype == torch.float32

    def errors_at(number: int) -> dict[str, float]:
        near = [neighbour(x, source) for x in single] if number else single
        plain, there = example.expected(*near), example.expected(*(x.double() for x in near))
        return {name: error(plain, there)}

    (verdict,) = check_near({name: got}, {name: exact}, errors_at)
    assert verdict.ok, str(verdict)
