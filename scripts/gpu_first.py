"""Seconds until the first result of shapes never seen, forward and backward, and kernels compiled for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import foveal as fv
from foveal.patterns.base import Pattern

Writer = Callable[[dict[str, object]], None]
Shape = tuple[str, tuple[int, ...], int, Callable[[int], Pattern]]


def _blocks(tokens: int) -> Pattern:
    tiles = -(-tokens // 128)
    mask = torch.rand(1, 16, tiles, tiles, generator=torch.Generator().manual_seed(0)) < 0.3
    return fv.Blocks(fv.BlockSelection.from_block_mask(mask, 128, 128))


SEQUENCES: dict[str, list[Shape]] = {
    "causal": [
        ("first", (4096,), 128, lambda L: fv.Causal()),
        ("other length", (3072,), 128, lambda L: fv.Causal()),
        ("odd length", (3001,), 128, lambda L: fv.Causal()),
        ("other pattern", (3001,), 128, lambda L: fv.Sliding(255)),
        ("other head_dim", (4096,), 64, lambda L: fv.Causal()),
    ],
    "grid": [
        ("first", (64, 64), 128, lambda L: fv.Neighborhood((13, 13))),
        ("other window", (64, 64), 128, lambda L: fv.Neighborhood((15, 15))),
        ("other grid", (57, 71), 128, lambda L: fv.Neighborhood((15, 15))),
        ("space", (8, 24, 24), 128, lambda L: fv.Neighborhood((3, 9, 9))),
    ],
    "lists": [
        ("first", (4096,), 128, _blocks),
        ("other length", (3001,), 128, _blocks),
        ("other head_dim", (4096,), 80, _blocks),
    ],
}


def run(
    out: Path,
    write: Writer,
    implementation: str = "triton",
    alone: bool = False,
    sequences: Sequence[str] = (),
) -> int:
    """Each sequence of shapes in a process and a compiler cache of its own, side by side; then again.

    alone: one after the other, as processes that compile on one machine slow each other down.
    sequences: their names; all if there are none.
    """
    chosen = list(sequences or SEQUENCES)
    together = [[name] for name in chosen] if alone else [chosen]
    with tempfile.TemporaryDirectory() as caches:
        for restarted in (False, True):
            for names in together:
                if failed := _all(out, write, implementation, names, caches, restarted, alone):
                    return failed
    return 0


def _all(
    out: Path,
    write: Writer,
    implementation: str,
    names: list[str],
    caches: str,
    restarted: bool,
    alone: bool,
) -> int:
    running = []
    for name in names:
        environment = {**os.environ, "TRITON_CACHE_DIR": f"{caches}/{name}"}
        lines = (out / f"first-{name}.jsonl").open("w")
        command = [sys.executable, __file__, name, implementation]
        running.append((name, subprocess.Popen(command, env=environment, stdout=lines)))
    failed = 0
    about = {"implementation": implementation, "restarted": restarted, "alone": alone}
    for name, process in running:
        failed |= process.wait()
        for line in (out / f"first-{name}.jsonl").read_text().splitlines():
            record = {"sequence": name, **about, **json.loads(line)}
            write(record)
            print(record, flush=True)
    return failed


def measure(name: str, implementation: str) -> Iterator[dict[str, object]]:
    source = torch.Generator("cuda").manual_seed(0)
    torch.ones(1, device="cuda").sum().item()
    began = time.perf_counter()
    import triton  # noqa: F401

    yield {"shape": "import triton", "seconds": round(time.perf_counter() - began, 3)}
    yield {"shape": "PyTorch's own backward", "seconds": _first_backward()}
    for label, grid, dim, make in SEQUENCES[name]:
        pattern = make(torch.Size(grid).numel())
        q, k, v = (
            torch.randn(1, *grid, 16, dim, device="cuda", generator=source).bfloat16()
            for _ in "qkv"
        )
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        record: dict[str, object] = {"shape": label, "grid": grid, "dim": dim}
        began, kernels = time.perf_counter(), _compiled()
        o = fv.attend(q, k, v, pattern, implementation=implementation)
        torch.cuda.synchronize()
        record["forward_s"] = round(time.perf_counter() - began, 3)
        record["forward_kernels"] = _compiled() - kernels
        began, kernels = time.perf_counter(), _compiled()
        o.backward(torch.ones_like(o))
        torch.cuda.synchronize()
        record["backward_s"] = round(time.perf_counter() - began, 3)
        record["backward_kernels"] = _compiled() - kernels
        yield record


def _first_backward() -> float:
    """Seconds of a backward without a kernel of ours: the first with a gradient makes PyTorch import."""
    x = torch.ones(1, device="cuda", requires_grad=True)
    began = time.perf_counter()
    y = x * x
    y.backward(torch.ones_like(y))
    torch.cuda.synchronize()
    return round(time.perf_counter() - began, 3)


def _compiled() -> int:
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin"))


if __name__ == "__main__":
    for record in measure(*sys.argv[1:]):
        print(json.dumps(record), flush=True)
