"""The main kernels on small problems under compute-sanitizer: bad accesses, races in shared memory.

python scripts/gpu_sanitize.py --out DIR [--sanitizer PATH] [--implementations triton,hopper]
    compiles everything first, side by side, then forward and backward under each tool, every case in
    a process of its own

The tool comes with the CUDA toolkit, or with `pip install nvidia-cuda-sanitizer-api`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]
TOOLS = ("memcheck", "racecheck", "synccheck")
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sanitizer", default="compute-sanitizer")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--implementations", default="triton")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--cases", default="", help="names joined by commas (default: all)")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        for implementation in options.implementations.split(","):
            _problems(implementation, options.cases.split(","))
        return 0
    sanitizer = shutil.which(options.sanitizer) or shutil.which(
        options.sanitizer, path=os.pathsep.join(_PLACES)
    )
    if sanitizer is None:
        print(f"{options.sanitizer} was not found; pip install nvidia-cuda-sanitizer-api brings it")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.cases.split(",") if options.cases else [case.name for case in _cases()]
    worker = [sys.executable, __file__, "--run", "--out", str(options.out)]
    worker += ["--implementations", options.implementations]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        end = time.monotonic() + options.seconds
        began = time.monotonic()
        warm = [subprocess.Popen([*worker, "--cases", name], env=environment) for name in names]
        for process in warm:
            process.wait(max(end - time.monotonic(), 1.0))
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        verdicts = []
        for tool in options.tools.split(","):
            running = [
                (name, _start(sanitizer, tool, [*worker, "--cases", name], environment))
                for name in names
            ]
            verdicts += [_verdict(tool, name, process, end) for name, process in running]
    (options.out / "sanitizer.jsonl").write_text(
        "".join(json.dumps(verdict) + "\n" for verdict in verdicts)
    )
    return 0 if all(verdict["ok"] for verdict in verdicts) else 1


def _start(
    sanitizer: str, tool: str, worker: list[str], environment: dict[str, str]
) -> subprocess.Popen[str]:
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += ["--kernel-regex", "kns=attend", *worker]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _verdict(tool: str, name: str, process: subprocess.Popen[str], end: float) -> dict[str, object]:
    try:
        output, _ = process.communicate(timeout=max(end - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    done = [line for line in output.splitlines() if line.startswith("done ")]
    findings = [line for line in output.splitlines() if line.startswith("=========")]
    ok = process.returncode == 0 and bool(done)
    print(
        f"{tool} {name}: exit {process.returncode}, {done}; {' '.join(findings[-1:])}", flush=True
    )
    if not ok:
        print("\n".join(output.splitlines()[-25:]), flush=True)
    return {
        "tool": tool,
        "case": name,
        "ok": ok,
        "exit": process.returncode,
        "problems": done,
        "findings": findings[:60],
    }


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    grid: tuple[int, ...]
    pattern: Any
    score: Any
    head_dim: int = 64


def _problems(implementation: str, chosen: list[str]) -> None:
    import torch

    import foveal as fv

    source = torch.Generator().manual_seed(0)
    for case in _cases():
        if case.name not in chosen:
            continue
        q, k, v = (
            torch.randn(1, *case.grid, heads, case.head_dim, generator=source).cuda().bfloat16()
            for heads in (4, 2, 2)
        )
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        for repeatable in (False, True):
            torch.use_deterministic_algorithms(repeatable, warn_only=True)
            try:
                o = fv.attend(q, k, v, case.pattern, case.score, implementation=implementation)
            except fv.errors.RefusedError as refusal:
                print(f"refused {implementation} {case.name}: {refusal.reason}", flush=True)
                break
            o.backward(torch.ones_like(o))
            torch.cuda.synchronize()
            print(f"done {implementation} {case.name} repeatable={repeatable}", flush=True)


def _cases() -> Iterator[Case]:
    import torch

    import foveal as fv

    plain = fv.Softmax()
    source = torch.Generator().manual_seed(0)
    small, large = (torch.rand(1, 4, 4, 4, generator=source) < 0.6 for _ in range(2))
    blocks = [
        fv.Blocks(fv.BlockSelection.from_block_mask(kept, side, side))
        for kept, side in ((small, 64), (large, 128))
    ]
    table = torch.randn(4, 9, 9).cuda().requires_grad_()
    yield Case("causal", (201,), fv.Causal(), plain)
    yield Case("causal 128", (301,), fv.Causal(), plain, 128)
    yield Case("plane", (13, 17), fv.Neighborhood((5, 5)), plain)
    yield Case("plane 128", (13, 17), fv.Neighborhood((5, 5)), plain, 128)
    yield Case("space", (5, 6, 7), fv.Neighborhood((3, 3, 4)), plain)
    yield Case("lists", (241,), blocks[0] & fv.Causal(), plain)
    yield Case("large lists", (500,), blocks[1] & fv.Causal(), plain, 128)
    yield Case("sink tokens", (181,), fv.Sliding(30, 0, sink_tokens=3), plain)
    yield Case("cap and sink", (181,), fv.Causal(), fv.Softmax(soft_cap=9.0, sink=table[:, 0, 0]))
    yield Case("key bias", (181,), fv.Causal(), fv.KeyBias(torch.randn(1, 4, 181).cuda()))
    yield Case("table", (13, 17), fv.Neighborhood((5, 5)), fv.RelativeBias(table))
    yield Case("causal 256", (201,), fv.Causal(), plain, 256)


if __name__ == "__main__":
    sys.exit(main())
