"""What compilers, checkpoints, autocast and torch.func make of a call: what the plain call computes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import foveal as fv
from foveal import _operators
from foveal.testing import Sizes, poisoned_allocations, qkv
from tests.problems import PATTERNS, SCORES, Grids, fits

LINE = Sizes((40,), batch=2, q_heads=4, kv_heads=2, head_dim=8, value_dim=5)
GRID = Sizes((6, 7), batch=2, q_heads=2, head_dim=8)
PACKED = Sizes((40,), q_heads=2, head_dim=8)
CUTS = torch.tensor([0, 7, 7, 30, 40], dtype=torch.int32)


def lists(source: torch.Generator) -> fv.Pattern:
    mask = torch.rand(1, 2, 5, 5, generator=source) < 0.6
    return fv.Blocks(fv.BlockSelection.from_block_mask(mask, 8, 8))


@dataclasses.dataclass(frozen=True)
class Case:
    sizes: Sizes
    pattern: Callable[[torch.Generator], fv.Pattern]
    score: str = "softmax"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def always(pattern: fv.Pattern) -> Callable[[torch.Generator], fv.Pattern]:
    return lambda source: pattern


CASES = {
    "dense": Case(LINE, always(fv.Dense())),
    "window, cap": Case(LINE, always(fv.Sliding(5, 2)), "soft_cap"),
    "grid, everything": Case(GRID, always(fv.Neighborhood((3, 3))), "everything"),
    "dilated": Case(GRID, always(fv.Neighborhood((3, 3), dilation=2, border="clip"))),
    "union": Case(LINE, always(fv.Sliding(3) | fv.Strided(5)), "key_bias"),
    "documents": Case(PACKED, always(fv.Causal()), "sink", {"cu_seqlens": CUTS}),
    "block lists": Case(LINE, lambda source: lists(source) & fv.Causal()),
    "reference": Case(GRID, always(fv.Axial(0)), "relative", {"implementation": "reference"}),
}
Results = list[Tensor]


class Problem:
    """The tensors of a case and the call that takes them."""

    def __init__(self, case: Case, source: torch.Generator) -> None:
        self.pattern = case.pattern(source)
        self.score = SCORES[case.score](case.sizes, self.pattern, source)
        self.options = case.options
        self.tensors = [x.requires_grad_() for x in qkv(case.sizes, source)]
        members = getattr(self.score, "members", (self.score,))
        found = [getattr(m, "parameter", getattr(m, "sink", None)) for m in members]
        self.parameters = [x.requires_grad_() for x in found if x is not None]

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fv.attend(q, k, v, self.pattern, self.score, return_lse=True, **self.options)

    def results(self, call: Callable[..., tuple[Tensor, Tensor]]) -> Results:
        o, lse = call(*self.tensors)
        loss = o.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()
        return [o, lse, *torch.autograd.grad(loss, [*self.tensors, *self.parameters])]


def check(got: Results, want: Results) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", CASES)
def test_one_graph_with_forward_and_backward(name: str, source: torch.Generator) -> None:
    problem = Problem(CASES[name], source)
    compiled = torch.compile(problem.call, fullgraph=True, backend="aot_eager")
    check(problem.results(compiled), problem.results(problem.call))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["grid, everything", "block lists"])
def test_inductor(name: str, source: torch.Generator) -> None:
    problem = Problem(CASES[name], source)
    compiled = torch.compile(problem.call, fullgraph=True)
    check(problem.results(compiled), problem.results(problem.call))


def test_values_travel_as_arguments_and_numbers_stay_sizes(source: torch.Generator) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x: Tensor, pattern: fv.Pattern, score: fv.Score) -> Tensor:
        return fv.attend(x, x, x, pattern, score)

    before = graphs()
    for window in (3, 4, 9, 5):
        for length in (20, 30, 31):
            x = torch.randn(1, length, 2, 8, generator=source)
            score = fv.Softmax(soft_cap=window / 4)
            want = fv.attend(x, x, x, fv.Sliding(window), score, implementation="cpu")
            torch.testing.assert_close(call(x, fv.Sliding(window), score), want)
    assert graphs() - before <= 6
    torch.testing.assert_close(
        call(x, fv.Causal(), fv.Softmax()), fv.attend(x, x, x, fv.Causal(), fv.Softmax())
    )


def test_patterns_made_inside_the_compiled_function(source: torch.Generator) -> None:
    def call(x: Tensor, slopes: Tensor) -> Tensor:
        return fv.attend(x, x, x, fv.Causal() & fv.Sliding(7), fv.Alibi(slopes.exp()))

    x, slopes = torch.randn(1, 20, 2, 8, generator=source), torch.randn(2, generator=source)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, slopes), call(x, slopes))


@pytest.mark.parametrize("name", ["grid, everything", "documents", "block lists"])
def test_operator_keeps_its_contract(name: str, source: torch.Generator) -> None:
    problem = Problem(CASES[name], source)
    implementation = problem.options.get("implementation")
    value = (problem.pattern, problem.score, True, implementation)
    call = _operators._spelled(value, problem.options.get("cu_seqlens"))
    torch.library.opcheck(torch.ops.foveal.attend.default, (*problem.tensors, *call))


@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=str)
def test_patterns_and_scores_are_rebuilt_from_what_they_were_taken_apart_into(
    pattern: fv.Pattern, grids: Grids, source: torch.Generator
) -> None:
    sizes = Sizes(*grids, q_heads=2)
    for name, maker in SCORES.items():
        if not fits(name, grids):
            continue
        score = maker(sizes, pattern, source)
        again, same_score = _operators._built(_operators._spelled((pattern, score), None))
        assert again == pattern
        assert same_score.key == score.key


def test_classes_of_one_name_are_told() -> None:
    @dataclasses.dataclass(frozen=True)
    class Dense(fv.Pattern):
        """Shares its name with the library's own."""

    _operators._kind.cache_clear()
    with pytest.raises(fv.errors.PatternError, match="one class of this name"):
        _operators._kind("Dense")
    del Dense
    _operators._kind.cache_clear()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["grid, everything", "dilated", "dense"])
def test_checkpoints(name: str, reentrant: bool, source: torch.Generator) -> None:
    problem = Problem(CASES[name], source)
    want = problem.results(problem.call)
    leaves = [*problem.tensors, *problem.parameters]
    o, lse = checkpoint(problem.call, *problem.tensors, use_reentrant=reentrant)
    (o.square().sum() + lse.sin().sum()).backward()
    check([o, lse, *(x.grad for x in leaves if x.grad is not None)], want)


@pytest.mark.parametrize("pattern", [fv.Dense(), fv.Neighborhood(5)], ids=str)
def test_autocast_casts_as_for_pytorch_itself(pattern: fv.Pattern, source: torch.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(GRID, source))
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    want = fv.attend(*half, pattern)
    with torch.autocast("cpu", torch.bfloat16):
        o = fv.attend(q, k.bfloat16(), v, pattern)
        plain = torch.nn.functional.scaled_dot_product_attention(q, k.bfloat16(), v)
    assert o.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(o, want)
    got = torch.autograd.grad(o.float().sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(want.float().sum(), half), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())
    exact = [x.double() for x in half]
    with torch.autocast("cpu", torch.bfloat16):
        assert fv.attend(*exact, pattern).dtype == torch.float64


@pytest.mark.parametrize("name", ["dense", "grid, everything", "dilated"])
def test_functional_gradients_and_maps(name: str, source: torch.Generator) -> None:
    problem = Problem(CASES[name], source)
    many = [torch.randn(3, *x.shape, generator=source) for x in problem.tensors]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = problem.call(q, k, v)
        return o.square().sum() + lse.sin().sum()

    o = torch.func.vmap(lambda *x: problem.call(*x)[0])(*many)
    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*many)
    for entry in range(3):
        own = [x[entry].clone().requires_grad_() for x in many]
        want = [problem.call(*own)[0], *torch.autograd.grad(loss(*own), own)]
        check([o[entry], *(g[entry] for g in gradients)], want)


def test_second_derivatives_are_refused_in_a_sentence(source: torch.Generator) -> None:
    x = torch.randn(1, 9, 1, 4, generator=source)

    def loss(x: Tensor) -> Tensor:
        return fv.attend(x, x, x, fv.Sliding(2)).square().sum()

    with pytest.raises(fv.errors.RefusedError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)


@pytest.mark.parametrize(
    "score",
    [fv.Softmax(soft_cap=3.0), fv.Entmax(1.5), fv.LocalLinear(1.0)],
    ids=["softmax", "entmax", "local linear"],
)
def test_a_second_derivative_of_some_inputs_is_refused_too(
    score: fv.Score, source: torch.Generator
) -> None:
    """torch.autograd.grad walks to the tensors it is asked for; a mark beside that way would be missed."""
    x = torch.randn(1, 9, 1, 4, generator=source, requires_grad=True)
    for loss in (Tensor.sum, lambda o: o.square().sum()):
        o = fv.attend(x, x, x, fv.Causal(), score)
        (gradient,) = torch.autograd.grad(loss(o), x, create_graph=True)
        with pytest.raises(fv.errors.RefusedError, match="second derivative"):
            torch.autograd.grad(gradient.square().sum(), x, allow_unused=True)


# PyTorch scripts its own formulas when forward mode is first used.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@FORWARD_MODE
def test_the_reference_is_differentiated_in_every_way(source: torch.Generator) -> None:
    def call(x: Tensor) -> Tensor:
        score = fv.Softmax(soft_cap=2.0) + fv.Alibi(slopes)
        return fv.attend(x, k, v, fv.Sliding(3), score, implementation="reference")

    x, k, v, tangent = (
        torch.randn(1, 7, 2, 3, dtype=torch.float64, generator=source) for _ in range(4)
    )
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    o, forward = torch.func.jvp(call, (x,), (tangent,))
    step = 1e-6
    apart = (call(x + step * tangent) - call(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(o, call(x))
    torch.testing.assert_close(forward, apart, rtol=1e-6, atol=1e-8)
    hessian = torch.func.hessian(lambda x: call(x).sin().sum())(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf).sin().sum(), leaf, create_graph=True)
    (product,) = torch.autograd.grad((gradient * tangent).sum(), leaf)
    torch.testing.assert_close(torch.tensordot(hessian, tangent, 4), product)


@FORWARD_MODE
@pytest.mark.parametrize("implementation", ["cpu", "sdpa"])
def test_forward_mode_is_refused_in_a_sentence(
    implementation: str, source: torch.Generator
) -> None:
    x = torch.randn(1, 9, 1, 4, generator=source)
    with pytest.raises(fv.errors.RefusedError, match=r"forward-mode derivative; 'reference' has"):
        torch.func.jvp(lambda x: fv.attend(x, x, x, implementation=implementation), (x,), (x,))


def test_nothing_unwritten_reaches_the_operator(source: torch.Generator) -> None:
    problem = Problem(CASES["grid, everything"], source)
    want = problem.results(problem.call)
    compiled = torch.compile(problem.call, fullgraph=True, backend="aot_eager")
    with poisoned_allocations():
        check(problem.results(compiled), want)
