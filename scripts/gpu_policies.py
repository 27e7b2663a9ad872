"""Caches on a GPU: policies (memory that is really given back) and those with their old keys on the host
(bytes here and there, what a step fetches); distance from float64, time of a step.

python scripts/gpu_policies.py --out policies_h100.jsonl
python scripts/gpu_policies.py --policy "" --steps 24 --out host_caches_h100.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal._errors import FovealError
from foveal.bench.record import command_line, environment
from foveal.caches import KVShape, Offloaded
from foveal.caches.policies import POLICIES, Counts, Held, Policy, Reading, policy_class
from foveal.compose import LouisCache, NosaCache, RetrievalCache
from foveal.scores import Softmax

BATCH, HEADS, KV_HEADS, DIM = 4, 32, 8, 128
DEVICE = torch.device("cuda")
SINKS, WINDOW, PAGE, BLOCK = 16, 64, 32, 64
# A query is this much of the one before it, the rest is new.
KEPT = 0.95
# Rows that far from float64, in their norm, read other keys there: two were alike but for rounding.
ELSEWHERE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budget", default="1.0,0.5,0.25,0.125")
    parser.add_argument("--policy", default=",".join(POLICIES), help="by comma, or nothing")
    parser.add_argument("--cache", default=",".join(HOST), help="by comma, or nothing")
    parser.add_argument("--steps", type=int, default=24, help="of caches on the host")
    parser.add_argument("--seconds", type=float, default=600.0, help="no case starts after them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = environment(DEVICE)
    facts = {name: value for name, value in facts.items() if name != "ceilings"}
    end = time.monotonic() + args.seconds
    for kind, name in (
        *(("cache", name) for name in args.cache.split(",") if name),
        *(("policy", name) for name in args.policy.split(",") if name),
    ):
        for share in map(float, args.budget.split(",")):
            if time.monotonic() > end:
                print(f"{name}, {share}: the time was over", flush=True)
                continue
            try:
                if kind == "cache":
                    values = _stepped(name, share, args.length, args.steps)
                else:
                    values = _measured(policy_class(name)(budget=share), args.length)
            except (FovealError, RuntimeError) as error:
                print(f"{name}, {share}: {error}", flush=True)
                continue
            line = {
                "command": command_line(),
                kind: name,
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


def _retrieval(shape: KVShape, length: int, tokens: int) -> RetrievalCache:
    keys = max((tokens - SINKS - WINDOW) // (HEADS // KV_HEADS), 1)
    return RetrievalCache(
        shape, q_heads=HEADS, max_tokens=length, keys=keys, sinks=SINKS, window=WINDOW
    )


def _louis(shape: KVShape, length: int, tokens: int) -> LouisCache:
    pages = max((tokens - WINDOW) // PAGE, 1)
    slots = pages + max(pages // 4, 1)
    return LouisCache(
        shape, max_tokens=length, pages=pages, page=PAGE, window=WINDOW, slots=slots, alike=0.7
    )


def _nosa(shape: KVShape, length: int, tokens: int) -> NosaCache:
    budget = max(-(-tokens // BLOCK), 4)
    own = min(max(budget // 4, 3), budget)
    return NosaCache(shape, max_tokens=length, block=BLOCK, budget=budget, by_query=own)


HOST: dict[str, Callable[[KVShape, int, int], Offloaded]] = {
    "retrieval_attention": _retrieval,
    "louis_kv": _louis,
    "nosa": _nosa,
}
"""Caches for sequences of `length` tokens of which a key head reads about `tokens`."""


@dataclass
class _Text:
    """Keys, values and weights of a text [BATCH, length + steps, ...], and a query for every step."""

    k: Tensor
    v: Tensor
    weights: Tensor
    q: Tensor

    @staticmethod
    def drawn(length: int, steps: int) -> _Text:
        size = (BATCH, length + steps, KV_HEADS)
        k, v, weights = _drawn(*size, DIM), _drawn(*size, DIM), _drawn(*size)
        q = [_drawn(BATCH, 1, HEADS, DIM)]
        for _ in range(steps - 1):
            q.append(KEPT * q[-1] + (1 - KEPT**2) ** 0.5 * _drawn(BATCH, 1, HEADS, DIM))
        return _Text(k, v, weights, 2 * torch.cat(q, 1))

    def put(self, cache: Offloaded, start: int, stop: int, dtype: torch.dtype) -> None:
        rows = (x[:, start:stop].to(dtype) for x in (self.k, self.v, self.weights))
        k, v, weights = rows
        cache.append(k, v, bias=weights if isinstance(cache, NosaCache) else None)


def _stepped(name: str, share: float, length: int, steps: int) -> dict[str, Any]:
    """Steps of one token behind a prompt of `length` tokens, with a budget that is a share of it."""
    torch.manual_seed(0)
    text, tokens = _Text.drawn(length, steps), max(int(share * length), 1)
    before = torch.cuda.memory_allocated()
    cache = _filled(name, text, torch.bfloat16, length, steps, tokens)
    outputs, samples, appended, fetched = [], [], [], []
    moved, taken = cache.fetched_bytes, torch.cuda.memory_allocated() - before
    for i in range(steps):
        _wait()
        start = time.perf_counter()
        text.put(cache, length + i, length + i + 1, torch.bfloat16)
        _wait()
        appended.append(time.perf_counter() - start)
        start = time.perf_counter()
        outputs.append(cache.decode(text.q[:, i : i + 1]))  # type: ignore[attr-defined]
        _wait()
        samples.append(time.perf_counter() - start)
        fetched.append(cache.fetched)
    found = {
        "whole_bytes": 2 * text.k[:, :length].nbytes,
        "taken_bytes": taken,
        "counted_bytes": cache.bytes(),
        "host_bytes": cache.host_bytes(),
        "slots": cache.slots,
        "page": cache.page_size,
        "pages_fetched": fetched,
        "fetched_bytes": (cache.fetched_bytes - moved) / steps,
        "append_seconds": statistics.median(appended[2:]),
        "step_seconds": statistics.median(samples[2:]),
        "samples": samples,
    }
    return found | _distance(name, text, length, tokens, outputs[:4])


def _filled(
    name: str, text: _Text, dtype: torch.dtype, length: int, steps: int, tokens: int
) -> Offloaded:
    shape = KVShape(BATCH, KV_HEADS, DIM, dtype=dtype, device=DEVICE)
    cache = HOST[name](shape, length + steps, tokens)
    text.put(cache, 0, length, dtype)
    _wait()
    return cache


def _distance(
    name: str, text: _Text, length: int, tokens: int, outputs: list[Tensor]
) -> dict[str, Any]:
    """Of the first steps from those of the same cache in float64, row by row, relative."""
    cache = _filled(name, text, torch.float64, length, len(outputs), tokens)
    rows = []
    for i, o in enumerate(outputs):
        text.put(cache, length + i, length + i + 1, torch.float64)
        exact = cache.decode(text.q[:, i : i + 1].double())  # type: ignore[attr-defined]
        rows.append(((o - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten())
    errors = torch.cat(rows)
    return {
        "error": float(errors.median()),
        "rows": len(errors),
        "rows_elsewhere": int((errors > ELSEWHERE).sum()),
    }


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


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
