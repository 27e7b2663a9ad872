"""Verbs other than `attend` under compilers: sizes that stay open, gradients, programs that are exported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import foveal as fv
from foveal import _operators, _operators_verbs
from foveal.caches import Cache, Contiguous, Joined, KVShape, LowRank, Paged, Quantised, Shared

Sizes = dict[str, int]
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Case:
    """A call and the shapes of its tensors; axes by name are those that a compiler leaves open."""

    call: Callable[..., Any]
    shapes: tuple[Shape, ...]

    def drawn(self, source: torch.Generator, **sizes: int) -> list[Tensor]:
        shapes = [[sizes[n] if isinstance(n, str) else n for n in shape] for shape in self.shapes]
        made = (torch.randn(s, dtype=torch.float64, generator=source) for s in shapes)
        return [(x / 2).requires_grad_() for x in made]

    def open_axes(self) -> tuple[dict[int, torch.export.Dim], ...]:
        names = {n for shape in self.shapes for n in shape if isinstance(n, str)}
        dims = {n: torch.export.Dim(n, min=8 if n == "n" else 1) for n in names}
        return tuple(
            {axis: dims[n] for axis, n in enumerate(shape) if isinstance(n, str)}
            for shape in self.shapes
        )


def scanned(rule: fv.Rule, **options: Any) -> Callable[..., Any]:
    def call(q: Tensor, v: Tensor, decay: Tensor, *state: Tensor) -> Any:
        key = torch.nn.functional.normalize(q, dim=-1)
        gates = {} if rule == fv.Additive() else {"write_gate": decay.sigmoid()}
        gates |= {"initial_state": state[0]} if state else {}
        return fv.scan(q, key, v, rule, log_decay=-decay.abs(), **gates, **options)

    return call


QUERIES, VALUES, GATES = ("b", "n", 2, 3), ("b", "n", 4, 5), ("b", "n", 4)
CASES = {
    "scan": Case(scanned(fv.Additive()), (QUERIES, VALUES, GATES)),
    "scan, delta": Case(
        scanned(fv.Delta(), return_state=True, reverse=True),
        (QUERIES, VALUES, GATES, ("b", 4, 3, 5)),
    ),
    "scan, mlstm": Case(scanned(fv.MLSTM(), return_state=True), (QUERIES, VALUES, GATES)),
    "scan, two memories": Case(
        scanned(fv.TwoState(chunk=4), return_state=True), (QUERIES, VALUES, GATES)
    ),
    "convolve": Case(fv.convolve, (("b", "n", 4), (4, 5))),
    "convolve, own filters": Case(fv.convolve, (("b", "n", "n", 4), ("b", 2, 3, 3))),
    "convolve, planes": Case(
        lambda x, w, b: fv.convolve(x, w, bias=b, padding=(2, (1, 0)), channels_first=True),
        (("b", 4, "n", "n"), (4, 3, 5), (4,)),
    ),
    "convolve, several": Case(
        lambda x, *w: fv.convolve(x, list(w), causal=True), (("b", "n", 5), (2, 3), (3, 7))
    ),
    "convolve, strips": Case(
        lambda x, row, column: fv.convolve(x, fv.Strips(row, column)),
        (("b", "n", "n", 4), (4, 5), (4, 3)),
    ),
    "local_mix": Case(
        lambda w, v: fv.local_mix(w, v, 3), (("b", "n", 4, 2, 9), ("b", "n", 4, 2, 3))
    ),
    "local_mix, shift": Case(
        lambda w, v: fv.local_mix(w, v, 3, border="shift"),
        (("b", "n", 2, 3), ("b", "n", 2, 4)),
    ),
    "fftconv": Case(fv.fftconv, (("b", "n", 4), (4, 7))),
    "fftconv, gated": Case(
        lambda x, f, g, s: fv.fftconv(x, f, pre_gate=g, skip=s),
        (("b", "n", 4), (4, "n"), ("b", "n", 4), (4,)),
    ),
}


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [x for part in found for x in flat(part)]


def results(call: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    found = flat(call(*inputs))
    loss = sum(x.sin().sum() for x in found)
    return [*found, *torch.autograd.grad(loss, inputs)]


def check(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_sizes(name: str, source: torch.Generator) -> None:
    case = CASES[name]
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((6, 20), (11, 37)):
        inputs = case.drawn(source, b=batch, n=length)
        check(results(compiled, inputs), results(case.call, inputs))
    assert graphs() <= 2


class Module(torch.nn.Module):
    def __init__(self, call: Callable[..., Any], cache: Cache | None = None) -> None:
        super().__init__()
        self.call, self.cache = call, cache

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


@pytest.mark.parametrize("name", CASES)
def test_exported_with_open_sizes(name: str, source: torch.Generator) -> None:
    case = CASES[name]
    first = tuple(x.detach() for x in case.drawn(source, b=2, n=20))
    program = torch.export.export(Module(case.call), first, dynamic_shapes=(case.open_axes(),))
    verb = name.partition(",")[0]
    assert f"torch.ops.foveal.{verb}" in program.graph_module.code
    for batch, length in ((6, 20), (11, 37)):
        inputs = [x.detach() for x in case.drawn(source, b=batch, n=length)]
        check(flat(program.module()(*inputs)), flat(case.call(*inputs)))


@pytest.mark.parametrize("name", CASES)
def test_imitated_tensors_have_shapes_and_gradients(name: str, source: torch.Generator) -> None:
    case = CASES[name]
    inputs = case.drawn(source, b=2, n=20)
    want = [x.shape for x in results(case.call, inputs)]
    with FakeTensorMode():
        imitated = [torch.empty(x.shape, dtype=x.dtype, requires_grad=True) for x in inputs]
        assert [x.shape for x in results(case.call, imitated)] == want


def test_static_convolutions_stay_open_to_the_compiler(source: torch.Generator) -> None:
    x, w = (x.detach() for x in CASES["convolve"].drawn(source, b=2, n=20))
    program = torch.export.export(Module(fv.convolve), (x, w))
    assert "foveal" not in program.graph_module.code


def test_documents_stay_apart_in_a_graph(source: torch.Generator) -> None:
    q = torch.randn(1, 40, 2, 4, dtype=torch.float64, generator=source, requires_grad=True)
    cuts = torch.tensor([0, 7, 7, 30, 40], dtype=torch.int32)

    def call(q: Tensor) -> Any:
        return fv.scan(q, q, q, fv.Delta(), cu_seqlens=cuts, return_state=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    check(results(compiled, [q]), results(call, [q]))


@pytest.mark.parametrize("name", ["scan, delta", "convolve, strips", "local_mix", "fftconv, gated"])
def test_operators_keep_their_contract(name: str, source: torch.Generator) -> None:
    verb, case = name.partition(",")[0], CASES[name]
    seen: list[tuple[Any, ...]] = []
    tensors = case.drawn(source, b=2, n=9)
    body = _operators_verbs._body(verb)

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return body.run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_operators_verbs, "_body", lambda verb: body._replace(run=spy))
        torch.compile(case.call, backend="eager", dynamic=True)(*tensors)
    call = _operators._spelled(seen[0], None)
    leaves = [x.detach().requires_grad_() for x in call.tensors]
    torch.library.opcheck(getattr(torch.ops.foveal, verb).default, (leaves, *call[2:]))


SHAPE = KVShape(2, 2, 4, dtype=torch.float64)


def token(source: torch.Generator, length: int = 1) -> tuple[Tensor, Tensor]:
    k, v = (
        torch.randn(2, length, 2, 4, dtype=torch.float64, generator=source, device="cpu")
        for _ in range(2)
    )
    return k, v


def prefix(source: torch.Generator) -> Paged:
    cache = Paged(KVShape(1, 2, 4, dtype=torch.float64), pages=8)
    cache.append(*(x[:1] for x in token(source, 9)))
    return cache


def basis(source: torch.Generator) -> Tensor:
    square = torch.randn(2, 4, 4, dtype=torch.float64, generator=source)
    return torch.linalg.qr(square)[0][..., :3]


CACHES: dict[str, Callable[[torch.Generator], Cache]] = {
    "pages": lambda source: Paged(SHAPE, pages=24, page_size=4, per_head=True),
    "rows": lambda source: Contiguous(SHAPE, max_tokens=40),
    "int8": lambda source: Quantised(SHAPE, pages=24, bits="int8"),
    "low rank": lambda source: LowRank(
        SHAPE, basis(source), basis(source), pages=24, key_mean=basis(source)[..., 0]
    ),
    "joined": lambda source: Joined([Quantised(SHAPE, pages=8), Paged(SHAPE, pages=8)]),
    "shared": lambda source: Shared(prefix(source), Paged(SHAPE, pages=24)),
}


@pytest.mark.parametrize("name", CACHES)
def test_decode_is_compiled_once_for_a_growing_cache(name: str, source: torch.Generator) -> None:
    cache = CACHES[name](source)
    if isinstance(cache, Joined):
        cache.members[0].append(*token(source, 5))
    cache.append(*token(source, 6))
    sink = torch.randn(4, dtype=torch.float64, generator=source, requires_grad=True)

    def call(q: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return fv.decode(q, cache, fv.Softmax(sink=sink), return_lse=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        q = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=source, requires_grad=True)
        check(results(compiled, [q, sink]), results(call, [q, sink]))
        cache.append(*token(source))
    assert graphs() <= 2


@pytest.mark.parametrize("name", CACHES)
def test_an_exported_decode_reads_what_its_cache_holds(name: str, source: torch.Generator) -> None:
    cache = CACHES[name](source)
    if isinstance(cache, Joined):
        cache.members[0].append(*token(source, 5))
    cache.append(*token(source, 6))
    module = Module(lambda q: fv.decode(q, cache, pattern=fv.Sliding(5)), cache)
    q = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=source)
    program = torch.export.export(module, (q,)).module()
    for _ in range(2):
        check([program(q)], [module(q)])
        cache.append(*token(source))


def test_a_key_bias_is_checked_where_the_graph_runs(source: torch.Generator) -> None:
    cache = CACHES["rows"](source)
    cache.append(*token(source, 6))
    q = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=source)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q: Tensor, bias: Tensor) -> Tensor:
        return fv.decode(q, cache, fv.KeyBias(bias))

    bias = torch.randn(2, 4, 7, dtype=torch.float64, generator=source)
    check([call(q, bias)], [fv.decode(q, cache, fv.KeyBias(bias))])
    cache.append(*token(source, 2))
    with pytest.raises(fv.errors.ScoreError, match=r"KeyBias.*at least 8"):
        call(q, bias)


def test_programs_run_where_foveal_is_only_imported(
    tmp_path: Path, source: torch.Generator
) -> None:
    case = CASES["scan, mlstm"]
    first = tuple(x.detach() for x in case.drawn(source, b=2, n=20))
    program = torch.export.export(Module(case.call), first, dynamic_shapes=(case.open_axes(),))
    torch.export.save(program, tmp_path / "scan.pt2")
    inputs = [x.detach() for x in case.drawn(source, b=3, n=9)]
    torch.save((inputs, flat(case.call(*inputs))), tmp_path / "case.pt")
    code = (
        "import sys, torch, foveal\n"
        "program = torch.export.load(sys.argv[1] + '/scan.pt2').module()\n"
        "inputs, want = torch.load(sys.argv[1] + '/case.pt')\n"
        "o, state = program(*inputs)\n"
        "torch.testing.assert_close([o, *state], want)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
