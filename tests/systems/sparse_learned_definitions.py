"""The learned sparse systems written a second time, from their equations, in plain PyTorch.

Nothing here uses a pattern, a score or an engine of foveal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.systems.definitions import Example

Makers = tuple[Callable[[torch.Generator], Example], ...]


def normal(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def qkv(source: torch.Generator, length: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return (
        normal(source, 2, length, heads, 3),
        normal(source, 2, length, kv_heads, 3),
        normal(source, 2, length, kv_heads, 4),
    )


def rows_of(row: Callable[[int, int, int], Tensor], batch: int, length: int, heads: int) -> Tensor:
    """[batch, length, heads, Dv] of row(b, t, h) [Dv]"""
    return torch.stack(
        [
            torch.stack([torch.stack([row(b, t, h) for h in range(heads)]) for t in range(length)])
            for b in range(batch)
        ]
    )


def softmax_row(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """One query [D] on keys [n, D] and values [n, Dv]."""
    return torch.softmax(k @ q / math.sqrt(len(q)) + bias, dim=0) @ v


def best(scores: list[float], count: int) -> list[int]:
    """Places of the largest, the lower place first where two are equal."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:count])


def entmax_row(s: Tensor, alpha: float) -> Tensor:
    """By trying every size of support of the sorted scores."""
    z = (alpha - 1) * s
    order = torch.sort(z, descending=True).values
    plain = order.tolist()
    found = None
    for count in range(1, len(z) + 1):
        top = order[:count]
        mean = top.mean()
        if alpha == 2.0:
            tau = mean - 1 / count
        else:
            spread = (top**2).mean() - mean**2
            inside = (1 - count * spread) / count
            if float(inside.detach()) < 0:
                continue
            tau = mean - torch.sqrt(inside)
        level = float(tau.detach())
        if plain[count - 1] > level and (count == len(z) or plain[count] <= level):
            found = tau
    assert found is not None
    return (z - found).clamp_min(0.0) ** (1 / (alpha - 1))


def adasplash(source: torch.Generator, alpha: float) -> Example:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def row(b: int, t: int, h: int) -> Tensor:
            s = k[b, : t + 1, h // 2] @ q[b, t, h] / math.sqrt(q.shape[-1])
            return entmax_row(s, alpha) @ v[b, : t + 1, h // 2]

        return rows_of(row, 2, q.shape[1], 4)

    return Example(qkv(source, 9, 4, 2), expected, {"alpha": alpha})


def seer(source: torch.Generator, options: dict[str, Any]) -> Example:
    gate_q, gate_k = normal(source, 2, 14, 2, 6), normal(source, 2, 5, 2, 6)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def row(b: int, t: int, h: int) -> Tensor:
            own = t // 3
            logits = [
                float(gate_q[b, t, h // 2] @ gate_k[b, n, h // 2]) / 6**0.5 for n in range(own)
            ]
            total = sum(math.exp(x) for x in logits)
            gates = [math.exp(x) / total for x in logits]
            if "threshold" in options:
                kept = [n for n in range(own) if gates[n] > options["threshold"]]
            else:
                kept = best(gates, options["budget"] // 3 - 1)
            keys = [j for j in range(t + 1) if j // 3 in kept or j // 3 == own]
            return softmax_row(q[b, t, h], k[b, keys, h // 2], v[b, keys, h // 2])

        return rows_of(row, 2, 14, 4)

    def arguments(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return q, k, v, gate_q.to(q.dtype), gate_k.to(q.dtype)

    return Example(qkv(source, 14, 4, 2), expected, {"block": 3, **options}, arguments)


def pyramid(source: torch.Generator, causal: bool) -> Example:
    levels, q_block, kv_block, length = ((1, 0.3), (2, 0.8)), 8, 4, 22
    options = {"levels": levels, "q_block": q_block, "kv_block": kv_block, "sample": 0.5}

    def level_of(q: Tensor, k: Tensor, b: int, a: int, h: int) -> dict[int, int]:
        """Level per key block; a block that is not named is skipped."""
        scores: dict[int, float] = {}
        for i in range(a * q_block, min((a + 1) * q_block, length), 2):
            seen = [j for j in range(0, length, 2) if not causal or j <= i]
            s = {j: float(q[b, i, h] @ k[b, j, h]) / 3**0.5 for j in seen}
            top = max(s.values())
            for j, value in s.items():
                n = j // kv_block
                scores[n] = max(scores.get(n, -math.inf), value - top)
        blocks = range(-(-length // kv_block))
        near = {n for n in blocks if causal and (n + 1) * kv_block > a * q_block}
        far = [n for n in blocks if n not in near]
        order = sorted(far, key=lambda n: (-scores.get(n, -math.inf), n))
        found = dict.fromkeys((n for n in near if n * kv_block < (a + 1) * q_block), 1)
        begin = 0
        for size, until in levels:
            end = math.ceil(until * len(far) - 1e-9)
            found |= dict.fromkeys(order[begin:end], size)
            begin = end
        return found

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def row(b: int, t: int, h: int) -> Tensor:
            keys, values, weights = [], [], []
            for n, size in sorted(level_of(q.detach(), k.detach(), b, t // q_block, h).items()):
                for start in range(n * kv_block, min((n + 1) * kv_block, length), size):
                    if causal and size == 1 and start > t:
                        continue
                    group = slice(start, min(start + size, length))
                    keys.append(k[b, group, h].mean(0))
                    values.append(v[b, group, h].mean(0))
                    weights.append(math.log(group.stop - group.start))
            bias = torch.tensor(weights, dtype=q.dtype)
            return softmax_row(q[b, t, h], torch.stack(keys), torch.stack(values), bias)

        return rows_of(row, 2, length, 2)

    return Example(qkv(source, length, 2, 2), expected, {**options, "causal": causal})


def sla(source: torch.Generator, rest: str) -> Example:
    block, length = 4, 22
    blocks = -(-length // block)

    def expected(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def row(b: int, t: int, h: int) -> Tensor:
            own = slice(t // block * block, min((t // block + 1) * block, length))
            means = [k.detach()[b, n * block : (n + 1) * block, h].mean(0) for n in range(blocks)]
            scores = [float(q.detach()[b, own, h].mean(0) @ mean) for mean in means]
            order = sorted(range(blocks), key=lambda n: (-scores[n], n))
            critical, dropped = order[:2], order[-1:]
            members = {
                "marginal": [n for n in order if n not in critical and n not in dropped],
                "complement": order[2:],
                "all": order,
            }[rest]
            keys = [j for j in range(length) if j // block in critical]
            o = softmax_row(q[b, t, h], k[b, keys, h], v[b, keys, h])
            others = [j for j in range(length) if j // block in members]
            phi = torch.softmax(k[b, others, h], dim=-1) @ torch.softmax(q[b, t, h], dim=-1)
            return o + (phi / phi.sum()) @ v[b, others, h] @ weight + bias

        return rows_of(row, 2, length, 2)

    inputs = (*qkv(source, length, 2, 2), normal(source, 4, 4), normal(source, 4))
    options = {"block": block, "critical": 0.3, "negligible": 0.2, "rest": rest}
    return Example(inputs, expected, options)


def monarch(source: torch.Generator) -> Example:
    rows, columns, tiles = 2, 3, 2

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def token(tile: int, i: int, j: int) -> int:
            return (tile * rows + i) * columns + j

        def row(b: int, t: int, h: int) -> Tensor:
            a, j = t // (rows * columns), t % columns
            logits, values = [], []
            for f in range(tiles):
                for r in range(rows):
                    line = [token(f, r, at) for at in range(columns)]
                    inner = k[b, line, h] @ q[b, token(a, r, j), h] / math.sqrt(3)
                    weights = torch.softmax(inner, dim=0)
                    entropy = (weights * weights.log()).sum()
                    logits.append(q[b, t, h] @ (weights @ k[b, line, h]) / math.sqrt(3) - entropy)
                    values.append(weights @ v[b, line, h])
            return torch.softmax(torch.stack(logits), dim=0) @ torch.stack(values)

        return rows_of(row, 2, q.shape[1], 2)

    options = {"rows": rows, "columns": columns}
    return Example(qkv(source, rows * columns * tiles, 2, 2), expected, options)


def core(source: torch.Generator) -> Example:
    group, window = 3, 4

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def row(b: int, t: int, h: int) -> Tensor:
            kv = h // 2
            keys, values = [], []
            cores = max(0, (t + 1 - window) // group)
            for n in range(cores):
                own = slice(n * group, (n + 1) * group)
                s = k[b, own, kv] @ q[b, (n + 1) * group - 1, h] / math.sqrt(3)
                weights = torch.softmax(s, dim=0)
                keys.append(weights @ k[b, own, kv])
                values.append(weights @ v[b, own, kv])
            keys += list(k[b, cores * group : t + 1, kv])
            values += list(v[b, cores * group : t + 1, kv])
            return softmax_row(q[b, t, h], torch.stack(keys), torch.stack(values))

        return rows_of(row, 2, q.shape[1], 4)

    return Example(qkv(source, 17, 4, 2), expected, {"group": group, "window": window})


def nosa(source: torch.Generator) -> Example:
    block, window, stride, length, budget, by_query = 4, 4, 2, 21, 4, 3

    def listed(q: Tensor, k: Tensor, c: Tensor, b: int, t: int, kv: int) -> set[int]:
        own = t // block
        starts = [w for w in range(0, length - window + 1, stride) if w + window - 1 <= t]
        weight = dict.fromkeys(starts, 0.0)
        for h in (2 * kv, 2 * kv + 1):
            s = [float(q[b, t, h] @ k[b, w : w + window, kv].mean(0)) / 3**0.5 for w in starts]
            total = sum(math.exp(x) for x in s)
            for w, x in zip(starts, s, strict=True):
                weight[w] += math.exp(x) / total
        of_c = {w: float(c[b, w : w + window, kv].mean()) for w in starts}

        def largest(of: dict[int, float], n: int, missing: float) -> float:
            touching = [of[w] for w in starts if w < (n + 1) * block and w + window > n * block]
            return max(touching, default=missing)

        forced = {0, own} | ({own - 1} if own else set())
        others = [n for n in range(own + 1) if n not in forced]
        others.sort(key=lambda n: (-largest(weight, n, 0.0), n))
        chosen = forced | set(others[: max(0, by_query - len(forced))])
        left = [n for n in range(own + 1) if n not in chosen]
        left.sort(key=lambda n: (-largest(of_c, n, -math.inf), n))
        return chosen | set(left[: budget - by_query])

    def expected(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        def row(b: int, t: int, h: int) -> Tensor:
            blocks = listed(q.detach(), k.detach(), c.detach(), b, t, h // 2)
            keys = [j for j in range(t + 1) if j // block in blocks]
            return softmax_row(
                q[b, t, h], k[b, keys, h // 2], v[b, keys, h // 2], c[b, keys, h // 2]
            )

        return rows_of(row, 2, length, 4)

    options = {
        "block": block, "window": window, "stride": stride, "budget": budget, "by_query": by_query,
    }  # fmt: skip
    return Example((*qkv(source, length, 4, 2), normal(source, 2, length, 2)), expected, options)


def eviction(source: torch.Generator) -> Example:
    window, sinks = 3, 2

    def expected(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
        through = v * (1 + scores - scores.detach())[..., None]

        def row(b: int, t: int, h: int) -> Tensor:
            kv = h // 2
            keys = [
                j
                for j in range(t + 1)
                if j > t - window or j < sinks or float(scores[b, j, kv].detach()) > 0
            ]
            return softmax_row(q[b, t, h], k[b, keys, kv], through[b, keys, kv])

        return rows_of(row, 2, q.shape[1], 4)

    inputs = (*qkv(source, 13, 4, 2), normal(source, 2, 13, 2))
    return Example(inputs, expected, {"window": window, "sink_tokens": sinks})


def projection(u: Tensor, k: int) -> Tensor:
    """clip(u - tau, 0, 1) with sum k: of every split of the sorted scores the one that adds up best."""
    if len(u) <= k:
        return torch.ones_like(u)
    order = torch.sort(u, descending=True).values
    found, least = None, math.inf
    for ones in range(k + 1):
        for last in range(max(ones, k), len(u) + 1):
            inner = order[ones:last]
            if len(inner) == 0:
                tau = order[ones - 1] - 1
            else:
                tau = (inner.sum() - (k - ones)) / len(inner)
            p = (u - tau).clamp(0.0, 1.0)
            off = abs(float(p.detach().sum()) - k)
            if off < least:
                found, least = p, off
    assert found is not None
    return found


def sparsek(source: torch.Generator, gate_on: str) -> Example:
    keys, window, length = 3, 2, 10

    def expected(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        def row(b: int, t: int, h: int) -> Tensor:
            kv = h // 2
            p = projection(u[b, : t + 1, kv], keys)
            p = torch.stack(
                [p[j] if j <= t - window else torch.ones_like(p[j]) for j in range(t + 1)]
            )
            kept = [j for j in range(t + 1) if float(p[j].detach()) > 0]
            gate = p[kept]
            s = k[b, kept, kv] @ q[b, t, h] / math.sqrt(3)
            weights = torch.softmax(s * gate if gate_on != "v" else s, dim=0)
            return (weights * gate if gate_on != "k" else weights) @ v[b, kept, kv]

        return rows_of(row, 2, length, 4)

    inputs = (*qkv(source, length, 4, 2), normal(source, 2, length, 2))
    return Example(inputs, expected, {"keys": keys, "window": window, "gate_on": gate_on})


def polar(source: torch.Generator, causal: bool) -> Example:
    scores = normal(source, 2, 3)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def row(b: int, t: int, h: int) -> Tensor:
            if h // 2 not in best(scores[b].tolist(), 2):
                return torch.zeros(4, dtype=q.dtype) + 0.0 * q.sum()
            stop = t + 1 if causal else q.shape[1]
            return softmax_row(q[b, t, h], k[b, :stop, h // 2], v[b, :stop, h // 2])

        return rows_of(row, 2, q.shape[1], 6)

    def arguments(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return q, k, v, scores.to(q.dtype)

    return Example(qkv(source, 7, 6, 3), expected, {"heads": 2, "causal": causal}, arguments)


SPARSE_LEARNED_DEFINITIONS: dict[str, Makers] = {
    "adasplash": (lambda s: adasplash(s, 1.5), lambda s: adasplash(s, 2.0)),
    "seer_attention_r": (lambda s: seer(s, {"budget": 9}), lambda s: seer(s, {"threshold": 0.3})),
    "pyramid_sparse": (lambda s: pyramid(s, False), lambda s: pyramid(s, True)),
    "sla": tuple((lambda s, r=rest: sla(s, r)) for rest in ("marginal", "complement", "all")),
    "monarch_rt": (monarch,),
    "core_context": (core,),
    "nosa": (nosa,),
    "learnable_token_eviction": (eviction,),
    "sparsek": tuple((lambda s, g=gate: sparsek(s, g)) for gate in ("v", "k", "both")),
    "polar_sparsity": (lambda s: polar(s, True), lambda s: polar(s, False)),
}
