"""Checks and times local linear attention on a CUDA device; one line per case.

python scripts/gpu_local_linear.py check [--part 0/4] [--match A,B] outputs and gradients against float64
python scripts/gpu_local_linear.py fuzz [--seconds 40] [--seed N] random shapes, in memory full of NaN
python scripts/gpu_local_linear.py accuracy [--out F]             error by ridge, against a direct solve
python scripts/gpu_local_linear.py time [--seconds 40] [--out F]  beside softmax, interleaved; JSON lines
python scripts/gpu_local_linear.py decode [--out F]               one query against a cache, in a graph

A case that fails is printed with its error and the run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal.probe.solve import solve_report
from foveal.testing import check as verdict
from foveal.testing import check_attend

DEVICE = "cuda"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Inputs = tuple[Tensor, Tensor, Tensor]
Writer = Callable[[dict[str, object]], None]


def draw(
    grid: tuple[int, ...],
    heads: int,
    dim: int,
    dtype: torch.dtype = BF16,
    kv_heads: int | None = None,
    batch: int = 1,
    value_dim: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator(DEVICE).manual_seed(seed)

    def normal(count: int, width: int) -> Tensor:
        x = torch.randn(batch, *grid, count, width, generator=source, device=DEVICE)
        return x.to(dtype)

    shared = kv_heads or heads
    return normal(heads, dim), normal(shared, dim), normal(shared, value_dim or dim)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every check by its name."""
    mask = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    lists = fv.Blocks(fv.BlockSelection.from_block_mask(mask.to(DEVICE), 64, 64))
    cut = torch.tensor([0, 70, 70, 201], dtype=torch.int32, device=DEVICE)
    patterns: tuple[tuple[str, fv.Pattern, tuple[int, ...], Tensor | None], ...] = (
        ("causal", fv.Causal(), (321,), None),
        ("dense", fv.Dense(), (150,), None),
        ("window", fv.Sliding(40), (321,), None),
        ("packed", fv.Causal(), (201,), cut),
        ("grid", fv.Neighborhood((5, 7)), (17, 19), None),
        ("dilated", fv.Neighborhood((3, 3), dilation=2), (14, 16), None),
        ("lists", lists & fv.Causal(), (256,), None),
        ("spans", fv.Sliding(30, sink_tokens=3), (201,), None),
    )
    for dtype, dim in ((BF16, 64), (BF16, 128), (F16, 80), (F32, 64), (BF16, 256)):
        for name, pattern, grid, packed in patterns:
            if name not in ("causal", "grid") and (dtype, dim) != (BF16, 128):
                continue
            for kind in ("solved", "detached", "given"):
                if kind == "detached" and name != "causal":
                    continue

                def run(
                    kind: str = kind,
                    dtype: torch.dtype = dtype,
                    dim: int = dim,
                    pattern: fv.Pattern = pattern,
                    grid: tuple[int, ...] = grid,
                    packed: Tensor | None = packed,
                ) -> object:
                    groups = 1 if pattern.depends_on_data else 2
                    q, k, v = draw(grid, 2, dim, dtype, 2 // groups)
                    score = _score(kind, q)
                    return check_attend(
                        q, k, v, pattern, score, cu_seqlens=packed, implementation="triton"
                    )

                yield f"{name} {str(dtype)[6:]} D{dim} {kind}", run


def _score(kind: str, q: Tensor) -> fv.Score:
    if kind == "given":
        return fv.Parallax(0.1 * torch.randn_like(q))
    ridge = torch.tensor([1.0, 10.0], device=DEVICE)
    return fv.LocalLinear(ridge, ridge_grad="detached" if kind == "detached" else "exact")


def decode_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps against a cache, without gradients, by their names."""
    for kind, dim, heads, kv_heads, queries, window in (
        ("solved", 128, 8, 8, 1, None),
        ("given", 128, 8, 8, 1, None),
        ("solved", 128, 8, 2, 3, 700),
        ("given", 64, 8, 2, 3, 700),
        ("solved", 64, 4, 2, 1, None),
    ):

        def run(
            kind: str = kind,
            dim: int = dim,
            heads: tuple[int, int] = (heads, kv_heads),
            queries: int = queries,
            window: int | None = window,
        ) -> object:
            q, _, _ = draw((queries,), heads[0], dim, batch=2)
            _, k, v = draw((1531,), heads[1], dim, batch=2)
            pattern = fv.Causal() if window is None else fv.Sliding(window)
            ridge = torch.tensor([1.0, 10.0] * (heads[0] // 2), device=DEVICE)
            score = _score(kind, q) if kind == "given" else fv.LocalLinear(ridge)

            def result(wide: torch.dtype, implementation: str) -> Tensor:
                own = q.to(wide), k.to(wide), v.to(wide)
                mine = fv.Parallax(score.r.to(wide)) if isinstance(score, fv.Parallax) else score
                return fv.attend(*own, pattern, mine, implementation=implementation)

            o, same = result(BF16, "triton"), result(BF16, "reference")
            return [verdict("o", o, same, result(torch.float64, "reference"))]

        yield f"decode D{dim} {heads}/{kv_heads} x{queries} {kind}", run


def check(part: str, match: str) -> None:
    number, count = (int(x) for x in part.split("/"))
    every = [*cases(), *decode_cases()]
    every = [each for word in match.split(",") for each in every if word in each[0]]
    for index, (name, run) in enumerate(every):
        if index % count != number:
            continue
        start = time.perf_counter()
        try:
            found = run()
            assert isinstance(found, list)
            worst = {v.name: v.error / max(v.allowed, 1e-30) for v in found}
            shown = " ".join(f"{result} {x:.2f}" for result, x in worst.items())
            line = f"{'ok' if all(v.ok for v in found) else 'FAILED'} {name}: {shown}"
        except Exception as failure:
            line = f"FAILED {name} {type(failure).__name__}: {str(failure)[:900]}"
        print(f"{line} ({time.perf_counter() - start:.0f} s)", flush=True)


def fuzz(seconds: float, seed: int) -> None:
    """Random problems against float64, gradients too; memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    end, draws = time.monotonic() + seconds, random.Random(seed)
    agree = others = 0
    while time.monotonic() < end:
        dim, groups, length = draws.choice((64, 128)), draws.choice((1, 2)), draws.randint(256, 900)
        pattern, grid = draws.choice(
            (
                (fv.Causal(), (length,)),
                (fv.Sliding(draws.randint(1, 400)), (length,)),
                (fv.Neighborhood((5, 7)), (17, length // 17)),
            )
        )
        q, k, v = draw(
            grid,
            2 * groups,
            dim,
            BF16,
            2,
            value_dim=draws.choice((dim, dim // 2)),
            seed=draws.getrandbits(31),
        )
        own = [10 ** draws.uniform(-1.5, 1.5) for _ in range(2 * groups)]
        case = f"{pattern} q {list(q.shape)} v {list(v.shape)} ridge {own}"
        score = fv.LocalLinear(torch.tensor(own, device=DEVICE))
        try:
            check_attend(q, k, v, pattern, score, implementation="triton")
            agree += 1
        except AssertionError as error:
            others += 1
            wrong = [line.strip() for line in str(error).splitlines() if " > " in line]
            print(f"FAILED seed {seed}, {case}: {'; '.join(wrong)}", flush=True)
        except RuntimeError:
            print(f"FAILED seed {seed}, {case}", flush=True)
            raise
        if (agree + others) % 5 == 0:
            print(f"seed {seed}: {agree} agree, {others} do not so far", flush=True)
    print(f"seed {seed}: {agree} agree, {others} do not", flush=True)


def direct(q: Tensor, k: Tensor, v: Tensor, ridge: float) -> Tensor:
    """Float64 o [L, D] of one causal head [L, D], every system solved directly."""
    q, k, v = (x.double() for x in (q, k, v))
    length, dim = q.shape
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    p = (q @ k.T * dim**-0.5).masked_fill(future, -torch.inf).softmax(-1)
    mean = p @ k
    second = (p @ (k[:, :, None] * k[:, None]).flatten(1)).view(length, dim, dim)
    system = second - mean[:, :, None] * mean[:, None]
    system = system + ridge * torch.eye(dim, device=q.device, dtype=torch.float64)
    r = torch.linalg.solve(system, mean - q)
    return (p * (1 + (r * mean).sum(-1, keepdim=True) - r @ k.T)) @ v


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def accuracy(write: Writer) -> None:
    """Relative errors of o by ridge: all rows, those with at most D keys, and the rounding of o alone."""
    for dim in (64, 128):
        q, k, v = draw((1536,), 2, dim)
        for ridge in (100.0, 10.0, 1.0, 0.1, 0.01, 0.001):
            exact = torch.stack(
                [direct(q[0, :, h], k[0, :, h], v[0, :, h], ridge) for h in range(2)], 1
            )
            score = fv.LocalLinear(ridge)
            o = fv.attend(q, k, v, fv.Causal(), score, implementation="triton")[0]
            report = solve_report(q, k, v, fv.Causal(), score, implementation="triton")
            numbers: dict[str, object] = {
                "case": f"accuracy D{dim} ridge {ridge}",
                "error": relative(o, exact),
                "error_first_rows": relative(o[: dim + 1], exact[: dim + 1]),
                "error_other_rows": relative(o[dim + 1 :], exact[dim + 1 :]),
                "rounding": relative(exact.bfloat16(), exact),
                "mean_iterations": report.mean_iterations,
                "most_iterations": report.most_iterations,
                "unfinished_rows": report.unfinished,
            }
            _print(numbers)
            write(numbers)


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Device times of calls by turns, each with a cold cache."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            flush.zero_()
            torch.cuda._sleep(2_000_000)  # the host runs ahead, so that its time does not count
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(stop))
    return samples


def timings(seconds: float, write: Writer) -> None:
    """Forward and backward of solved, given r and softmax, causal, B1 H16."""
    end = time.monotonic() + seconds
    for dim, length in (
        (128, 4096),
        (64, 4096),
        (128, 16384),
        (64, 16384),
        (128, 32768),
        (64, 32768),
    ):
        if time.monotonic() > end:
            print(f"left out from D{dim} L{length} on: no time left", flush=True)
            return
        q, k, v = (x.requires_grad_() for x in draw((length,), 16, dim))
        ridge = torch.full((16,), 10.0, device=DEVICE, requires_grad=True)
        r = (0.1 * torch.randn_like(q)).detach().requires_grad_()
        scores = {
            "softmax": (fv.Softmax(), (q, k, v)),
            "local linear": (fv.LocalLinear(ridge), (q, k, v, ridge)),
            "parallax": (fv.Parallax(r), (q, k, v, r)),
        }
        report = solve_report(q, k, v, fv.Causal(), fv.LocalLinear(10.0), implementation="triton")
        calls: dict[str, Callable[[], object]] = {}
        for name, (score, leaves) in scores.items():

            def forward(score: fv.Score = score, inputs: Inputs = (q, k, v)) -> Tensor:
                with torch.no_grad():
                    return fv.attend(*inputs, fv.Causal(), score, implementation=_named(score))

            o = fv.attend(q, k, v, fv.Causal(), score, implementation=_named(score))
            do = torch.randn_like(o)

            def backward(
                o: Tensor = o, do: Tensor = do, leaves: tuple[Tensor, ...] = leaves
            ) -> object:
                return torch.autograd.grad(o, leaves, do, retain_graph=True)

            calls[f"{name} forward"] = forward
            calls[f"{name} backward"] = backward
        found = milliseconds(calls, 5)
        softmax = {d: statistics.median(found[f"softmax {d}"]) for d in ("forward", "backward")}
        for name, samples in found.items():
            median = statistics.median(samples)
            numbers: dict[str, object] = {
                "case": f"causal B1 H16 L{length} D{dim}",
                "what": name,
                "milliseconds": median,
                "over_softmax": median / softmax[name.split()[-1]],
                "samples": samples,
            }
            if name.startswith("local"):
                numbers |= {"ridge": 10.0, "mean_iterations": report.mean_iterations}
            _print({n: x for n, x in numbers.items() if n != "samples"})
            write(numbers)
        del calls, scores, o


def decode(write: Writer) -> None:
    """One query against a cache of L keys, replayed from a graph."""
    for batch, length, heads, kv_heads in ((1, 4096, 8, 8), (16, 8192, 32, 8), (1, 65536, 8, 8)):
        q, _, _ = draw((1,), heads, 128, batch=batch)
        _, k, v = draw((length,), kv_heads, 128, batch=batch)
        scores = {
            "softmax": fv.Softmax(),
            "local linear": fv.LocalLinear(10.0),
            "parallax": fv.Parallax(0.1 * torch.randn_like(q)),
        }
        calls: dict[str, Callable[[], object]] = {}
        for name, score in scores.items():

            def step(score: fv.Score = score, inputs: Inputs = (q, k, v)) -> Tensor:
                with torch.no_grad():
                    return fv.attend(*inputs, fv.Causal(), score, implementation=_named(score))

            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            calls[name] = graph.replay
        found = milliseconds(calls, 9)
        softmax = statistics.median(found["softmax"])
        for name, samples in found.items():
            median = statistics.median(samples)
            numbers: dict[str, object] = {
                "case": f"decode B{batch} L{length} Hq{heads} Hkv{kv_heads} D128",
                "what": name,
                "milliseconds": median,
                "over_softmax": median / softmax,
                "samples": samples,
            }
            _print({n: x for n, x in numbers.items() if n != "samples"})
            write(numbers)


def _named(score: fv.Score) -> str | None:
    """Softmax runs as planned."""
    return None if isinstance(score, fv.Softmax) else "triton"


def _print(numbers: dict[str, object]) -> None:
    shown = (f"{n} {x:.4g}" if isinstance(x, float) else f"{n} {x}" for n, x in numbers.items())
    print(", ".join(shown), flush=True)


def writer(path: str | None) -> Writer:
    """Appends lines, each with what they were measured on and with."""
    if path is None:
        return lambda numbers: None
    import triton

    about = {
        "command": f"python scripts/gpu_local_linear.py {sys.argv[1]}",
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }

    def write(numbers: dict[str, object]) -> None:
        with Path(path).open("a") as file:
            file.write(json.dumps(numbers | about) + "\n")

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("task", choices=("check", "fuzz", "accuracy", "time", "decode"))
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--match", default="", help="words, any of which names of checks hold")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    given = parser.parse_args()
    if given.task == "check":
        check(given.part, given.match)
    elif given.task == "fuzz":
        fuzz(given.seconds, given.seed)
    elif given.task == "accuracy":
        accuracy(writer(given.out))
    elif given.task == "time":
        timings(given.seconds, writer(given.out))
    else:
        decode(writer(given.out))


if __name__ == "__main__":
    main()
