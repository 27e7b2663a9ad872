"""Checks and times the decode engine on a CUDA device; one line per case.

python scripts/gpu_decode.py check [--seconds 90]           every kind of cache against float64
python scripts/gpu_decode.py time [--seconds 45] [--out F] [--only WORD]   ours and cuDNN; JSON lines
python scripts/gpu_decode.py first [--out F]                first call of a process, empty kernel cache

A case that fails is printed with its error and the run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal import caches
from foveal.caches import Cache, KVShape, Paged
from foveal.engines.decode.pairs import read_rows
from foveal.testing.bounds import INPUTS, check, error

DEVICE, BF16, WIDE = "cuda", torch.bfloat16, torch.float64
HEADS, KV_HEADS, DIM = 32, 8, 128
Run = Callable[[], object]


def mixed_lengths() -> list[int]:
    """64 lengths, half of them below 256 and the longest near 65,536: 469,198 keys."""
    source = random.Random(0)
    return [int(2 ** source.uniform(0, 16)) for _ in range(64)]


def shape(batch: int) -> KVShape:
    return KVShape(batch, KV_HEADS, DIM, dtype=BF16, device=DEVICE)


def filled(cache: Cache, lengths: list[int], shuffled: bool = False) -> Cache:
    """Random rows; pages in the order of growth or, shuffled, in none, as after long use."""
    if shuffled and isinstance(cache, Paged):
        random.Random(0).shuffle(cache._pool._free)
    done, most = 0, max(lengths)
    while done < most:
        step = min(4096, most - done)
        k, v = (
            torch.randn(len(lengths), step, KV_HEADS, DIM, device=DEVICE, dtype=BF16)
            for _ in range(2)
        )
        cache.append(k, v, counts=[min(max(n - done, 0), step) for n in lengths])
        done += step
    return cache


def pages_of(lengths: list[int], page_size: int) -> int:
    return sum(-(-n // page_size) for n in lengths)


def paged(lengths: list[int], page_size: int = 16, shuffled: bool = False) -> Cache:
    own = Paged(shape(len(lengths)), pages=pages_of(lengths, page_size), page_size=page_size)
    return filled(own, lengths, shuffled)


def quantised(lengths: list[int], bits: Any) -> Cache:
    pages = pages_of(lengths, 16)
    return filled(caches.Quantised(shape(len(lengths)), pages=pages, bits=bits), lengths)


def pruned(lengths: list[int], storage: Any = None) -> Cache:
    pages = pages_of(lengths, caches.Pruned.PAGE)
    own = caches.Pruned(shape(len(lengths)), pages=pages, sparsity=0.7, storage=storage)
    return filled(own, lengths)


def shared_prefix() -> Cache:
    """32 sequences with 256 tokens of their own behind 32,768 that all of them share."""
    prefix = Paged(shape(1), pages=2048)
    suffix = Paged(shape(32), pages=32 * 16)
    return caches.Shared(filled(prefix, [32768]), filled(suffix, [256] * 32))


CASES: dict[str, Callable[[], Cache]] = {
    "B16 L8192, pages of 16": lambda: paged([8192] * 16),
    "B1 L131072, pages of 16": lambda: paged([131072]),
    "B16 L65536, pages of 16": lambda: paged([65536] * 16),
    "64 mixed lengths, pages of 16": lambda: paged(mixed_lengths()),
    "B16 L65536, 70 % pruned": lambda: pruned([65536] * 16),
    "B16 L65536, fp8": lambda: quantised([65536] * 16, "fp8"),
    "prefix of 32,768 shared by 32": shared_prefix,
    "prefix of 32,768 in each of 32": lambda: paged([32768 + 256] * 32),
    "B16 L65536, int4": lambda: quantised([65536] * 16, "int4"),
    "B16 L65536, int8": lambda: quantised([65536] * 16, "int8"),
    "B16 L8192, shuffled pages of 16": lambda: paged([8192] * 16, shuffled=True),
    "64 mixed lengths, shuffled pages": lambda: paged(mixed_lengths(), shuffled=True),
    "B16 L65536, shuffled pages of 16": lambda: paged([65536] * 16, shuffled=True),
    "B16 L8192, contiguous": lambda: filled(
        caches.Contiguous(shape(16), max_tokens=8192), [8192] * 16
    ),
    "B16 L65536, 70 % pruned, bitmap": lambda: pruned([65536] * 16, "bitmap"),
}


def queries(batch: int, Lq: int = 1) -> Tensor:
    return torch.randn(batch, Lq, HEADS, DIM, device=DEVICE, dtype=BF16)


def replayed(run: Run, calls: int, samples: int = 9) -> list[float]:
    """Milliseconds of one call in each replay of a CUDA graph of `calls` of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    timed(graph.replay, 3)
    return [x / calls for x in timed(graph.replay, samples)]


def timed(run: Run, samples: int) -> list[float]:
    events = []
    for _ in range(samples):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def held(cache: Cache, b: int) -> list[Tensor]:
    """Keys and values [1, L, heads, D] of sequence b as they are stored, in float64."""
    found = []
    for part in cache.parts():
        own = 0 if part.shared else b
        n = part.view.host_lengths[own][0]
        found.append([x.transpose(0, 1)[None] for x in read_rows(part.view, own, 0, n, WIDE)[:2]])
    return [torch.cat(x, 1) for x in zip(*found, strict=True)]


def worst(q: Tensor, cache: Cache, o: Tensor) -> tuple[float, float]:
    """Error of the last sequence of o against float64, and what a plain computation may have."""
    b = len(cache.host_lengths) - 1
    wide = q[b : b + 1].double(), *held(cache, b)
    k, v = (x.to(BF16) for x in wide[1:])
    exact = fv.attend(*wide, fv.Causal(), implementation="reference")
    plain = fv.attend(q[b : b + 1], k, v, fv.Causal(), implementation="reference")
    allowed = 2 * error(plain, exact) + torch.finfo(BF16).eps * float(exact.abs().max())
    return error(o[b : b + 1], exact), allowed


def cudnn(batch: int, length: int) -> Run:
    """PyTorch's attention by cuDNN on contiguous keys."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    k, v = (torch.randn(batch, KV_HEADS, length, DIM, device=DEVICE, dtype=BF16) for _ in range(2))
    q = queries(batch).transpose(1, 2)

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def time_case(name: str, write: Callable[[dict[str, object]], None]) -> None:
    """A case in graph replays and call by call, a peer beside it, then its error."""
    cache = CASES[name]()
    lengths = [row[0] for row in cache.host_lengths]
    q = queries(len(lengths))

    def run() -> Tensor:
        return fv.decode(q, cache, implementation="triton")

    o = run()
    moved = fv.explain_decode(q, cache).bytes
    # Of one call alone a replay takes some 8 us more, ours or a peer's.
    calls = max(5, min(20, int(4e9 / moved)))
    line: dict[str, Any] = {
        "case": name,
        "lengths": lengths if len(set(lengths)) > 1 else [lengths[0], len(lengths)],
        "heads": [HEADS, KV_HEADS, DIM],
        "bytes_read": moved,
        "storage_bytes": cache.bytes(),
        "calls_per_graph": calls,
        "samples_ms": replayed(run, calls),
        "eager_ms": timed(run, 20),
    }
    middle, eager = (statistics.median(line[key]) for key in ("samples_ms", "eager_ms"))
    text = f"{name:34} {middle:.4f} ms {moved / middle / 1e6:5.0f} GB/s"
    text += f", call by call {eager:.4f}"
    length, batch = line["lengths"][:2]
    if name in (f"B{batch} L{length}, pages of 16", f"B{batch} L{length}, contiguous"):
        peer = cudnn(batch, length)
        line["cudnn_samples_ms"] = replayed(peer, calls)
        text += f", cuDNN {statistics.median(line['cudnn_samples_ms']):.4f}"
    # Products in float64 last: they draw so much power that what follows runs slower for a while.
    line["error"], line["allowed"] = worst(q, cache, o)
    time.sleep(0.5)
    write(line)
    print(f"{text}, error {line['error']:.1e} of {line['allowed']:.1e}", flush=True)


def bandwidth(write: Callable[[dict[str, object]], None]) -> None:
    """What this device reads, and copies, of 4 GiB."""
    source = torch.ones(1 << 30, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    for name, run, moved in (
        ("copy of 4 GiB, bytes read and written", lambda: target.copy_(source), 2),
        ("sum of 4 GiB, bytes read", source.sum, 1),
    ):
        samples = replayed(run, 1)
        found = moved * source.nbytes / statistics.median(samples) / 1e6
        write({"case": name, "bytes": moved * source.nbytes, "samples_ms": samples})
        print(f"{name:34} {statistics.median(samples):.4f} ms {found:5.0f} GB/s", flush=True)


def changing(write: Callable[[dict[str, object]], None]) -> None:
    """One graph of an append and a decode, replayed while sequences grow, end and begin."""
    lengths = [8192 - 509 * i for i in range(16)]
    cache = Paged(shape(16), pages=10000)
    filled(cache, lengths)
    k, v = (torch.randn(16, 1, KV_HEADS, DIM, device=DEVICE, dtype=BF16) for _ in range(2))
    q = queries(16)
    fv.decode(q, cache, implementation="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(k, v)
        o = fv.decode(q, cache, implementation="triton")
    samples, errors = [], []
    for step in range(48):
        for x in (k, v, q):
            x.normal_()
        if step % 16 == 8:
            cache.free([step // 4])
        cache.prepare()
        samples += timed(graph.replay, 1)
        if step % 12 == 11:
            errors.append(worst(q, cache, o))
    name = "graph of a changing batch"
    found, allowed = (max(x) for x in zip(*errors, strict=True))
    ended = [n for (n,) in cache.host_lengths]
    line = {"case": name, "lengths": lengths, "ended": ended, "samples_ms": samples}
    write(line | {"error": found, "allowed": allowed})
    text = f"{name:34} {statistics.median(samples):.4f} ms with its append"
    print(f"{text}, error {found:.1e} of {allowed:.1e}", flush=True)


OTHERS = {"bandwidth": bandwidth, "graph of a changing batch": changing}


def checks() -> Iterator[tuple[str, Callable[[], tuple[Cache, Tensor, fv.Score, fv.Pattern]]]]:
    """Every kind of cache and score on ragged lengths."""
    lengths = [700, 33, 0, 512]

    def of(make: Callable[[KVShape], Cache], Lq: int = 1, score: fv.Score | None = None,
           pattern: fv.Pattern = fv.Causal()) -> Any:  # fmt: skip
        def build() -> tuple[Cache, Tensor, fv.Score, fv.Pattern]:
            return (
                filled(make(shape(4)), lengths, True),
                queries(4, Lq),
                score or fv.Softmax(),
                pattern,
            )

        return build

    for size in (1, 7, 16, 64, 256):
        yield f"pages of {size}", of(lambda s, n=size: Paged(s, pages=1300, page_size=n))
    yield "per head", of(lambda s: Paged(s, pages=800, per_head=True), 3)
    yield "several queries", of(lambda s: Paged(s, pages=100), 9, fv.Softmax(soft_cap=9.0))
    yield "window", of(lambda s: Paged(s, pages=100), 5, None, fv.Sliding(99, 0, 4))
    yield "contiguous", of(lambda s: caches.Contiguous(s, max_tokens=701))
    yield "virtual", of(lambda s: caches.VirtualContiguous(s, max_tokens=4000))
    for bits in ("fp8", "int8", "int4"):
        yield bits, of(lambda s, n=bits: caches.Quantised(s, pages=100, bits=n), 2)
    for storage in ("bitmap", "channels"):
        yield f"pruned {storage}", of(lambda s, n=storage: caches.Pruned(s, pages=40, storage=n))
    yield "pruned, 3 queries", of(lambda s: caches.Pruned(s, pages=40), 3, fv.Softmax(soft_cap=9.0))


def run_check(build: Callable[[], tuple[Cache, Tensor, fv.Score, fv.Pattern]]) -> list[str]:
    """What is worse than the precision allows, judged sequence by sequence."""
    cache, q, score, pattern = build()
    o, lse = fv.decode(q, cache, score, pattern=pattern, return_lse=True, implementation="triton")
    k, v = cache.dense()
    failed = []
    for b, row in enumerate(cache.host_lengths):
        rows = q[b : b + 1], k[b : b + 1, : row[0]], v[b : b + 1, : row[0]]
        exact = _attend(rows, score, pattern, torch.float64)
        errors = [0.0, 0.0]
        for number in range(INPUTS):
            near = rows[0] * (1 + 2.0**-9 * (number > 0) * torch.randn_like(rows[0]))
            wide = _attend((near, *rows[1:]), score, pattern, torch.float64)
            plain = _attend((near, *rows[1:]), score, pattern, BF16)
            errors = [max(e, error(x, y)) for e, x, y in zip(errors, plain, wide, strict=True)]
            found = [
                check(name, x[b : b + 1], e, y)
                for name, x, e, y in zip(("o", "lse"), (o, lse), errors, exact, strict=True)
            ]
            if all(verdict.ok for verdict in found):
                break
        failed += [f"{b}: {verdict}" for verdict in found if not verdict.ok]
    return failed


def _attend(
    rows: tuple[Tensor, ...], score: fv.Score, pattern: fv.Pattern, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(dtype) for x in rows)
    return fv.attend(q, k, v, pattern, score, return_lse=True, implementation="reference")


def first_call() -> None:
    """Prints the seconds of a first decode as JSON; run with an empty kernel cache."""
    cache = paged([500, 300])
    q = queries(2)
    import triton  # noqa: F401

    torch.cuda.synchronize()
    begun = time.perf_counter()
    fv.decode(q, cache, implementation="triton")
    torch.cuda.synchronize()
    print(json.dumps({"case": "first decode", "first_s": time.perf_counter() - begun}), flush=True)


def writer(path: Path | None) -> Callable[[dict[str, object]], None]:
    """Appends JSON lines, each with the machine and the command that made it."""
    import triton

    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python", "scripts/gpu_decode.py", *sys.argv[1:]]),
    }

    def write(line: dict[str, object]) -> None:
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | machine) + "\n")

    return write


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("check", "time", "first"))
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    end, failed = time.monotonic() + options.seconds, 0
    if options.what == "first":
        if options.inside:
            first_call()
            return 0
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, __file__, "first", "--inside"],
                env=os.environ | {"TRITON_CACHE_DIR": folder},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        print(lines[-1] if lines else done.stderr[-500:], flush=True)
        if lines:
            writer(options.out)(json.loads(lines[-1]))
        return 0 if lines else 1
    torch.manual_seed(0)
    named = ((name, name) for name in (*OTHERS, *CASES))
    work = checks() if options.what == "check" else named
    write = writer(options.out)
    for name, item in work:
        if options.only not in name:
            continue
        if time.monotonic() > end:
            print(f"{name}: the time was over", flush=True)
            continue
        try:
            if callable(item):
                found = run_check(item)
                failed += bool(found)
                print(f"{name:20} {'; '.join(found) or 'ok'}", flush=True)
            elif name in OTHERS:
                OTHERS[name](write)
            else:
                time_case(name, write)
        except Exception as failure:
            failed += 1
            print(f"{name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
