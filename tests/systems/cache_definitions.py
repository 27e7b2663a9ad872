"""The systems of `cache` written a second time: one sequence and one head at a time, with all weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foveal.caches.policies import S3Attention
from tests.systems.definitions import Example, draw, qkv

Kept = Callable[..., list[int]]


def weights(q: Tensor, k: Tensor, causal: bool = True) -> Tensor:
    """Softmax weights [G, L, L] of the queries [G, L, D] of one key head [L, D]."""
    scores = q @ k.T / math.sqrt(k.shape[-1])
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    return scores.softmax(-1)


def on_kept(choose: Callable[..., list[list[int]]], causal: bool = True) -> Callable[..., Tensor]:
    """o of the newest query on the tokens that `choose(P, k, v)` lists per key head of a sequence.

    P [Hkv, G, L, L], k and v [Hkv, L, .].
    """

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for qb, kb, vb in zip(*(x.transpose(1, 2) for x in (q, k, v)), strict=True):
            grouped = qb.unflatten(0, (len(kb), -1))
            P = torch.stack([weights(qh, kh, causal) for qh, kh in zip(grouped, kb, strict=True)])
            lists = choose(P.detach(), kb.detach(), vb.detach())
            heads = []
            for qh, kh, vh, kept in zip(grouped, kb, vb, lists, strict=True):
                scores = qh[:, -1] @ kh[kept].T / math.sqrt(kh.shape[-1])
                heads.append(scores.softmax(-1) @ vh[kept])
            rows.append(torch.cat(heads))
        return torch.stack(rows)[:, None]

    return attention


def best(scores: Tensor, count: int, among: list[int]) -> list[int]:
    order = sorted(among, key=lambda j: (-float(scores[j]), -j))
    return sorted(order[: max(count, 0)])


def pooled(scores: Tensor, width: int) -> Tensor:
    half, length = width // 2, len(scores)
    return torch.stack(
        [scores[max(0, j - half) : min(length, j + half + 1)].sum() / width for j in range(length)]
    )


def highest(scores: Tensor, width: int) -> Tensor:
    half = width // 2
    return torch.stack([scores[max(0, j - half) : j + half + 1].max() for j in range(len(scores))])


def _prompt(source: torch.Generator, length: int = 30) -> tuple[Tensor, ...]:
    return qkv(source, (length,), heads=4, kv_heads=2)


def snapkv(source: torch.Generator) -> Example:
    def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        L, lists = k.shape[1], []
        for head in P:
            # The window is no neighbour: the released code pools the votes for the prefix alone.
            votes = pooled(head[:, -4:, : L - 4].sum(1).mean(0), 5)
            window = list(range(L - 4, L))
            lists.append(best(votes, 11 - 4, list(range(L - 4))) + window)
        return lists

    return Example(_prompt(source), on_kept(choose), {"budget": 11, "window": 4})


def fastgen(source: torch.Generator) -> Example:
    """Budgets of 11 per head; a head that no set serves has what the other one leaves of 22."""

    def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        L, lists = k.shape[1], []
        masses = [head.sum(1).mean(0) / head.sum(1).mean(0).sum() for head in P]
        for mass in masses:
            special = {0}
            frequent = special | set(best(mass, 5, list(range(L))))
            local = frequent | set(range(L - 6, L))
            kept = [x for x in (special, frequent, local) if sum(mass[list(x)]) >= 0.5]
            lists.append(sorted(kept[0]) if kept else [])
        sizes = [len(x) for x in lists]
        for mass, kept in zip(masses, lists, strict=True):
            if not kept:
                each = (2 * 11 - sum(sizes)) // sizes.count(0)
                near = list(range(L - each // 2, L))
                middle = best(mass, each - len(near) - 1, list(range(1, L - each // 2)))
                kept += [0, *middle, *near]
        return [sorted({*kept, k.shape[1] - 1}) for kept in lists]

    return Example(_prompt(source), on_kept(choose), {"budget": 11, "recovery": 0.5})


def paged_eviction(source: torch.Generator) -> Example:
    def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        L = k.shape[1]
        ratio = (v.norm(dim=-1) / k.norm(dim=-1)).mean(0)
        kept = best(ratio, 11 - 4, list(range(L - 4))) + list(range(L - 4, L))
        return [kept] * len(k)

    return Example(_prompt(source), on_kept(choose), {"budget": 11, "page_size": 4})


def arkv(source: torch.Generator) -> Example:
    """One layer alone is its own best one: nothing goes to 8 bits."""

    def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        L, lists = k.shape[1], []
        for head in P:
            votes = pooled(head[:, -4:].mean(1).mean(0), 5)
            lists.append(best(votes, 11 - 4, list(range(L - 4))) + list(range(L - 4, L)))
        return lists

    return Example(_prompt(source), on_kept(choose), {"budget": 11, "window": 4})


def task_kv(source: torch.Generator) -> Example:
    """Three heads of 30 tokens, 20 each on average: the nearest keeps 30, the others 15."""

    def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        L, vectors, means = k.shape[1], [], []
        for head, values in zip(P, v, strict=True):
            mean = head[:, -4:].mean(1).mean(0)
            top = best(mean, 6, list(range(L)))
            means.append(mean)
            vectors.append(sum(mean[j] * values[j] for j in top))
        centre = sum(vectors) / len(vectors)
        distance = [float((vector - centre).norm()) for vector in vectors]
        full = min(range(len(P)), key=lambda h: distance[h])
        lists = []
        for h in range(len(P)):
            if h == full:
                lists.append(list(range(L)))
                continue
            always = [0, 1, L - 3, L - 2, L - 1]
            middle = [j for j in range(L) if j not in always]
            lists.append(sorted(always + best(pooled(means[h], 7), 15 - 5, middle)))
        return lists

    options = {"budget": 20, "share": 0.0, "least": 0, "top": 6, "window": 4}
    options |= {"sink_tokens": 2, "recent": 3}
    return Example(qkv(source, (30,), heads=6, kv_heads=3), on_kept(choose), options)


def kv_compose(source: torch.Generator) -> Example:
    def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        L = k.shape[1]
        scores = torch.stack([head[:, -4:].amax(1).mean(0) for head in P])
        scores = scores + scores.mean(0)
        return [[*best(row, 11 - 1, list(range(L - 1))), L - 1] for row in scores]

    return Example(_prompt(source), on_kept(choose), {"budget": 11, "window": 4})


def scale_kv(source: torch.Generator) -> Example:
    """A map of 6 x 6 tokens: observers at rows and columns 0, 2, 3, 5."""
    side = [0, 2, 3, 5]
    rows = [6 * a + b for a in side for b in side]

    def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        L, lists = k.shape[1], []
        others = [j for j in range(L) if j not in rows]
        for head in P:
            votes = highest(head[:, rows].sum(1).mean(0), 5)
            lists.append(sorted(rows + best(votes, 22 - 16, others)))
        return lists

    return Example(_prompt(source, 36), on_kept(choose, causal=False), {"budget": 22})


def a_vl(source: torch.Generator) -> Example:
    """12 of 30 tokens are an image: 3 are its core; of the 18 others 9 stay, 5 of them the newest."""

    def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        L, lists = k.shape[1], []
        last = P[:, :, -1].mean((0, 1))
        core = best(last, 3, list(range(12)))
        for head in P:
            newest = list(range(L - 5, L))
            heavy = best(head.sum(1).mean(0), 9 - 5, list(range(12, L - 5)))
            lists.append(core + heavy + newest)
        return lists

    return Example(_prompt(source), on_kept(choose), {"budget": 0.5, "image": 12})


def mustafar(source: torch.Generator) -> Example:
    q, k, v = (draw(source, 2, 9, heads, 8) for heads in (4, 2, 2))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def pruned(x: Tensor) -> Tensor:
            mask = torch.ones_like(x, dtype=torch.bool)
            for b in range(2):
                for j in range(9 - 3):
                    for h in range(2):
                        row = x[b, j, h].detach().abs()
                        mask[b, j, h, row.argsort()[:5]] = False
            return x * mask

        whole = on_kept(lambda P, k, v: [list(range(9))] * 2)
        return whole(q, pruned(k), pruned(v))

    options = {"budget": 4, "sparsity": 0.7, "recent": 3}
    return Example((q, k, v), attention, options)


def s3_attention(source: torch.Generator) -> Example:
    policy = S3Attention(budget=14, window=4, span=5, sink_tokens=1, recent=3)

    def choose_for(q: Tensor) -> Callable[..., list[list[int]]]:
        rows = iter(q.detach().transpose(1, 2))

        def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
            own = next(rows).unflatten(0, (len(k), -1))
            L, lists = k.shape[1], []
            for queries, keys in zip(own, k, strict=True):
                directions = policy.directions(keys.shape[-1]).to(keys)
                lit: list[set[int]] = []
                for key in keys:
                    strength = (directions @ key).relu()
                    top = strength.argsort(descending=True)[: policy.active].tolist()
                    lit.append({f for f in top if strength[f] > 0})
                asked: dict[int, float] = {}
                for query in queries[:, -policy.window :].flatten(0, 1):
                    strength = (directions @ query).relu()
                    for f in strength.argsort(descending=True)[: policy.active].tolist():
                        asked[f] = asked.get(f, 0.0) + float(strength[f])
                scores = torch.zeros(L, dtype=keys.dtype)
                for t in range(L):
                    for f in lit[t]:
                        places = sum(f in each for each in lit)
                        scores[t] += asked.get(f, 0.0) * math.log1p(L / places)
                scores = pooled(scores, policy.span)
                peak = torch.where(scores >= highest(scores, policy.span), scores, 0.0)
                ranked = highest(peak, policy.span) + 1e-6 * scores
                always = [0, L - 3, L - 2, L - 1]
                others = [t for t in range(L) if t not in always]
                lists.append(sorted(always + best(ranked, 14 - 4, others)))
            return lists

        return choose

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return on_kept(choose_for(q))(q, k, v)

    options = {"budget": 14, "window": 4, "span": 5, "sink_tokens": 1, "recent": 3}
    return Example(_prompt(source), attention, options)


def kv_merger(source: torch.Generator) -> Example:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for qb, kb, vb in zip(*(x.transpose(1, 2) for x in (q, k, v)), strict=True):
            heads = []
            for qh, kh, vh in zip(qb.unflatten(0, (len(kb), -1)), kb, vb, strict=True):
                mass = weights(qh, kh).detach().sum(1).mean(0)
                keys, values = merged(kh, vh, mass)
                scores = qh[:, -1] @ keys.T / math.sqrt(kh.shape[-1])
                heads.append(scores.softmax(-1) @ values)
            rows.append(torch.cat(heads))
        return torch.stack(rows)[:, None]

    return Example(_prompt(source), attention, {"budget": 12})


def merged(k: Tensor, v: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    L = len(k)
    single = set(best(mass, 3, list(range(L)))) | set(range(L - 3, L))
    like = []
    for j in range(L - 1):
        if j not in single and j + 1 not in single:
            cosine = (k[j] @ k[j + 1]) / (k[j].norm() * k[j + 1].norm())
            like.append((-float(cosine.detach()), j))
    joined = {j for _, j in sorted(like)[: L - 12]}
    runs: list[list[int]] = []
    for j in range(L):
        if runs and j - 1 in joined:
            runs[-1].append(j)
        else:
            runs.append([j])
    keys, values, scores = [], [], []
    for run in runs:
        pivot = max(run, key=lambda j: float(mass[j]))
        distance = torch.stack(
            [(k[j] - k[pivot]).norm() if j != pivot else k[j, 0] * 0 for j in run]
        )
        spread = (distance.sum() / max(len(run) - 1, 1)).clamp(min=1e-6)
        g = torch.exp(-(distance**2) / (2 * spread**2))
        w = g / g.sum()
        keys.append(sum(w[i] * k[j] for i, j in enumerate(run)))
        values.append(sum(w[i] * v[j] for i, j in enumerate(run)))
        scores.append(float(mass[pivot]) if L - 1 not in run else math.inf)
    kept = sorted(sorted(range(len(runs)), key=lambda n: -scores[n])[:12])
    return torch.stack([keys[n] for n in kept]), torch.stack([values[n] for n in kept])


def ltri_llm(source: torch.Generator) -> Example:
    def choose_for(q: Tensor) -> Callable[..., list[list[int]]]:
        rows = iter(q.detach().transpose(1, 2))

        def choose(P: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
            queries = next(rows).unflatten(0, (len(k), -1))
            L = k.shape[1]
            triangle = torch.zeros(L, dtype=k.dtype)
            for j in range(L):
                for i in range(j, min(j + 4, L)):
                    triangle[j] += P[:, :, i, j : i + 1].sum(-1).mean((0, 1))
            begins = [0]
            peak = triangle >= highest(triangle, 5)
            last = 0
            for j in range(1, L):
                if bool(peak[j]) and triangle[j] > 0:
                    last = j
                    begins.append(j)
                elif (j - last) % 64 == 0:
                    begins.append(j)
            spans = [list(range(a, b)) for a, b in zip(begins, [*begins[1:], L], strict=True)]
            votes = torch.zeros(len(spans), dtype=k.dtype)
            for own, keys in zip(queries, k, strict=True):
                index = torch.stack([keys[span].mean(0) for span in spans])
                for query in own[:, -4:].mean(1):
                    votes += (index @ query / math.sqrt(keys.shape[-1])).softmax(-1)
            always = {0} | set(range(L - 4, L))
            room = 13 - len(always)
            taken: list[int] = []
            for n in sorted(range(len(spans)), key=lambda n: -float(votes[n])):
                taken += [j for j in spans[n] if j not in always]
            return [sorted([*always, *taken[:room]])] * len(k)

        return choose

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return on_kept(choose_for(q))(q, k, v)

    options = {"budget": 13, "span": 4, "window": 4, "sink_tokens": 1, "recent": 4}
    return Example(_prompt(source), attention, options)


def cca(source: torch.Generator) -> Example:
    L, H, K, D = 7, 4, 2, 3
    inputs = (
        *(draw(source, 2, L, heads, D) for heads in (H, K, K)),
        draw(source, 2, H + K, D),
        draw(source, H + K, D),
        draw(source, 2, H + K, D, D),
        draw(source, H + K, D),
        draw(source, K),
    )

    def attention(
        q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor, M: Tensor, c: Tensor, t: Tensor
    ) -> Tensor:
        rows = []
        for n in range(2):
            z = [torch.cat([q[n, i], k[n, i]]) for i in range(L)]
            blank = torch.zeros_like(z[0])
            z = [blank, blank, *z]
            first = [f[0] * z[i] + f[1] * z[i + 1] + b for i in range(L + 1)]
            queries, keys = [], []
            for i in range(L):
                second = torch.stack(
                    [M[0, h] @ first[i][h] + M[1, h] @ first[i + 1][h] + c[h] for h in range(H + K)]
                )
                mean = torch.stack([(q[n, i, h] + k[n, i, h // 2]) / 2 for h in range(H)])
                qi = second[:H] + mean
                ki = second[H:] + torch.stack([mean[0:2].mean(0), mean[2:4].mean(0)])
                queries.append(math.sqrt(D) * qi / qi.norm(dim=-1, keepdim=True))
                keys.append(t[:, None] * math.sqrt(D) * ki / ki.norm(dim=-1, keepdim=True))
            out = []
            for i in range(L):
                heads = []
                for h in range(H):
                    past = torch.stack([keys[j][h // 2] for j in range(i + 1)])
                    w = (past @ queries[i][h] / math.sqrt(D)).softmax(0)
                    heads.append(w @ v[n, : i + 1, h // 2])
                out.append(torch.stack(heads))
            rows.append(torch.stack(out))
        return torch.stack(rows)

    return Example(inputs, attention)


def _each_row(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Plain attention of heads [B, L, H, D] that all have keys of their own."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def head_embeddings(source: torch.Generator) -> Example:
    inputs = (
        *(draw(source, 2, 7, 1, 3) for _ in range(3)),
        *(draw(source, 4, 3) for _ in range(3)),
    )
    return Example(inputs, lambda q, k, v, a, b, c: _each_row(q + a, k + b, v + c))


def head_factors(source: torch.Generator) -> Example:
    inputs = head_embeddings(source).inputs
    return Example(
        inputs,
        lambda q, k, v, a, b, c: _each_row(q * (1 + a), k * (1 + b), v * (1 + c)),
        {"multiply": True},
    )


def super_attention(source: torch.Generator) -> Example:
    inputs = (draw(source, 2, 7, 2, 3), draw(source, 2, 7, 2, 3), draw(source, 7, 7))

    def attention(q: Tensor, x: Tensor, mixing: Tensor) -> Tensor:
        mixed = [sum(mixing[i, j] * x[:, j] for j in range(i + 1)) for i in range(7)]
        return _each_row(q, x, torch.stack(mixed, 1))

    return Example(inputs, attention)


def flash_svd(source: torch.Generator) -> Example:
    inputs = (
        *(draw(source, 2, 7, 2, 2) for _ in range(3)),
        *(draw(source, 2, 2, 3) for _ in range(3)),
    )

    def attention(*x: Tensor) -> Tensor:
        whole = [
            torch.stack([f[:, :, h] @ m[h] for h in range(2)], 2)
            for f, m in zip(x[:3], x[3:], strict=True)
        ]
        return _each_row(*whole, causal=False)

    return Example(inputs, attention, {"piece": 3})


def attention_editing(source: torch.Generator) -> Example:
    L, heads = 9, ((4, 3), (2, 3), (2, 5), (4, 5))
    inputs = tuple(draw(source, 2, L, count, size) for count, size in heads)

    def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        rows = []
        for i in range(L):
            seen = slice(max(0, i - 3), i + 1)
            each = []
            for h in range(4):
                s = torch.einsum("bd,bjd->bj", q[:, i, h], k[:, seen, h // 2]) / math.sqrt(3)
                o = torch.einsum("bj,bjd->bd", s.softmax(-1), v[:, seen, h // 2])
                each.append(o * (1 + torch.tanh(gate[:, i, h] / 2)))
            rows.append(torch.stack(each, 1))
        return torch.stack(rows, 1)

    return Example(inputs, attention, {"window": 4})


def _on_all(choose: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """o of every query on the keys that choose(q [G, L, D], k [L, D]) marks, bool [G, L, L]."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for qb, kb, vb in zip(*(x.transpose(1, 2) for x in (q, k, v)), strict=True):
            heads = []
            for qh, kh, vh in zip(qb.unflatten(0, (len(kb), -1)), kb, vb, strict=True):
                seen = choose(qh.detach(), kh.detach())
                s = (qh @ kh.T / math.sqrt(kh.shape[-1])).masked_fill(~seen, -torch.inf)
                heads.append(s.softmax(-1) @ vh)
            rows.append(torch.cat(heads).transpose(0, 1))
        return torch.stack(rows)

    return attention


_newest = on_kept(lambda P, k, v: [list(range(k.shape[1]))] * len(k))


def lean_attention(source: torch.Generator) -> Example:
    return Example(_prompt(source), _newest, {"tile": 4, "programs": 7})


def dist_attention(source: torch.Generator) -> Example:
    return Example(_prompt(source), _newest, {"segments": 4})


def vattention(source: torch.Generator) -> Example:
    return Example(_prompt(source), _newest)


def eigen_attention(source: torch.Generator) -> Example:
    """Keys and values in planes: that is where nearly all of their singular values are."""
    q, k, v = _prompt(source)
    planes = [draw(source, 2, x.shape[-1]) for x in (k, v)]

    def spread(q: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        return q, *(y @ plane.to(y.dtype) for y, plane in zip(x, planes, strict=True))

    inputs = q, *(x[..., :2] for x in (k, v))
    return Example(inputs, lambda *x: _newest(*spread(*x)), {"energy": 1 - 1e-12}, spread)


def matryoshka_kv(source: torch.Generator) -> Example:
    q, k, v = _prompt(source)
    bases = [torch.linalg.qr(draw(source, 2, x.shape[-1], 3))[0] for x in (k, v)]

    def attention(*x: Tensor) -> Tensor:
        keys, values = (
            torch.stack([y[:, :, h] @ u[h, :, :2] @ u[h, :, :2].T for h in range(2)], 2)
            for y, u in zip(x[1:3], x[3:], strict=True)
        )
        return _newest(x[0], keys, values)

    return Example((q, k, v, *bases), attention, {"ranks": 2})


def retrieval_attention(source: torch.Generator) -> Example:
    def choose(q: Tensor, k: Tensor) -> Tensor:
        seen = torch.zeros(*q.shape[:2], len(k), dtype=torch.bool)
        for g in range(len(q)):
            for i in range(len(k)):
                near = [j for j in range(i + 1) if j < 2 or i - j < 5]
                far = [j for j in range(i + 1) if j not in near]
                seen[g, i, near + best(k @ q[g, i], 4, far)] = True
        return seen

    return Example(_prompt(source), _on_all(choose), {"keys": 4, "sinks": 2, "window": 5})


def louis_kv(source: torch.Generator) -> Example:
    def choose(q: Tensor, k: Tensor) -> Tensor:
        seen = torch.zeros(*q.shape[:2], len(k), dtype=torch.bool)
        unit, border, there = torch.nn.functional.normalize(q, dim=-1), 0, list[int]()
        for i in range(len(k)):
            if i == 0 or float((unit[:, i] * unit[:, border]).sum(-1).mean()) < 0.1:
                border, old = i, max(i - 6 + 1, 0) // 3
                means = [float(k[3 * p : 3 * p + 3].mean(0) @ q[:, i].sum(0)) for p in range(old)]
                chosen = best(torch.tensor(means), 2, list(range(old)))
                there = [3 * p + n for p in chosen for n in range(3)]
            seen[:, i, there + list(range(3 * old, i + 1))] = True
        return seen

    options = {"alike": 0.1, "pages": 2, "page": 3, "window": 6}
    return Example(_prompt(source), _on_all(choose), options)


def elastic_cache(source: torch.Generator) -> Example:
    shapes = (3, 4), (9, 2), (9, 2), (3, 2), (3, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        rows = [*range(4), *range(7, 9)]
        keys, values = (
            torch.cat([x[:, rows], y], 1) for x, y in zip((k, v), (new_k, new_v), strict=True)
        )
        return torch.cat(
            [_newest(q[:, i : i + 1].expand(-1, 9, -1, -1), keys, values) for i in range(3)], 1
        )

    inputs = tuple(draw(source, 2, length, heads, 8) for length, heads in shapes)
    return Example(inputs, attention, {"start": 4})


CACHE_DEFINITIONS: dict[str, list[Callable[[torch.Generator], Example]]] = {
    "snapkv": [snapkv],
    "fastgen": [fastgen],
    "paged_eviction": [paged_eviction],
    "arkv": [arkv],
    "task_kv": [task_kv],
    "kv_merger": [kv_merger],
    "kv_compose": [kv_compose],
    "scale_kv": [scale_kv],
    "a_vl": [a_vl],
    "mustafar": [mustafar],
    "ltri_llm": [ltri_llm],
    "s3_attention": [s3_attention],
    **{
        make.__name__: [make]
        for make in (
            lean_attention,
            dist_attention,
            vattention,
            eigen_attention,
            matryoshka_kv,
            retrieval_attention,
            louis_kv,
            elastic_cache,
        )
    },
    "cca": [cca],
    "head_embeddings": [head_embeddings, head_factors],
    "super_attention": [super_attention],
    "flash_svd": [flash_svd],
    "attention_editing": [attention_editing],
}
