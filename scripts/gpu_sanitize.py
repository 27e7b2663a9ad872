"""The main kernels on small problems under compute-sanitizer: bad accesses, races in shared memory.

python scripts/gpu_sanitize.py --out DIR [--sanitizer PATH] [--implementations triton,hopper]
    compiles everything first, side by side, then forward and backward under each tool

The tool comes with the CUDA toolkit, or with `pip install nvidia-cuda-sanitizer-api`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]
TOOLS = ("memcheck", "racecheck", "synccheck")
CASES = ("causal", "plane", "space", "lists", "sink tokens", "table")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sanitizer", default="compute-sanitizer")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--implementations", default="triton")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        for implementation in options.implementations.split(","):
            _problems(implementation, options.cases.split(","))
        return 0
    sanitizer = shutil.which(options.sanitizer)
    if sanitizer is None:
        print(f"{options.sanitizer} was not found; pip install nvidia-cuda-sanitizer-api brings it")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.cases.split(",")
    worker = [sys.executable, __file__, "--run", "--out", str(options.out)]
    worker += ["--implementations", options.implementations]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        end = time.monotonic() + options.seconds
        warm = [subprocess.Popen([*worker, "--cases", name], env=environment) for name in names]
        for process in warm:
            process.wait(max(end - time.monotonic(), 1.0))
        running = [
            (tool, _start(sanitizer, tool, [*worker, "--cases", options.cases], environment))
            for tool in options.tools.split(",")
        ]
        verdicts = [_verdict(tool, process, end) for tool, process in running]
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


def _verdict(tool: str, process: subprocess.Popen[str], end: float) -> dict[str, object]:
    try:
        output, _ = process.communicate(timeout=max(end - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    done = [line for line in output.splitlines() if line.startswith("done ")]
    findings = [line for line in output.splitlines() if line.startswith("=========")]
    ok = process.returncode == 0 and bool(done)
    print(f"{tool}: exit {process.returncode}, {len(done)} problems; {' '.join(findings[-1:])}")
    if not ok:
        print("\n".join(output.splitlines()[-25:]))
    return {
        "tool": tool,
        "ok": ok,
        "exit": process.returncode,
        "problems": done,
        "findings": findings[:60],
    }


def _problems(implementation: str, chosen: list[str]) -> None:
    import torch

    import foveal as fv

    source = torch.Generator().manual_seed(0)
    for name, grid, pattern, score in _cases():
        if name not in chosen:
            continue
        q, k, v = (
            torch.randn(1, *grid, heads, 64, generator=source).cuda().bfloat16().requires_grad_()
            for heads in (4, 2, 2)
        )
        try:
            o = fv.attend(q, k, v, pattern, score, implementation=implementation)
        except fv.errors.RefusedError as refusal:
            print(f"refused {implementation} {name}: {refusal.reason}", flush=True)
            continue
        o.backward(torch.ones_like(o))
        torch.cuda.synchronize()
        print(f"done {implementation} {name}", flush=True)


def _cases() -> Iterator[tuple[str, tuple[int, ...], object, object]]:
    import torch

    import foveal as fv

    lists = torch.rand(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    blocks = fv.Blocks(fv.BlockSelection.from_block_mask(lists, 64, 64))
    table = torch.randn(4, 9, 9).cuda().requires_grad_()
    yield "causal", (201,), fv.Causal(), fv.Softmax()
    yield "plane", (13, 17), fv.Neighborhood((5, 5)), fv.Softmax(soft_cap=9.0)
    yield "space", (5, 6, 7), fv.Neighborhood((3, 3, 4)), fv.Softmax()
    yield "lists", (181,), blocks & fv.Causal(), fv.Softmax()
    yield "sink tokens", (181,), fv.Sliding(30, 0, sink_tokens=3), fv.Softmax()
    yield "table", (13, 17), fv.Neighborhood((5, 5)), fv.RelativeBias(table)


if __name__ == "__main__":
    sys.exit(main())
