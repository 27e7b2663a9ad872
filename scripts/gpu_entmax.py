"""Checks and times alpha-entmax attention on a CUDA device; one line per case.

python scripts/gpu_entmax.py check [--only 0,3,7]               o and gradients against float64
python scripts/gpu_entmax.py time [--seconds 40] [--out F]      ours, and adasplash where installed

Times are medians of interleaved samples, in milliseconds; JSON lines hold every sample.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CAUSAL = fv.Causal()


@dataclasses.dataclass(frozen=True)
class Case:
    """Standard normal q and k times `spread`, and v."""

    length: int
    heads: int
    kv_heads: int
    dim: int
    alpha: float = 1.5
    pattern: fv.Pattern = CAUSAL
    spread: float = 1.0
    dtype: torch.dtype = BF16
    value_dim: int | None = None
    cut: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shape = f"L{self.length} Hq{self.heads} Hkv{self.kv_heads} D{self.dim}"
        packed = "" if self.cut is None else f" packed {len(self.cut) - 1}"
        return f"entmax {self.alpha} {self.pattern} {shape} {str(self.dtype)[6:]} x{self.spread:g}{packed}"

    def draw(self) -> list[Tensor]:
        source = torch.Generator("cuda").manual_seed(0)

        def normal(heads: int, dim: int, factor: float = 1.0) -> Tensor:
            x = torch.randn(1, self.length, heads, dim, generator=source, device="cuda") * factor
            return x.to(self.dtype).requires_grad_()

        value_dim = self.dim if self.value_dim is None else self.value_dim
        return [
            normal(self.heads, self.dim, self.spread),
            normal(self.kv_heads, self.dim, self.spread),
            normal(self.kv_heads, value_dim),
        ]

    @property
    def cu_seqlens(self) -> Tensor | None:
        return (
            None if self.cut is None else torch.tensor(self.cut, dtype=torch.int32, device="cuda")
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, implementation: str | None = None) -> Tensor:
        return fv.attend(
            q, k, v, self.pattern, fv.Entmax(self.alpha),
            cu_seqlens=self.cu_seqlens, implementation=implementation,
        )  # fmt: skip


CHECKS = (
    Case(777, 4, 2, 64),
    Case(777, 4, 2, 64, spread=0.02),
    Case(777, 4, 2, 64, spread=4.0),
    Case(777, 4, 2, 64, pattern=fv.Dense()),
    Case(777, 4, 2, 64, cut=(0, 1, 130, 130, 700, 777)),
    Case(3000, 4, 2, 64, pattern=fv.Dense(), spread=0.02),
    Case(777, 4, 2, 64, pattern=fv.Sliding(100, 0, sink_tokens=3)),
    Case(777, 4, 2, 64, pattern=fv.Causal() | fv.Strided(16)),
    Case(777, 4, 2, 64, alpha=2.0),
    Case(777, 4, 2, 64, alpha=1.25),
    Case(513, 2, 1, 128, dtype=F16),
    Case(300, 2, 2, 80, value_dim=48),
    Case(300, 2, 2, 32, dtype=F32),
    Case(300, 2, 2, 256),
    Case(1111, 8, 2, 128),
    # Longer than lists of single keys and queries have room for; with small scores most keys count.
    Case(8300, 1, 1, 64),
    Case(8300, 1, 1, 64, spread=0.02),
    Case(8300, 2, 1, 64, spread=1.7),
)
TIMES = (
    Case(8192, 16, 16, 64),
    Case(8192, 16, 16, 64, spread=1.7),
    Case(8192, 16, 16, 64, spread=0.3),
    Case(8192, 16, 16, 64, alpha=2.0),
    Case(8192, 16, 16, 64, alpha=1.25),
    Case(8192, 32, 8, 128),
    Case(32768, 16, 4, 64),
)


def check(case: Case) -> bool:
    from tests.engines.entmax.agree import Problem

    q, k, v = case.draw()
    problem = Problem(q, k, v, case.pattern, case.alpha, case.cu_seqlens)
    verdicts = problem.verdicts("triton")
    bad = [str(verdict) for verdict in verdicts if not verdict.ok]
    worst = max(verdict.error / max(verdict.allowed, 1e-30) for verdict in verdicts)
    print(f"{'FAILED' if bad else 'ok    '} {worst:6.2f} {case} {'; '.join(bad)}", flush=True)
    return not bad


def samples(runs: dict[str, Callable[[], Any]], count: int = 15) -> dict[str, list[float]]:
    """Milliseconds of every run, interleaved."""
    for run in runs.values():
        for _ in range(3):
            run()
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            found[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in found.items()}


def peer(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | None:
    """adasplash on the same numbers, heads first; None where it is not installed or cannot."""
    if importlib.util.find_spec("adasplash") is None or q.shape != k.shape:
        return None
    if case.alpha != 1.5 or case.pattern != fv.Causal():
        return None
    from adasplash import adasplash

    first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    return lambda: adasplash(*first, alpha=1.5, is_causal=True)


def timed(case: Case, with_peer: bool) -> dict[str, Any]:
    q, k, v = case.draw()
    forwards: dict[str, Callable[[], Tensor]] = {"foveal": lambda: case.attend(q, k, v, "triton")}
    other = peer(case, q, k, v) if with_peer else None
    if other is not None:
        forwards["adasplash"] = other
    backwards: dict[str, Callable[[], Any]] = {}
    for name, run in forwards.items():
        o = run()
        do = torch.randn_like(o)
        backwards[name] = lambda o=o, do=do: o.backward(do, retain_graph=True)
    line: dict[str, Any] = {"case": str(case)}
    for name, found in samples(forwards).items():
        line[f"{name} forward ms"] = round(statistics.median(found), 4)
        line[f"{name} forward samples"] = [round(x, 4) for x in found]
    for name, found in samples(backwards).items():
        line[f"{name} backward ms"] = round(statistics.median(found), 4)
        line[f"{name} backward samples"] = [round(x, 4) for x in found]
    shown = ", ".join(f"{key[:-3]} {x:.3f}" for key, x in line.items() if key.endswith(" ms"))
    print(f"{case}: {shown}", flush=True)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--only", help="numbers of cases, by comma")
    parser.add_argument("--peer", action="store_true", help="time adasplash beside it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    end, failed = time.monotonic() + options.seconds, 0
    cases = CHECKS if options.what == "check" else TIMES
    numbers = range(len(cases)) if options.only is None else map(int, options.only.split(","))
    for case in (cases[number] for number in numbers):
        if time.monotonic() > end:
            print(f"{case}: the time was over", flush=True)
            continue
        try:
            if options.what == "check":
                failed += not check(case)
                continue
            line = timed(case, options.peer)
        except Exception as failure:
            failed += 1
            print(f"{case}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
            continue
        if options.out is not None:
            import triton

            about = {
                "command": " ".join(["python", *sys.argv]),
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
            }
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(about | line) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
