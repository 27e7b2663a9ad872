"""Times sparse attention by selection on a CUDA device beside our own dense causal forward.

python scripts/gpu_sparse.py [--cases nsa,prefill,decode] [--samples 7] [--seconds 40] [--out FILE]

One line per case; with --out one JSON line per case, with the samples, shapes, device and versions.  q, k
and v are normal random numbers: neighbouring tokens share none of their lists, which is the slowest
case of native sparse attention and no evidence for a selector.  A case that fails is printed with its error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal import selectors as fs
from foveal.caches import KVShape, Paged
from foveal.compose import (
    SparseBranches,
    attend_segments,
    attend_selected,
    decode_selected,
    native_sparse,
)
from foveal.systems.sparse.prefill import minference

HEAD_DIM = 128
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Lengths and heads of a problem, bfloat16."""

    length: int
    heads: int
    kv_heads: int
    batch: int = 1

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.Generator("cuda").manual_seed(1)
        q, k, v = (
            torch.randn(
                self.batch,
                self.length,
                h,
                HEAD_DIM,
                generator=source,
                device="cuda",
                dtype=torch.bfloat16,
            )
            for h in (self.heads, self.kv_heads, self.kv_heads)
        )
        return q, k, v


NATIVE = (Shape(16384, 64, 4), Shape(65536, 32, 8), Shape(65536, 16, 8))
PREFILL = (Shape(65536, 32, 8), Shape(131072, 32, 8))
DECODE = (Shape(65536, 32, 8, 16),)
PAGE = 64
# Steps in one replay of a CUDA graph.
STEPS = 10


def samples(call: Call, most: int) -> list[float]:
    """Milliseconds of device time; the device waits while the host enqueues."""
    call()
    torch.cuda.synchronize()
    found = []
    for _ in range(most):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop))
    return found


def native_cases(shape: Shape) -> Iterator[tuple[str, Call]]:
    q, k, v = shape.draw()
    gates = torch.rand(1, shape.length, shape.heads, 3, device="cuda", dtype=torch.bfloat16)
    leaf_q, leaf_k, leaf_v = leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for name, branches in (
        ("windows of 32, every 16", SparseBranches()),
        ("windows of 64, every 64", SparseBranches(64, 64, 64, 16)),
        ("windows of 64, every 64, no sliding window", SparseBranches(64, 64, 64, 16, window=0)),
    ):

        def forward(branches: SparseBranches = branches) -> object:
            with torch.no_grad():
                return native_sparse(q, k, v, gates, branches=branches)

        def both(branches: SparseBranches = branches) -> object:
            o = native_sparse(leaf_q, leaf_k, leaf_v, gates, branches=branches)
            return torch.autograd.grad(o, leaves, o.detach())

        yield f"native sparse, {name}, forward", forward
        yield f"native sparse, {name}, forward and backward", both
    yield "dense causal, forward", lambda: fv.attend(q, k, v, fv.Causal())
    yield "dense causal, forward and backward", lambda: _dense_both(leaves)


def _dense_both(leaves: list[Tensor]) -> object:
    q, k, v = leaves
    o = fv.attend(q, k, v, fv.Causal())
    return torch.autograd.grad(o, leaves, o.detach())


def prefill_cases(shape: Shape) -> Iterator[tuple[str, Call]]:
    q, k, v = shape.draw()
    tenth = fs.Forced(fs.TopRatio(0.1))
    for name, selector in (
        ("pooled", fs.Pooled(softmax=False)),
        ("antidiagonal", fs.Antidiagonal(16)),
        ("last queries", fs.LastQueries()),
    ):

        def choose(selector: fs.Selector = selector) -> object:
            return fs.select(q, k, selector, tenth)

        def whole(selector: fs.Selector = selector) -> object:
            return attend_selected(q, k, v, selector, tenth)

        yield f"{name}, 10 % of the blocks, choice alone", choose
        yield f"{name}, 10 % of the blocks, choice and attention", whole
    yield "pbs_attention, 10 % of the mass", lambda: attend_segments(q, k, v, mass=0.1)
    yield (
        "minference, 1000 columns, 2000 diagonals",
        lambda: minference(q, k, v, vertical=1000, slash=2000),
    )
    yield "dense causal, forward", lambda: fv.attend(q, k, v, fv.Causal())


def decode_cases(shape: Shape) -> Iterator[tuple[str, Call]]:
    """Steps of one token for each sequence; a case is STEPS of them in one replay of a graph."""
    sizes = KVShape(shape.batch, shape.kv_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    pages = shape.length // PAGE
    cache = Paged(sizes, pages=shape.batch * pages, page_size=PAGE)
    for _ in range(0, shape.length, 4096):
        k, v = (
            torch.randn(
                shape.batch, 4096, shape.kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16
            )
            for _ in range(2)
        )
        cache.append(k, v)
    q = torch.randn(shape.batch, 1, shape.heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    order = torch.rand(shape.batch, shape.kv_heads, 1, pages, device="cuda").argsort(-1)
    chosen = order[..., : pages // 10].sort(-1).values.to(torch.int32)
    tenth = fv.BlockSelection(chosen, 1, PAGE)
    yield (
        "decode, 10 % of the pages of each key head",
        _graph(lambda: decode_selected(q, cache, tenth)),
    )
    yield "decode, all", _graph(lambda: fv.decode(q, cache))


def _graph(step: Call) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            step()
    return graph.replay


FAMILIES: dict[str, tuple[tuple[Shape, ...], Callable[[Shape], Iterator[tuple[str, Call]]]]] = {
    "nsa": (NATIVE, native_cases),
    "prefill": (PREFILL, prefill_cases),
    "decode": (DECODE, decode_cases),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="nsa,prefill,decode", help="families, by comma")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=40.0, help="no case starts after them")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    args = parser.parse_args()
    began = time.monotonic()
    for family in args.cases.split(","):
        shapes, cases = FAMILIES[family]
        for shape in shapes:
            for name, call in cases(shape):
                if time.monotonic() - began > args.seconds:
                    print("out of time", flush=True)
                    return 0
                _run(family, shape, name, call, args)
            torch.cuda.empty_cache()
    return 0


def _run(family: str, shape: Shape, name: str, call: Call, args: argparse.Namespace) -> None:
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = samples(call, args.samples)
        if family == "decode":
            times = [x / STEPS for x in times]
    except (RuntimeError, ValueError) as error:
        print(f"{shape} {name}: {type(error).__name__} {error}"[:300], flush=True)
        return
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{shape} {name}: {statistics.median(times):.3f} ms, {peak >> 20} MiB", flush=True)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(_line(family, shape, name, times, peak)) + "\n")


def _line(family: str, shape: Shape, name: str, times: list[float], peak: int) -> dict[str, Any]:
    return {
        "family": family,
        "case": name,
        "batch": shape.batch,
        "length": shape.length,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": HEAD_DIM,
        "dtype": "bfloat16",
        "ms": statistics.median(times),
        "samples": times,
        "peak_bytes": peak,
        "command": "python scripts/gpu_sparse.py",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": _triton_version(),
    }


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
