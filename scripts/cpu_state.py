"""Times the chunk form of the state engine on a CPU against its loop over tokens; one line per case.

python scripts/cpu_state.py [--threads 2] [--length 16384] [--rounds 7] [--out F]

4 heads of 64 channels, float32, forward.  By turns in every round: the chunk form, that of half and of twice
the length, and in the first two rounds the loop.  JSON lines hold all samples in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal.rules.base import Rule

HEADS, DIM = 4, 64
CASES: tuple[tuple[Rule, str], ...] = (
    *((fv.Additive(), decay) for decay in ("none", "fixed", "token", "channel")),
    (fv.Additive(normalised=True), "token"),
    *((fv.Delta(), decay) for decay in ("none", "fixed", "token", "channel")),
    (fv.MLSTM(), "token"),
    (fv.MLSTM("sigmoid"), "token"),
    (fv.TwoState(), "token"),
    (fv.TwoState(chunk=64), "token"),
)
LOOPS = 2
"""Rounds in which the loop runs."""


def draw(rule: Rule, decay: str, length: int) -> dict[str, Tensor]:
    """q, k (of norm 1), v and gates for a rule."""
    source = torch.Generator().manual_seed(0)
    tokens = (1, length, HEADS)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=source)

    q, k, v = (torch.randn(*tokens, DIM, generator=source) for _ in range(3))
    if rule == fv.Additive(normalised=True):
        q, k = q.abs(), k.abs()
    found = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v}
    shapes = {"fixed": (HEADS,), "token": tokens, "channel": (*tokens, DIM)}
    if decay != "none":
        found["log_decay"] = -uniform(*shapes[decay]) * 0.1
    gate = uniform(*tokens)
    found["write_gate"] = torch.logit(gate) if isinstance(rule, fv.MLSTM) else gate
    if isinstance(rule, fv.TwoState):
        # Larger steps along the momentum make the memory grow without bound.
        found["write_gate"] = gate * 0.05
        found["log_momentum"] = -uniform(*tokens) * 0.1
    return found


def measured(rule: Rule, decay: str, length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of all samples by what ran."""
    lengths = {"chunk": length, "chunk, half": length // 2, "chunk, twice": length * 2}
    drawn = {name: draw(rule, decay, tokens) for name, tokens in lengths.items()}

    def seconds(inputs: dict[str, Tensor], implementation: str) -> float:
        start = time.perf_counter()
        fv.scan(**inputs, rule=rule, implementation=implementation)
        return time.perf_counter() - start

    for inputs in drawn.values():
        seconds(inputs, "chunk")
    samples: dict[str, list[float]] = {name: [] for name in (*drawn, "loop")}
    for turn in range(rounds):
        for name, inputs in drawn.items():
            samples[name].append(seconds(inputs, "chunk"))
        if turn < LOOPS:
            samples["loop"].append(seconds(drawn["chunk"], "reference"))
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for rule, decay in CASES:
        load = os.getloadavg()[0]
        with torch.no_grad():
            samples = measured(rule, decay, options.length, options.rounds)
        median = {name: statistics.median(found) for name, found in samples.items()}
        faster = median["loop"] / median["chunk"]
        doubling = median["chunk"] / median["chunk, half"]
        again = median["chunk, twice"] / median["chunk"]
        print(
            f"{rule.key}, {decay}: {1e3 * median['chunk']:.1f} ms, {faster:.1f}x the loop, "
            f"doubling costs {doubling:.2f}x and {again:.2f}x, load {load:.1f}",
            flush=True,
        )
        line = {
            "case": f"{rule.key}, {decay}", "length": options.length, "heads": HEADS, "head_dim": DIM,
            "threads": options.threads, "load": load, "samples": samples, "faster": faster,
            "doubling": doubling, "doubling again": again, "torch": torch.__version__,
            "machine": platform.processor(),
            "command": f"python scripts/cpu_state.py --threads {options.threads} --length {options.length} "
            f"--rounds {options.rounds}",
        }  # fmt: skip
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
