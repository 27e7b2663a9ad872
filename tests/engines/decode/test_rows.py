"""The kernel of rows.cu, lane by lane on the CPU, against the definition."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.caches import KVShape, Paged, Pruned, Quantised
from foveal.caches.view import View
from foveal.compose.merge import merge
from foveal.engines.decode import reference
from foveal.engines.decode.problem import Terms
from foveal.testing.bounds import check_near, error, neighbour
from tests.engines.decode.problems import named

rows = pytest.importorskip("foveal.engines.decode.rows", reason="the launch imports triton")
parts = pytest.importorskip("foveal.engines.decode.parts", reason="the launch imports triton")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
HERE = Path(__file__).parent
Make = Callable[[torch.Generator], tuple[View, Terms, Tensor]]


def _case(
    cache: Paged | Pruned, source: torch.Generator, terms: Terms, Lq: int = 1, groups: int = 4
) -> tuple[View, Terms, Tensor]:
    shape, lengths = cache.shape, (140, 0, 33)[: cache.shape.batch]
    k, v = (
        torch.randn(shape.batch, 140, shape.kv_heads, n, generator=source).to(shape.dtype)
        for n in (shape.head_dim, shape.values)
    )
    cache.append(k, v, counts=lengths)
    heads = groups * shape.kv_heads
    q = torch.randn(shape.batch, Lq, heads, shape.head_dim, generator=source).to(shape.dtype)
    return cache.parts()[0].view, terms, q


def _shape(head_dim: int = 64, value_dim: int = 64, batch: int = 3, heads: int = 1) -> KVShape:
    return KVShape(batch, heads, head_dim, value_dim)


CASES: dict[str, Make] = {
    "int4": lambda s: _case(Quantised(_shape(128, 128), pages=50, bits="int4"), s, Terms(0.1)),
    "int4, window, sink": lambda s: _case(
        Quantised(_shape(128, 256), pages=50, bits="int4"),
        s,
        Terms(0.1, left=60, sink_tokens=4, sink=torch.randn(4, generator=s)),
    ),
    "channels": lambda s: _case(
        Pruned(_shape(64, 96), pages=20, group=64, storage="channels"), s, Terms(0.1)
    ),
    "channels, 5 queries, slopes": lambda s: _case(
        Pruned(_shape(), pages=20, group=64, storage="channels"),
        s,
        Terms(0.1, causal=False, slopes=torch.rand(4, generator=s)),
        5,
    ),
    "channels, 16 query heads, soft cap": lambda s: _case(
        Pruned(_shape(128, 64), pages=20, group=64, storage="channels"),
        s,
        Terms(0.1, soft_cap=3.0),
        groups=16,
    ),
}


def build(folder: Path, macros: dict[str, int]) -> ctypes.CDLL:
    """The kernel and the lanes that run it, as a library."""
    source = Path(rows.__file__).parent
    library = folder / "lanes.so"
    options = [f"-D{name}={value}" for name, value in macros.items()]
    command = ["g++", "-O1", "-w", "-std=c++17", "-shared", "-fPIC", f"-I{source}", *options]
    subprocess.run([*command, str(HERE / "lanes.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run(
    folder: Path, view: View, terms: Terms, q: Tensor, programs: int
) -> tuple[Tensor, Tensor, Any]:
    macros = rows.macros_of(view, terms, q)
    assert rows.shared_memory(macros) <= 1 << 18
    o = torch.zeros(*q.shape[:3], view.value_dim, dtype=q.dtype)
    nothing = torch.tensor(-torch.inf) if terms.sink is None else terms.sink
    lse = nothing.expand(
        q.shape[:3]
    ).contiguous()  # sequences without a token are left to the merge
    left = parts.Parts.of(programs, macros["ROWS"], 32 * macros["WARPS"], view.value_dim, q.device)
    problem = rows.problem_of(view, terms, q, o, lse, left, terms.slopes, terms.sink)
    build(folder, macros).run(ctypes.byref(problem), programs)
    return o, lse, left


def assert_right(view: View, terms: Terms, q: Tensor, found: tuple[Tensor, Tensor]) -> None:
    source = torch.Generator().manual_seed(0)

    def errors_at(number: int) -> dict[str, float]:
        near = neighbour(q, source) if number else q
        wide, plain = (reference.decode(view, terms, x) for x in (near.double(), near))
        return named(map(error, plain, wide))

    exact = reference.decode(view, terms, q.double())
    verdicts = check_near(named(found), named(exact), errors_at)
    assert all(verdict.ok for verdict in verdicts), ", ".join(map(str, verdicts))


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("int4", "channels") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_agrees_with_the_definition(name: str, tmp_path: Path, source: torch.Generator) -> None:
    view, terms, q = CASES[name](source)
    o, lse, _ = run(tmp_path, view, terms, q, 1)
    assert_right(view, terms, q, (o, lse))


def test_parts_of_programs_are_the_whole(tmp_path: Path, source: torch.Generator) -> None:
    view, terms, q = _case(
        Quantised(_shape(128, 128, 1), pages=20, bits="int4"), source, Terms(0.1)
    )
    _, _, left = run(tmp_path, view, terms, q, 3)
    chosen = [1, 2, 4]  # the first program begins the segment, the others go on with it
    total = left.totals[chosen, :4]
    o = left.sums[chosen, :4] / total[..., None]
    lse = (left.largest[chosen, :4] + total.log2()) * torch.tensor(2.0).log()
    merged = merge([x[None, None] for x in o], [x[None, None] for x in lse])
    assert_right(view, terms, q, (merged[0].to(q.dtype), merged[1]))


def test_a_bad_sequence_reaches_no_other(tmp_path: Path, source: torch.Generator) -> None:
    cache = Quantised(_shape(128, 128), pages=50, bits="int4")
    view, terms, q = _case(cache, source, Terms(0.1))
    bad = torch.full((3, 1, 1, 128), torch.nan, dtype=cache.shape.dtype)
    fresh = torch.ones(3, 20, 1, 128, dtype=cache.shape.dtype)
    cache.rewrite(torch.tensor([7]).expand(3, 1, -1), *(bad,) * 2)
    cache.free([0])
    cache.append(*(fresh,) * 2, counts=(20, 0, 0))
    o, _, _ = run(tmp_path, view, terms, q, 1)
    assert bool(o[:2].isfinite().all())
    assert bool(o[2].isnan().all())
