"""Plans per head, pages of another layer, named spans, lifetimes, predicted maps, from their equations.

Nothing here uses a selector, a pattern or an engine of foveal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foveal.systems.sparse.heads import Head, Mode
from tests.systems.definitions import Example
from tests.systems.sparse_definitions import best_of, normal, over, products, qkv

Makers = tuple[Callable[[torch.Generator], Example], ...]


def _mmi(source: torch.Generator, boundary: str) -> Example:
    length, columns, distances = 19, 3, 2
    kinds = torch.randint(0, 2, (length,), generator=source)
    kinds[:2] = torch.tensor([0, 1])
    modes = (Mode("vertical_slash", columns, distances), Mode("a_shape", 1, 2), Mode("dense"))
    if boundary == "none":
        # Wider than the forced columns and distances, so that some are chosen.
        heads = tuple(Head("none", (mode,)) for mode in (modes[1], modes[2], modes[1], modes[2]))
    elif boundary == "query":
        heads = (Head("query", (modes[0], modes[1])),) * 4
    else:
        heads = (Head("both", (modes[0], modes[1], modes[2], modes[0])),) * 4

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def keys_of(
            b: int, h: int, t: int, cell: list[int], mode: Mode, rows: list[int]
        ) -> list[int]:
            seen = [j for j in cell if j <= t]
            if mode.kind == "dense":
                return seen
            if mode.kind == "a_shape":
                return sorted({*seen[-mode.second :], *seen[: mode.first]}) if seen else []
            # The forced columns and distances are as many as are kept.
            first = cell[: mode.first]
            near = [seen[len(seen) - 1 - o] for o in range(mode.second) if len(seen) > o]
            return sorted({*near, *(j for j in first if j <= t)})

        def seen(b: int, h: int, t: int) -> list[int]:
            head, a = heads[h], int(kinds[t])
            rows = [i for i in range(length) if int(kinds[i]) == a]
            if head.boundary == "none":
                return keys_of(b, h, t, list(range(length)), head.modes[0], list(range(length)))
            if head.boundary == "query":
                return keys_of(b, h, t, list(range(length)), head.modes[a], rows)
            found: list[int] = []
            for kind in range(2):
                cell = [j for j in range(length) if int(kinds[j]) == kind]
                found += keys_of(b, h, t, cell, head.modes[2 * a + kind], rows)
            return sorted(found)

        return over(q, k, v, seen)

    return Example(qkv(source, length, 4, 2), expected, {"heads": heads}, lambda *x: (*x, kinds))


def _comb(source: torch.Generator) -> Example:
    """One key in every stride before a window: stride and place hold most mass beyond their share."""
    length, most, near, last = 23, 6, 3, 64

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def comb(b: int, h: int) -> tuple[int, int]:
            column = [0.0] * length
            for t in range(max(0, length - last), length):
                for j, p in enumerate(torch.softmax(products(q, k, b, h, t)[: t + 1], 0).tolist()):
                    column[j] += p
            total, found, top = sum(column), (0, 0), -math.inf
            for stride in range(2, most + 1):
                shares = [sum(column[place::stride]) / total for place in range(stride)]
                place = max(range(stride), key=lambda n: (shares[n], -n))
                if shares[place] - 1 / stride > top:
                    found, top = (stride, place), shares[place] - 1 / stride
            return found

        places = {(b, h): comb(b, h) for b in range(2) for h in range(4)}

        def seen(b: int, h: int, t: int) -> list[int]:
            stride, place = places[b, h]
            before = [j for j in range(max(0, t - near + 1)) if j % stride == place]
            return [*before, *range(max(0, t - near + 1), t + 1)]

        return over(q, k, v, seen)

    heads = (Head("none", (Mode("grid", most, near),)),)
    return Example(qkv(source, length, 4, 2), expected, {"heads": heads})


def _delta(source: torch.Generator) -> Example:
    length, page, pages, recent = 26, 4, 4, 2
    shares = torch.rand(2, length, 7, generator=source, dtype=torch.float64)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def seen(b: int, h: int, t: int) -> list[int]:
            own = t // page
            scores = {n: shares[b, t, n].item() for n in range(own + 1)}
            scores |= dict.fromkeys({0, own, max(own - recent + 1, 0)}, math.inf)
            kept = best_of(scores, pages)
            return [j for j in range(t + 1) if j // page in kept]

        return over(q, k, v, seen)

    options = {"page": page, "pages": pages, "recent": recent}
    return Example(qkv(source, length, 4, 2), expected, options, lambda *x: (*x, shares.to(x[0])))


def _delta_finds(source: torch.Generator) -> Example:
    """Without shares the layer's own mass, summed over the heads, decides."""
    length, page, pages = 22, 4, 3

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def kept(b: int, t: int) -> list[int]:
            mass = dict.fromkeys(range(t // page + 1), 0.0)
            for h in range(4):
                for j, p in enumerate(torch.softmax(products(q, k, b, h, t)[: t + 1], 0).tolist()):
                    mass[j // page] += p
            mass |= dict.fromkeys({0, t // page}, math.inf)
            return best_of(mass, pages)

        lists = {(b, t): kept(b, t) for b in range(2) for t in range(length)}
        return over(q, k, v, lambda b, h, t: [j for j in range(t + 1) if j // page in lists[b, t]])

    options = {"page": page, "pages": pages, "recent": 1}
    return Example(qkv(source, length, 4, 2), expected, options)


def _spans(source: torch.Generator) -> Example:
    length, window, sinks = 17, 3, 2
    starts, stops = (torch.randint(0, length, (2, length, 2), generator=source) for _ in range(2))

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def seen(b: int, h: int, t: int) -> list[int]:
            named = [j for n in range(2) for j in range(int(starts[b, t, n]), int(stops[b, t, n]))]
            near = range(max(0, t - window + 1), t + 1)
            return sorted({j for j in (*named, *near, *range(sinks)) if j <= t})

        return over(q, k, v, seen)

    options = {"window": window, "sink_tokens": sinks}
    return Example(qkv(source, length, 4, 2), expected, options, lambda *x: (*x, starts, stops))


def _means(source: torch.Generator) -> Example:
    length, size, stride, block, blocks, local = 29, 4, 2, 4, 4, 2

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = (length - size) // stride + 1
        means = torch.stack([k[:, w * stride : w * stride + size].mean(1) for w in range(count)], 1)

        def weights(b: int, g: int, t: int) -> list[float]:
            seen = [w for w in range(count) if w * stride + size - 1 <= t]
            total = [0.0] * count
            for h in (2 * g, 2 * g + 1):
                for w, p in zip(seen, torch.softmax(products(q, means, b, h, t)[seen], 0).tolist(),
                                strict=True):  # fmt: skip
                    total[w] += p
            return total

        def chosen(b: int, g: int, t: int) -> list[int]:
            p = weights(b, g, t)
            scores = {}
            for j in range(t // block + 1):
                around = range(block // stride * j - 1, block // stride * (j + 1))
                scores[j] = max((p[w] for w in around if 0 <= w < count), default=0.0)
            forced = {0, *range(max(0, t // block - local + 1), t // block + 1)}
            return best_of(scores | dict.fromkeys(forced, math.inf), blocks)

        lists = {
            (b, g, t): chosen(b, g, t) for b in range(2) for g in range(2) for t in range(length)
        }
        return over(
            q, k, v, lambda b, h, t: [j for j in range(t + 1) if j // block in lists[b, h // 2, t]]
        )

    options = {
        "blocks": blocks, "block": block, "local": local, "length": size, "stride": stride,
        "dense_length": 0,
    }  # fmt: skip
    return Example(qkv(source, length, 4, 2), expected, options)


def _nats(source: torch.Generator, heads: int) -> Example:
    length, window = 18, 3
    kinds = torch.randint(0, 3, (2, length, heads), generator=source)
    types = torch.nn.functional.one_hot(kinds, 3)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def lives(b: int, g: int, j: int, t: int) -> bool:
            own = kinds[b, :, g if heads > 1 else 0].tolist()
            following = [i for i in range(j + 1, length) if own[i] == 0]
            ends = length, following[0] if following else length, j + window
            return j <= t <= ends[own[j]]

        return over(q, k, v, lambda b, h, t: [j for j in range(t + 1) if lives(b, h // 2, j, t)])

    options = {"window": window}
    return Example(qkv(source, length, 4, 2), expected, options, lambda *x: (*x, types.to(x[0])))


def _sea(source: torch.Generator, causal: bool) -> Example:
    length, cells, keys = 14, 5, 2
    shares = torch.softmax(normal(source, 2, 4, length, cells), -1)

    def expected(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        rows = []
        for b in range(2):
            for t in range(length):
                n = t + 1 if causal else length
                count = max(1, math.floor(4 * keys * cells / n + 0.5))
                scores = {(h, c): shares[b, h, t, c].item() for h in range(4) for c in range(cells)}
                kept = sorted(scores, key=lambda x: (-scores[x], x))[:count]
                for h in range(4):
                    seen = [j for j in range(n) if (h, j * cells // n) in kept]
                    weights = torch.softmax(products(q, k, b, h, t)[seen], 0)
                    o = alpha[b, t, h] * (weights @ v[b, seen, h // 2])
                    mean = v[b, :n, h // 2].mean(0)
                    if not causal:
                        owner = [j * cells // length for j in range(length)]
                        w = torch.stack([
                            shares[b, h, t, c].to(v) / owner.count(c) for c in owner
                        ])  # fmt: skip
                        mean = (w / w.sum()) @ v[b, :, h // 2]
                    rows.append(beta[b, t, h] * o + (1 - beta[b, t, h]) * mean)
        return torch.stack(rows).view(*q.shape[:3], -1)

    q, k, v = qkv(source, length, 4, 2)
    gates = tuple(torch.rand(2, length, 4, generator=source, dtype=torch.float64) for _ in range(2))
    return Example(
        (q, k, v, *gates), expected, {"keys": keys, "causal": causal},
        lambda q, k, v, alpha, beta: (q, k, v, shares.to(q), alpha, beta),
    )  # fmt: skip


def _lemo(source: torch.Generator, causal: bool) -> Example:
    length, block = 18, 4
    scores = normal(source, 2, 5)
    scores[0, 4] = 9.0

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = [best_of(dict(enumerate(row.tolist())), 3) for row in scores]

        def seen(b: int, h: int, t: int) -> list[int]:
            if t // block not in kept[b]:
                return []
            return [j for j in range(t + 1 if causal else length) if j // block in kept[b]]

        return over(q, k, v, seen)

    options = {"block": block, "keep": 0.5, "causal": causal}
    return Example(qkv(source, length, 4, 2), expected, options, lambda *x: (*x, scores.to(x[0])))


def _shift(source: torch.Generator) -> Example:
    before = normal(source, 2, 11, 5)

    def expected(after: Tensor) -> Tensor:
        rows = []
        for b in range(2):
            moved = [
                float((after[b, i] - before[b, i].to(after)).detach().norm()) for i in range(11)
            ]
            rows.append(after[b, best_of(dict(enumerate(moved)), math.ceil(0.4 * 11))])
        return torch.stack(rows)

    inputs = (normal(source, 2, 11, 5),)
    return Example(inputs, expected, {"keep": 0.4}, lambda after: (before.to(after), after))


SPARSE_MORE_DEFINITIONS: dict[str, Makers] = {
    "infllm_v2": (_means,),
    "mminference": (
        lambda source: _mmi(source, "none"),
        lambda source: _mmi(source, "query"),
        lambda source: _mmi(source, "both"),
        _comb,
    ),
    "delta_token_attention": (_delta, _delta_finds),
    "self_selected_span": (_spans,),
    "sea": (lambda source: _sea(source, True), lambda source: _sea(source, False)),
    "nats": (lambda source: _nats(source, 1), lambda source: _nats(source, 2)),
    "lemo": (lambda source: _lemo(source, True), lambda source: _lemo(source, False)),
    "representation_shift": (_shift,),
}
