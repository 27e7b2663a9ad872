"""Cache policies on a GPU: memory that is really given back, distance from float64, time of a step.

python scripts/gpu_policies.py --out policies_h100.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal._errors import FovealError
from foveal.bench.record import command_line, environment
from foveal.caches.policies import POLICIES, Counts, Held, Policy, Reading, policy_class
from foveal.scores import Softmax

BATCH, HEADS, KV_HEADS, DIM = 4, 32, 8, 128
DEVICE = torch.device("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budget", default="1.0,0.5,0.25,0.125")
    parser.add_argument("--policy", default=",".join(POLICIES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = environment(DEVICE)
    facts = {name: value for name, value in facts.items() if name != "ceilings"}
    for name in args.policy.split(","):
        for share in map(float, args.budget.split(",")):
            try:
                values = _measured(policy_class(name)(budget=share), args.length)
            except (FovealError, RuntimeError) as error:
                print(f"{name}, {share}: {error}", flush=True)
                continue
            line = {
                "command": command_line(),
                "policy": name,
                "budget": share,
                "shape": [BATCH, args.length, HEADS, KV_HEADS, DIM],
                "dtype": "bfloat16",
                **values,
                "environment": facts,
            }
            said = {name: value for name, value in line.items() if name != "environment"}
            print({key: said[key] for key in list(said)[1:] if key != "samples"}, flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def _measured(policy: Policy, length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    q = _drawn(BATCH, length, HEADS, DIM) * 2
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = Held()
    held.append(_drawn(BATCH, length, KV_HEADS, DIM), _drawn(BATCH, length, KV_HEADS, DIM))
    whole = torch.cuda.memory_allocated() - before
    start = time.perf_counter()
    if policy.due(Counts(length, length, length)):
        _settle(policy, held, q)
    torch.cuda.synchronize()
    acted = time.perf_counter() - start
    taken = torch.cuda.memory_allocated() - before
    counted, host = held.bytes(), held.host_bytes()
    held.append(_drawn(BATCH, 1, KV_HEADS, DIM), _drawn(BATCH, 1, KV_HEADS, DIM))
    step = q[:, -1:]
    o = held.attend(step, Softmax())
    exact = _exact(held, step)
    samples = [_timed(held, step) for _ in range(12)][2:]
    return {
        "whole_bytes": whole,
        "taken_bytes": taken,
        "counted_bytes": counted,
        "host_bytes": host,
        "share": taken / whole,
        "acted_seconds": acted,
        "step_seconds": statistics.median(samples),
        "samples": samples,
        "error": float((o.double() - exact).norm() / exact.norm()),
    }


def _settle(policy: Policy, held: Held, q: Tensor) -> None:
    """Outside of `_measured`: what the policy looked at is gone when memory is counted."""
    length = q.shape[1]
    k, v, real, positions = held.everything()
    tokens = torch.ones(BATCH, length, dtype=torch.int64, device=DEVICE)
    reading = Reading(q, k, v, real, positions, DIM**-0.5, tokens=tokens)
    held.settle(policy.settle([policy.vote(reading)], length)[0])


def _exact(held: Held, q: Tensor) -> Tensor:
    """In float64, from what is held and attended to."""
    outputs = torch.zeros(*q.shape[:3], DIM, dtype=torch.float64, device=DEVICE)
    assert held.tail_k is not None
    assert held.tail_v is not None
    groups = HEADS // KV_HEADS
    for b in range(BATCH):
        for h in range(KV_HEADS):
            keys, values = [held.tail_k[b, :, h]], [held.tail_v[b, :, h]]
            for piece in held.pieces:
                _, _, start, stop = piece.runs()[b * KV_HEADS + h]
                if not piece.idle:
                    k, v = piece.rows(start, stop)
                    keys.append(k)
                    values.append(v)
            own = slice(h * groups, (h + 1) * groups)
            s = q[b, :, own].double() @ torch.cat(keys).double().T * DIM**-0.5
            outputs[b, :, own] = s.softmax(-1) @ torch.cat(values).double()
    return outputs


def _timed(held: Held, q: Tensor) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    held.attend(q, Softmax())
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
