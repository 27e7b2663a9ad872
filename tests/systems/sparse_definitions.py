"""The systems of `sparse` written a second time, from their equations, key by key.

Nothing here uses a selector, a pattern or an engine of foveal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foveal.compose import SparseBranches
from foveal.selectors import Clusters
from tests.systems.definitions import Example

Seen = Callable[[int, int, int], list[int]]
"""Keys that query t of head h in sequence b sees."""


def normal(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def qkv(
    source: torch.Generator, length: int, heads: int, kv_heads: int, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(source, batch, length, heads, 4),
        normal(source, batch, length, kv_heads, 4),
        normal(source, batch, length, kv_heads, 3),
    )


def products(q: Tensor, k: Tensor, b: int, h: int, t: int) -> Tensor:
    return k[b, :, h * k.shape[2] // q.shape[2]] @ q[b, t, h] / math.sqrt(q.shape[-1])


def over(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    rows = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                keys = seen(b, h, t)
                weights = torch.softmax(products(q, k, b, h, t)[keys], 0)
                rows.append(weights @ v[b, keys, h * k.shape[2] // q.shape[2]])
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])


def best_of(scores: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(scores, key=lambda n: (-scores[n], n))[:count])


def _native(source: torch.Generator) -> Example:
    size, d, block, best, window = 4, 2, 8, 3, 5
    length = 27

    def expected(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
        count = (length - size) // d + 1
        keys = torch.stack([k[:, w * d : w * d + size].mean(1) for w in range(count)], 1)
        values = torch.stack([v[:, w * d : w * d + size].mean(1) for w in range(count)], 1)
        probabilities = {}
        for b in range(2):
            for t in range(length):
                for h in range(4):
                    seen = [w for w in range(count) if w * d + size - 1 <= t]
                    p = torch.softmax(products(q, keys, b, h, t)[seen], 0)
                    probabilities[b, h, t] = p.tolist()
                    if seen:
                        total[b, t, h] = gates[b, t, h, 0] * (p @ values[b, seen, h // 2])

        def chosen(b: int, h: int, t: int) -> list[int]:
            scores = {}
            for j in range(t // block + 1):
                forced = j == 0 or j > t // block - 2
                score = 0.0
                for own in (h // 2 * 2, h // 2 * 2 + 1):
                    for w, p in enumerate(probabilities[b, own, t]):
                        inside = range(block // d * j - (size // d - 1), block // d * (j + 1))
                        for m in range(block // d):
                            for n in range(size // d):
                                score += p * (inside.start + m + n == w)
                scores[j] = math.inf if forced else score
            blocks = best_of(scores, best)
            return [i for j in blocks for i in range(j * block, (j + 1) * block) if i <= t]

        total = total + gates[..., 1, None] * over(q, k, v, chosen)
        near = over(q, k, v, lambda b, h, t: list(range(max(0, t - window + 1), t + 1)))
        return total + gates[..., 2, None] * near

    gates = torch.rand(2, length, 4, 3, generator=source, dtype=torch.float64)
    branches = SparseBranches(size, d, block, best, window=window)
    return Example((*qkv(source, length, 4, 2), gates), expected, {"branches": branches})


def _minference(source: torch.Generator) -> Example:
    length, last, tile, vertical, slash, sinks, local = 23, 6, 4, 5, 3, 2, 1

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def lists(b: int, h: int) -> tuple[list[int], list[int]]:
            column, offset = dict.fromkeys(range(length), 0.0), dict.fromkeys(range(length), 0.0)
            for t in range(length - last, length):
                p = torch.softmax(products(q, k, b, h, t)[: t + 1], 0).tolist()
                for j, weight in enumerate(p):
                    column[j] += weight
                    offset[t - j] += weight
            column |= dict.fromkeys(range(sinks), math.inf)
            offset |= dict.fromkeys(range(local), math.inf)
            return best_of(column, vertical), best_of(offset, slash)

        found = {(b, h): lists(b, h) for b in range(2) for h in range(4)}

        def seen(b: int, h: int, t: int) -> list[int]:
            columns, offsets = found[b, h]
            m = t // tile * tile
            keys = set(columns)
            runs: list[list[int]] = []
            for o in sorted(offsets, reverse=True):
                start, stop = max(m - o, 0), m - o + tile
                if stop <= 0:
                    continue
                if runs and start <= runs[-1][1]:
                    runs[-1][1] = stop
                else:
                    runs.append([start, stop])
            for start, stop in runs:
                keys |= set(range(start, start + -(-(stop - start) // tile) * tile))
            return sorted(j for j in keys if j <= t)

        return over(q, k, v, seen)

    options = {
        "vertical": vertical, "slash": slash, "queries": last, "sinks": sinks, "local": local,
        "tile": tile,
    }  # fmt: skip
    return Example(qkv(source, length, 4, 2), expected, options)


def _prefix(scores: dict[int, float], mass: float) -> list[int]:
    """The shortest prefix of falling scores that reaches the mass, one at least."""
    total, found, so_far = sum(scores.values()), [], 0.0
    for n in sorted(scores, key=lambda n: (-scores[n], n)):
        if found and so_far >= mass * total:
            break
        found.append(n)
        so_far += scores[n]
    return found


def _xattention(source: torch.Generator) -> Example:
    length, s, block = 22, 2, 4

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def blocks(b: int, h: int, m: int) -> list[int]:
            scores = dict.fromkeys(range(m + 1), 0.0)
            for a in range(m * block // s, min((m + 1) * block, length) // s):
                folded = []
                for c in range(a + 1):
                    parts = (q[b, a * s + s - 1 - i, h] @ k[b, c * s + i, h // 2] for i in range(s))
                    folded.append(sum(parts) / (s * 2.0))
                for c, p in enumerate(torch.softmax(torch.stack(folded), 0).tolist()):
                    scores[c * s // block] += p
            return [*_prefix(scores, 0.6), 0, m]

        found = {
            (b, h, m): blocks(b, h, m)
            for b in range(2)
            for h in range(4)
            for m in range(-(-length // block))
        }
        return over(
            q,
            k,
            v,
            lambda b, h, t: [j for j in range(t + 1) if j // block in found[b, h, t // block]],
        )

    return Example(qkv(source, length, 4, 2), expected, {"mass": 0.6, "stride": s, "block": block})


def _pbs(source: torch.Generator) -> Example:
    length, segment, block, last = 29, 8, 4, 5

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def order(b: int, g: int) -> list[int]:
            mass = [0.0] * length
            for h in (2 * g, 2 * g + 1):
                for t in range(length - last, length):
                    p = torch.softmax(products(q, k, b, h, t)[: t + 1], 0).tolist()
                    for j, weight in enumerate(p):
                        mass[j] += weight
            return sorted(range(length), key=lambda j: (j // segment, -mass[j], j))

        found: dict[tuple[int, int, int], set[int]] = {}
        for b in range(2):
            for h in range(4):
                sorted_keys = order(b, h // 2)
                for m in range(-(-length // block)):
                    tokens = range(m * block, min((m + 1) * block, length))
                    mean = q[b, list(tokens), h].mean(0)
                    before = m * block // segment * segment
                    logits = {}
                    for n in range(before // block):
                        keys = sorted_keys[n * block : (n + 1) * block]
                        logits[n] = (mean @ k[b, keys, h // 2].mean(0)).item() / 2.0
                    shares = {n: math.exp(x) for n, x in logits.items()}
                    kept = set(_prefix(shares, 0.5)) if shares else set()
                    if before:
                        kept.add(sorted_keys.index(0) // block)
                    found[b, h, m] = {
                        j for n in kept for j in sorted_keys[n * block : (n + 1) * block]
                    }

        def seen(b: int, h: int, t: int) -> list[int]:
            own = range(t // segment * segment, t + 1)
            return sorted(found[b, h, t // block] | set(own))

        return over(q, k, v, seen)

    options = {"segment": segment, "block": block, "mass": 0.5, "queries": last}
    return Example(qkv(source, length, 4, 2), expected, options)


def _sale(source: torch.Generator) -> Example:
    length, sink, local, q_block, kv_block, threshold = 25, 2, 3, 4, 2, 0.6

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def whole(x: Tensor) -> tuple[Tensor, Tensor]:
            unit = x.abs().max() / 7
            return torch.round(x / unit), unit

        kept: set[tuple[int, int, int, int]] = set()
        for b in range(2):
            for h in range(4):
                mean_q, mean_k = q[b, :, h].mean(0), k[b, :, h // 2].mean(0)
                for t in range(length):
                    exact = products(q, k, b, h, t)
                    near = [j for j in range(t + 1) if j < sink or j > t - local]
                    level = torch.logsumexp(exact[near], 0)
                    row, row_unit = whole(q[b, t, h] - mean_q)
                    for j in range(t + 1):
                        key, key_unit = whole(k[b, j, h // 2] - mean_k)
                        estimate = (row @ key) * row_unit * key_unit
                        estimate = estimate + mean_q @ (k[b, j, h // 2] - mean_k)
                        estimate = (estimate + q[b, t, h] @ mean_k) / 2.0
                        if j in near or torch.exp(estimate - level).item() > threshold:
                            kept.add((b, h, t // q_block, j // kv_block))
        return over(
            q, k, v,
            lambda b, h, t: [j for j in range(t + 1) if (b, h, t // q_block, j // kv_block) in kept],
        )  # fmt: skip

    options = {
        "threshold": threshold, "sink": sink, "local": local, "q_block": q_block, "kv_block": kv_block,
    }  # fmt: skip
    return Example(qkv(source, length, 4, 2), expected, options)


def _vggt(source: torch.Generator) -> Example:
    frame, special, frames, q_block, kv_block = 7, 2, 3, 4, 3
    length = frame * frames
    patches = [t for t in range(length) if t % frame >= special]

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiles = [patches[n : n + q_block] for n in range(0, len(patches), q_block)]
        blocks = [patches[n : n + kv_block] for n in range(0, len(patches), kv_block)]

        def seen(b: int, h: int, t: int) -> list[int]:
            if t % frame < special:
                return list(range(length))
            tile = next(tokens for tokens in tiles if t in tokens)
            mean = q[b, tile, h].mean(0)
            shares = {
                n: math.exp((mean @ k[b, keys, h // 2].mean(0)).item() / 2.0)
                for n, keys in enumerate(blocks)
            }
            kept = {*_prefix(shares, 0.4), *best_of(shares, math.ceil(0.5 * len(blocks)))}
            tokens = [j for n in kept for j in blocks[n]]
            return sorted([*tokens, *(j for j in range(length) if j % frame < special)])

        return over(q, k, v, seen)

    options = {
        "frame": frame, "special": special, "mass": 0.4, "least": 0.5, "q_block": q_block,
        "kv_block": kv_block,
    }  # fmt: skip
    return Example(qkv(source, length, 4, 2), expected, options)


def _vdit(source: torch.Generator) -> Example:
    frame, frames, width = 5, 3, 1
    length = frame * frames
    modes = ("diagonal", "multi_diagonal", "skip", "stripe", "full")

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def seen(b: int, h: int, t: int) -> list[int]:
            keys = range(length)
            if modes[h] == "diagonal":
                return [j for j in keys if abs(t - j) <= width]
            if modes[h] == "multi_diagonal":
                return [j for j in keys if abs(t % frame - j % frame) <= width]
            if modes[h] == "stripe":
                return [j for j in keys if j % frame < width]
            return list(keys)

        o = over(q, k, v, seen)
        return torch.where(torch.tensor([mode == "skip" for mode in modes])[:, None], 0.0, o)

    options = {"frame": frame, "modes": modes, "width": width}
    return Example(qkv(source, length, 5, 5), expected, options)


def _squeezed(source: torch.Generator) -> Example:
    length, prefix, threshold = 15, 9, 0.08
    labels = torch.randint(0, 3, (2, 2, prefix), generator=source)
    labels[..., :3] = torch.arange(3)
    sizes = torch.stack([(labels == c).sum(-1) for c in range(3)], -1)
    centroids = normal(source, 2, 2, 3, 4)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def seen(b: int, h: int, t: int) -> list[int]:
            g, position = h // 2, t + length - q.shape[1]
            s = torch.exp(centroids[b, g].to(q.dtype) @ q[b, t, h] / 2.0)
            shares = s / (s * sizes[b, g]).sum()
            kept = [j for j in range(prefix) if shares[labels[b, g, j]].item() > threshold]
            return [j for j in [*kept, *range(prefix, length)] if j <= position]

        return over(q, k, v, seen)

    q, k, v = qkv(source, length, 4, 2)
    clusters = Clusters(centroids, labels, sizes)
    return Example((q[:, -5:], k, v), expected, {"threshold": threshold}, lambda *x: (*x, clusters))


def _loki(source: torch.Generator) -> Example:
    basis = torch.linalg.qr(normal(source, 2, 4, 4))[0]

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def seen(b: int, h: int, t: int) -> list[int]:
            low = basis[h // 2][:, :2].to(q.dtype)
            scores = {
                j: ((q[b, t, h] @ low) @ (k[b, j, h // 2] @ low)).item() for j in range(t + 1)
            }
            return best_of(scores, math.ceil(0.3 * (t + 1)))

        return over(q, k, v, seen)

    return Example(
        qkv(source, 14, 4, 2),
        expected,
        {"share": 0.3, "rank_share": 0.5},
        lambda *x: (*x, basis),
    )


def _superlinear(source: torch.Generator) -> Example:
    length, first, count = 26, 1, 2
    window = (first + 1) ** 2 - 1

    def expected(q: Tensor, k: Tensor, v: Tensor, search: Tensor) -> Tensor:
        rows = []
        for b in range(2):
            for t in range(length):
                for h in range(4):
                    own_k, own_v = k[b, :, h // 2], v[b, :, h // 2]
                    s = products(q, k, b, h, t)
                    near = [j for j in range(t + 1) if j > t - window]
                    steps = range(first + 1, length)
                    anchors = [t + 1 - i * i for i in steps if t + 1 - i * i >= 0]
                    logits = {a: (search[b, t, h] @ own_k[a]).item() for a in anchors}
                    best = sorted(logits, key=lambda a: -logits[a])[:count]
                    if not best:
                        rows.append(torch.softmax(s[near], 0) @ own_v[near])
                        continue
                    weights = torch.softmax(own_k[best] @ search[b, t, h], 0)
                    total = torch.zeros_like(own_v[0])
                    for weight, a in zip(weights, best, strict=True):
                        span = range(max(0, a - math.ceil(2.0 * math.sqrt(t + 1))), a + 1)
                        keys = sorted({j for j in span if j <= t - window} | set(near))
                        total = total + weight * (torch.softmax(s[keys], 0) @ own_v[keys])
                    rows.append(total)
        return torch.stack(rows).view(*q.shape[:3], -1)

    return Example(
        (*qkv(source, length, 4, 2), normal(source, 2, length, 4, 4)),
        expected,
        {"anchors": count, "first": first},
    )


def _spatten(source: torch.Generator) -> Example:
    length = 11
    importance = torch.zeros(2, length, dtype=torch.float64)
    importance[0, 3] = importance[1, 6] = -torch.inf

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for b in range(2):
            for t in range(length):
                for h in range(4):
                    keys = [j for j in range(t + 1) if importance[b, j].item() > -math.inf]
                    p = torch.softmax(products(q, k, b, h, t)[keys], 0)
                    best = best_of(dict(enumerate(p.tolist())), math.ceil(0.6 * len(keys)))
                    rows.append(p[best] @ v[b, keys, h // 2][best])
        return torch.stack(rows).view(*q.shape[:3], -1)

    return Example(
        qkv(source, length, 4, 2),
        expected,
        {"value_keep": 0.6},
        lambda *x: (*x, importance.to(x[0].dtype)),
    )


def _spatten_few_bits(source: torch.Generator) -> Example:
    """Keys in 4 bits where a query is sure; values learn through both, keys as if they were whole."""
    length, sure = 9, 0.45

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        unit = k.detach().abs().amax(-1, keepdim=True) / 7
        few = k + (torch.round(k.detach() / unit) * unit - k.detach())
        rows = []
        for b in range(2):
            for t in range(length):
                for h in range(4):
                    quick = torch.softmax(products(q, few, b, h, t)[: t + 1], 0)
                    whole = torch.softmax(products(q, k, b, h, t)[: t + 1], 0)
                    p = quick if float(quick.detach().max()) >= sure else whole
                    rows.append(p @ v[b, : t + 1, h // 2])
        return torch.stack(rows).view(*q.shape[:3], -1)

    return Example(qkv(source, length, 4, 2), expected, {"bits": 4, "sure": sure})


SPARSE_DEFINITIONS: dict[str, tuple[Callable[[torch.Generator], Example], ...]] = {
    "nsa": (_native,),
    "flash_sparse_attention": (_native,),
    "minference": (_minference,),
    "xattention": (_xattention,),
    "pbs_attention": (_pbs,),
    "sale": (_sale,),
    "vggt_block_sparse": (_vggt,),
    "sparse_vdit": (_vdit,),
    "squeezed_attention": (_squeezed,),
    "loki": (_loki,),
    "superlinear": (_superlinear,),
    "spatten": (_spatten, _spatten_few_bits),
}
