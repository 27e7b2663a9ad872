"""Compilers, checkpoints, autocast, graphs and torch.func around the GPU implementations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import foveal as fv
from foveal import _operators
from foveal.testing import Sizes, qkv
from foveal.testing.agreement import Agreement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # PyTorch's compilers warn about themselves.
    pytest.mark.filterwarnings("default"),
]

LINE = Sizes((300,), batch=2, q_heads=4, kv_heads=2, head_dim=64)
GRID = Sizes((14, 15), batch=2, q_heads=2, head_dim=64)
CUTS = torch.tensor([0, 7, 7, 130, 300], dtype=torch.int32)
IMPLEMENTATIONS = [
    pytest.param(
        "hopper",
        marks=pytest.mark.skipif(
            torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
            reason="needs a GPU of compute capability 9.0",
        ),
    ),
    "triton",
]
CASES = ["causal", "sink", "grid", "dilated", "documents", "lists"]


class Problem:
    """A case on the GPU, and the call that takes its tensors."""

    def __init__(self, name: str, implementation: str, source: torch.Generator) -> None:
        sizes = GRID if name in ("grid", "dilated") else LINE
        self.implementation = implementation
        self.pattern: fv.Pattern = fv.Causal()
        self.score: fv.Score = fv.Softmax()
        self.cu_seqlens = CUTS if name == "documents" else None
        if name == "sink":
            self.score = fv.Softmax(sink=torch.randn(4, generator=source).cuda())
        if name == "grid":
            self.pattern = fv.Neighborhood((5, 4))
        if name == "dilated":
            self.pattern = fv.Neighborhood((3, 3), dilation=2)
        if name == "lists":
            # On the device: a graph under capture makes its lists from them.
            kept = (torch.rand(2, 2, 3, 3, generator=source) < 0.6).cuda()
            self.pattern = fv.Blocks(fv.BlockSelection.from_block_mask(kept, 128, 128))
            self.pattern = self.pattern & fv.Causal()
        if name == "documents":
            sizes = Sizes((300,), q_heads=4, kv_heads=2, head_dim=64)
        self.tensors = qkv(sizes, source, torch.bfloat16, device="cuda")
        self.agreement = Agreement(*self.tensors, self.pattern, self.score, self.cu_seqlens)

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fv.attend(
            q,
            k,
            v,
            self.pattern,
            self.score,
            cu_seqlens=self.cu_seqlens,
            return_lse=True,
            implementation=self.implementation,
        )

    def weights(self, o: Tensor, lse: Tensor) -> list[Tensor]:
        """The cotangents that `Agreement` uses."""
        source = torch.Generator().manual_seed(0)
        made = (torch.randn(x.shape, generator=source, dtype=torch.float64) for x in (o, lse))
        return [w.to(x) for w, x in zip(made, (o, lse), strict=True)]

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in self.tensors]

    def check(self, o: Tensor, lse: Tensor, gradients: tuple[Tensor, ...]) -> None:
        """Results within the bound around the definition in float64."""
        found = {"o": o.detach(), "lse": lse.detach()}
        found |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        exact = self.agreement.results(self.implementation)
        verdicts = self.agreement.verdicts({**exact, **found})
        assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))

    def check_call(self, call: Callable[..., tuple[Tensor, Tensor]]) -> None:
        leaves = self.leaves()
        o, lse = call(*leaves)
        self.check(o, lse, torch.autograd.grad((o, lse), leaves, self.weights(o, lse)))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_one_graph_with_forward_and_backward(
    name: str, implementation: str, source: torch.Generator
) -> None:
    problem = Problem(name, implementation, source)
    problem.check_call(torch.compile(problem.call, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["causal", "grid"])
def test_inductor(name: str, implementation: str, source: torch.Generator) -> None:
    problem = Problem(name, implementation, source)
    compiled = torch.compile(lambda q, k, v: problem.call(q * 1.0, k, v), fullgraph=True)
    problem.check_call(compiled)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["sink", "documents", "lists"])
def test_operator_keeps_its_contract(
    name: str, implementation: str, source: torch.Generator
) -> None:
    problem = Problem(name, implementation, source)
    value = (problem.pattern, problem.score, True, implementation)
    call = _operators._spelled(value, problem.cu_seqlens)
    # Sums in another order differ by what bfloat16 rounds away.
    torch.library.opcheck(
        torch.ops.foveal.attend.default, (*problem.leaves(), *call), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_graphs_replay(name: str, implementation: str, source: torch.Generator) -> None:
    problem = Problem(name, implementation, source)
    leaves = problem.leaves()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            o, lse = problem.call(*leaves)
            seeds = problem.weights(o, lse)
            torch.autograd.grad((o, lse), leaves, seeds)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = problem.call(*leaves)
        gradients = torch.autograd.grad((o, lse), leaves, seeds)
    with torch.no_grad():
        for leaf in leaves:
            leaf.zero_()
    graph.replay()
    assert float(o.detach().abs().max()) == 0.0
    with torch.no_grad():
        for leaf, x in zip(leaves, problem.tensors, strict=True):
            leaf.copy_(x)
    graph.replay()
    problem.check(o, lse, gradients)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["causal", "dilated", "lists"])
def test_checkpoints(
    name: str, implementation: str, reentrant: bool, source: torch.Generator
) -> None:
    problem = Problem(name, implementation, source)
    leaves = problem.leaves()
    o, lse = checkpoint(problem.call, *leaves, use_reentrant=reentrant)
    torch.autograd.backward((o, lse), problem.weights(o, lse))
    dq, dk, dv = (x.grad for x in leaves)
    assert dq is not None
    assert dk is not None
    assert dv is not None
    problem.check(o, lse, (dq, dk, dv))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str, source: torch.Generator) -> None:
    problem = Problem("grid", implementation, source)
    wide = [x.float().requires_grad_() for x in problem.tensors]
    with torch.autocast("cuda", torch.bfloat16):
        o, lse = problem.call(*wide)
    assert o.dtype == torch.bfloat16
    gradients = torch.autograd.grad((o, lse), wide, problem.weights(o, lse))
    assert {x.dtype for x in gradients} == {torch.float32}
    problem.check(o, lse, tuple(x.bfloat16() for x in gradients))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["causal", "sink", "grid", "dilated", "lists"])
def test_maps_and_functional_gradients(
    name: str, implementation: str, source: torch.Generator
) -> None:
    problem = Problem(name, implementation, source)
    own = problem.tensors
    other = [torch.randn(x.shape, generator=source).to(x) for x in own]
    many = [torch.stack(pair) for pair in zip(other, own, strict=True)]
    seeds = problem.weights(*problem.call(*own))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = problem.call(q, k, v)
        return (o * seeds[0]).sum().float() + (lse * seeds[1]).nan_to_num(0, 0, 0).sum()

    mapped = torch.func.vmap(problem.call)(*many)
    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*many)
    problem.check(mapped[0][1], mapped[1][1], tuple(g[1] for g in gradients))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_mode_is_refused_in_a_sentence(
    implementation: str, source: torch.Generator
) -> None:
    problem = Problem("causal", implementation, source)
    tangents = tuple(torch.randn_like(x) for x in problem.tensors)
    with pytest.raises(fv.errors.RefusedError, match="forward-mode"):
        torch.func.jvp(problem.call, problem.tensors, tangents)
