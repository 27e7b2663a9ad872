"""The reference itself: against an einsum written here, and finite differences."""

from dataclasses import dataclass

import pytest
import torch

import foveal as fv
from foveal.testing import Sizes, definition, qkv
from tests.problems import PATTERNS, SCORES, Grids


@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=str)
def test_equals_a_masked_softmax(
    pattern: fv.Pattern, grids: Grids, source: torch.Generator
) -> None:
    sizes = Sizes(*grids, batch=2, q_heads=4, kv_heads=2, value_dim=3)
    q, k, v = (x.requires_grad_() for x in qkv(sizes, source, torch.float64))
    got = fv.attend(q, k, v, pattern, return_lse=True, implementation="reference")
    flat = (x.flatten(1, -3) for x in (q, k, v))
    want = definition(*flat, pattern.dense_mask(*grids))
    want = [x.reshape(y.shape) for x, y in zip(want, got, strict=True)]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    weights = [torch.randn(x.shape, generator=source, dtype=x.dtype) for x in got]
    for x, y in zip(
        torch.autograd.grad(got, (q, k, v), weights),
        torch.autograd.grad(want, (q, k, v), weights),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("score", SCORES)
def test_finite_differences(implementation: str, score: str, source: torch.Generator) -> None:
    sizes = Sizes((3,), (4,), q_heads=2, kv_heads=1, head_dim=2, value_dim=1)
    made = SCORES[score](sizes, fv.Sliding(2, 1), source)
    members = made.members if hasattr(made, "members") else (made,)
    tensors = [*qkv(sizes, source, torch.float64)]
    for member in members:
        tensor = member.sink if isinstance(member, fv.Softmax) else member.parameter
        if tensor is not None:
            tensors.append(tensor.double())
    leaves = [x.requires_grad_() for x in tensors]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> object:
        left = iter(rest)
        total = None
        for member in members:
            if isinstance(member, fv.Softmax):
                sink = None if member.sink is None else next(left)
                one = fv.Softmax(member.scale, member.soft_cap, sink)
            else:
                one = type(member)(next(left))
            total = one if total is None else total + one
        return fv.attend(
            q, k, v, fv.Sliding(2, 1), total, return_lse=True, implementation=implementation
        )

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("grid", [(5,), (2, 3)])
def test_finite_differences_of_neighborhoods(
    grid: tuple[int, ...], source: torch.Generator
) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(Sizes(grid, head_dim=2), source, torch.float64))
    for border in ("shift", "clip", "wrap"):
        for implementation in ("reference", "cpu"):
            assert torch.autograd.gradcheck(
                lambda *x, b=border, i=implementation: fv.attend(
                    *x, fv.Neighborhood(2, border=b), return_lse=True, implementation=i
                ),
                (q, k, v),
            )


def test_can_be_differentiated_twice(source: torch.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(Sizes((3,), head_dim=2), source, torch.float64))
    assert torch.autograd.gradgradcheck(
        lambda *x: fv.attend(*x, fv.Causal(), implementation="reference"), (q, k, v)
    )


class SameParity(fv.Pattern):
    def allows(self, q_pos, k_pos, extent):
        return (q_pos - k_pos) % 2 == 0


@dataclass(frozen=True)
class Same(fv.Pattern):
    remainder: int

    def allows(self, q_pos, k_pos, extent):
        return q_pos % self.remainder == k_pos % self.remainder


@pytest.mark.parametrize("pattern", [SameParity(), Same(2)], ids=["class", "dataclass"])
def test_a_pattern_written_by_a_user(pattern: fv.Pattern, source: torch.Generator) -> None:
    """`allows` is all that a pattern must write."""
    q, k, v = qkv(Sizes((9,), q_heads=2), source, torch.float64)
    want = fv.attend(q, k, v, fv.Strided(2, causal=False), implementation="reference")
    for implementation in (None, "cpu", "reference"):
        torch.testing.assert_close(fv.attend(q, k, v, pattern, implementation=implementation), want)
