"""The systems of `state` written a second time: one token after the other, one head at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import foveal as fv
from foveal import features
from tests.systems.definitions import Example, draw, qkv


def each_head(cell: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """o [B, L, H, Dv] of `cell` on each sequence and head; tensors [B, L, H, ...]."""
    rows = [
        torch.stack([cell(*(x[b, :, h] for x in tensors)) for h in range(tensors[0].shape[2])], 1)
        for b in range(len(tensors[0]))
    ]
    return torch.stack(rows)


def delta_cell(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[-1], v.shape[-1])
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    outputs = []
    for t in range(len(q)):
        key, query = (x[t] / x[t].square().sum().sqrt() for x in (k, q))
        turn = eye - gate[t] * torch.outer(key, key)
        factor = decay[t].exp().expand(len(key))
        state = turn @ torch.diag(factor) @ state + gate[t] * torch.outer(key, v[t])
        outputs.append(query @ state / math.sqrt(len(key)))
    return torch.stack(outputs)


def kda(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (11,))
    decay, gate = -draw(source, 2, 11, 2, 5).abs(), draw(source, 2, 11, 2).sigmoid()
    return Example((q, k, v, decay, gate), lambda *tensors: each_head(delta_cell, *tensors))


def gated_deltanet(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (11,))
    decay, gate = -draw(source, 2, 11, 2).abs(), 2 * draw(source, 2, 11, 2).sigmoid()
    return Example((q, k, v, decay, gate), lambda *tensors: each_head(delta_cell, *tensors))


def lightning(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (9,), heads=8)

    def cell(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        state = q.new_zeros(q.shape[-1], v.shape[-1])
        outputs = []
        for t in range(len(q)):
            state = state * torch.exp(-slope[t]) + torch.outer(k[t], v[t])
            outputs.append(q[t] @ state)
        return torch.stack(outputs)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.tensor([2.0 ** -(h + 1) for h in range(8)], dtype=q.dtype)
        return each_head(cell, q, k, v, slopes.expand(2, 9, 8))

    return Example((q, k, v), expected)


def mlstm(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (9,))

    def cell(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor) -> Tensor:
        memory, normaliser = q.new_zeros(q.shape[-1], v.shape[-1]), torch.zeros_like(q[0])
        outputs = []
        for t in range(len(q)):
            kept, gate = forget[t].sigmoid(), write[t].exp()
            memory = kept * memory + gate * torch.outer(k[t], v[t])
            normaliser = kept * normaliser + gate * k[t]
            query = q[t] / math.sqrt(len(q[t]))
            outputs.append(query @ memory / torch.clamp((query @ normaliser).abs(), min=1))
        return torch.stack(outputs)

    inputs = (q, k, v, draw(source, 2, 9, 2), draw(source, 2, 9, 2))
    return Example(inputs, lambda *tensors: each_head(cell, *tensors))


def based(source: torch.Generator) -> Example:
    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for t in range(len(q)):
            z = k[: t + 1] @ q[t] / math.sqrt(len(q[t]))
            weights = 1 + z + z * z / 2
            outputs.append(weights @ v[: t + 1] / weights.sum())
        return torch.stack(outputs)

    return Example(qkv(source, (9,)), lambda *tensors: each_head(cell, *tensors))


def all_pairs(weights: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """sum_j w_ij v_j / sum_j w_ij of one head; weights [L, L]."""
    weights = weights.tril() if causal else weights
    return (weights @ v) / weights.sum(-1, keepdim=True)


def lightning_blocks(source: torch.Generator) -> Example:
    """All pairs, with a matrix of decays."""
    q, k, v = qkv(source, (9,))

    def cell(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        at = torch.arange(len(q))
        factors = torch.exp(decay[0] * (at[:, None] - at).clamp(min=0)).tril()
        return (q @ k.T * factors) @ v

    decay = -draw(source, 2).abs()
    return Example(
        (q, k, v, decay),
        lambda q, k, v, decay: each_head(cell, q, k, v, decay.expand(2, 9, 2)),
    )


def tfla(source: torch.Generator) -> Example:
    """A sigmoid input gate, with its normaliser."""
    q, k, v = qkv(source, (9,))

    def cell(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor) -> Tensor:
        memory, normaliser = q.new_zeros(q.shape[-1], v.shape[-1]), torch.zeros_like(q[0])
        outputs = []
        for t in range(len(q)):
            kept, gate = forget[t].sigmoid(), write[t].sigmoid()
            memory = kept * memory + gate * torch.outer(k[t], v[t])
            normaliser = kept * normaliser + gate * k[t]
            query = q[t] / math.sqrt(len(q[t]))
            outputs.append(query @ memory / torch.clamp((query @ normaliser).abs(), min=1))
        return torch.stack(outputs)

    inputs = (q, k, v, draw(source, 2, 9, 2), draw(source, 2, 9, 2))
    return Example(
        inputs, lambda *tensors: each_head(cell, *tensors), {"rule": fv.MLSTM("sigmoid")}
    )


def transnormer(causal: bool) -> Callable[[torch.Generator], Example]:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for t in range(q.shape[1]):
            seen = t + 1 if causal else q.shape[1]
            a, b = (torch.where(x > 0, x + 1, torch.exp(x)) for x in (q[:, t], k[:, :seen]))
            rows.append(torch.einsum("bhd,bjhd,bjhe->bhe", a, b, v[:, :seen]))
        o = torch.stack(rows, dim=1)
        return o / torch.sqrt(o.square().flatten(-2).mean(-1) + 1e-6)[..., None, None]

    return lambda source: Example(qkv(source, (9,)), expected, {"causal": causal})


def transnormer_llm(source: torch.Generator) -> Example:
    def expected(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, decay: Tensor) -> Tensor:
        rows = []
        for t in range(q.shape[1]):
            total = torch.zeros_like(v[:, 0])
            for j in range(t + 1):
                turned = q[:, t] * k[:, j] * torch.cos((t - j) * angles)
                weight = torch.exp(decay * (t - j)) * turned.sum(-1)
                total = total + weight[..., None] * v[:, j]
            rows.append(total)
        return torch.stack(rows, dim=1)

    return Example((*qkv(source, (7,)), draw(source, 2, 5), -draw(source, 2).abs()), expected)


def titans(chunk: int) -> Callable[[torch.Generator], Example]:
    def cell(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gate: Tensor, momentum: Tensor
    ) -> Tensor:
        memory = torch.zeros(q.shape[-1], v.shape[-1], dtype=q.dtype)
        surprise, anchor = torch.zeros_like(memory), memory
        outputs = []
        for t in range(len(q)):
            if t % chunk == 0:
                anchor = memory
            query, key = (x[t] / x[t].square().sum().sqrt() for x in (q, k))
            error = anchor.T @ key - v[t]
            gradient = 2 * torch.outer(key, error)
            surprise = momentum[t].exp() * surprise - gate[t] / 2 * gradient
            memory = decay[t].exp() * memory + surprise
            outputs.append(query @ memory)
        return torch.stack(outputs)

    def make(source: torch.Generator) -> Example:
        gates = (
            -draw(source, 2, 11, 2).abs(),
            0.5 * draw(source, 2, 11, 2).sigmoid(),
            -draw(source, 2, 11, 2).abs(),
        )
        return Example(
            (*qkv(source, (11,)), *gates), lambda *x: each_head(cell, *x), {"chunk": chunk}
        )

    return make


def performer(causal: bool) -> Callable[[torch.Generator], Example]:
    def make(source: torch.Generator) -> Example:
        omega = draw(source, 7, 5)

        def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = omega.to(q.dtype)

            def exponents(x: Tensor) -> Tensor:
                y = x / len(x[0]) ** 0.25
                return y @ rows.T - (y * y).sum(-1, keepdim=True) / 2

            a, b = exponents(q), exponents(k)
            a = a - a.detach().amax(-1, keepdim=True)
            b = b if causal else b - b.detach().amax()
            return all_pairs((a.exp() + 0.125) @ (b.exp() + 0.125).T, v, causal)

        options = {"projection": omega, "causal": causal, "epsilon": 0.125}
        return Example(qkv(source, (9,)), lambda *x: each_head(cell, *x), options)

    return make


def cosformer(source: torch.Generator) -> Example:
    # Positive, so that no sum of weights is 0.
    q, k, v = (x.abs() if n < 2 else x for n, x in enumerate(qkv(source, (9,))))

    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.stack([
            torch.stack([
                q[i].relu() @ k[j].relu() * math.cos(math.pi * (i - j) / 24) for j in range(len(k))
            ])
            for i in range(len(q))
        ])  # fmt: skip
        return all_pairs(weights, v, causal=True)

    return Example((q, k, v), lambda *x: each_head(cell, *x), {"limit": 12})


def cottention(norm_at: str, causal: bool = True) -> Callable[[torch.Generator], Example]:
    def cell(q: Tensor, k: Tensor, v: Tensor, power: Tensor) -> Tensor:
        outputs = []
        for t in range(len(q)):
            total = torch.zeros_like(v[0])
            seen = t + 1 if causal else len(k)
            for j in range(seen):
                cosine = q[t] @ k[j] / (q[t] @ q[t] * (k[j] @ k[j])).sqrt()
                count = torch.tensor(seen if norm_at == "query" else j + 1, dtype=q.dtype)
                total = total + cosine * v[j] / count ** power[t].sigmoid()
            outputs.append(total)
        return torch.stack(outputs)

    def make(source: torch.Generator) -> Example:
        return Example(
            (*qkv(source, (7,)), draw(source, 2)),
            lambda q, k, v, power: each_head(cell, q, k, v, power.expand(2, 7, 2)),
            {"norm_at": norm_at, "causal": causal},
        )

    return make


def dijiang(source: torch.Generator) -> Example:
    weights = draw(source, 5)

    def features(x: Tensor) -> Tensor:
        rows = []
        for i in range(5):
            angles = [math.cos(math.pi * i * (2 * j + 1) / 10) for j in range(5)]
            length = math.sqrt((1 if i == 0 else 2) / 5)
            rows.append(
                x @ torch.tensor(angles, dtype=torch.float64).to(x) * length * weights[i].to(x)
            )
        return torch.softmax(torch.stack(rows, dim=-1), dim=-1)

    def cell(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        at = torch.arange(len(q))
        factors = torch.exp(decay[0] * (at[:, None] - at).clamp(min=0)).tril()
        return (features(q) @ features(k).T * factors) @ v

    def expected(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return each_head(cell, q, k, v, decay.expand(2, 9, 2))

    inputs = (*qkv(source, (9,)), -draw(source, 2).abs())
    return Example(inputs, expected, {"weights": weights})


def fastmax(source: torch.Generator) -> Example:
    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
            for x in (q, k)
        )
        z = q @ k.T
        return all_pairs(1 + z + z * z / 2, v, causal=True)

    return Example(qkv(source, (9,)), lambda *x: each_head(cell, *x))


def nala(source: torch.Generator) -> Example:
    grid = (3, 4)
    places = [(x, y) for x in range(3) for y in range(4)]

    def turned(features: Tensor, place: tuple[int, int]) -> Tensor:
        """10 features of one head: planes (i, i + 5) of which even i turn by x, odd i by y."""
        parts = [None] * 10
        for i in range(5):
            angle = place[i % 2] * 10000.0 ** (-(i // 2) / 2.5)
            a, b = features[i], features[i + 5]
            parts[i] = a * math.cos(angle) - b * math.sin(angle)
            parts[i + 5] = a * math.sin(angle) + b * math.cos(angle)
        return torch.stack(parts)  # type: ignore[arg-type]

    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b = [], []
        for row in q:
            size = row.square().sum().sqrt()
            power = 3 * (0.5 + size.tanh())
            unit = row / size
            signs = torch.cat([unit, -unit])
            a.append(torch.where(signs > 0, signs.abs() ** power, 0.0))
        for row in k:
            b.append(torch.cat([row, -row]).clamp(min=0) ** 3)
        outputs = []
        for i, p in enumerate(places):
            above = sum((turned(a[i], p) @ turned(b[j], at)) * v[j] for j, at in enumerate(places))
            outputs.append(above / sum(a[i] @ b[j] for j in range(12)))
        return torch.stack(outputs)  # type: ignore[arg-type]

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return each_head(cell, *(x.flatten(1, 2) for x in (q, k, v))).unflatten(1, grid)

    return Example(qkv(source, grid), expected)


def l2vit(source: torch.Generator) -> Example:
    def cell(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        weights = q.relu() @ k.relu().T
        return temperature[:, None] * (weights @ v) / weights.sum(-1, keepdim=True).clamp(min=3)

    inputs = (*qkv(source, (9,)), draw(source, 2).abs())
    return Example(
        inputs, lambda q, k, v, t: each_head(cell, q, k, v, t.expand(2, 9, 2)), {"floor": 3.0}
    )


class Features:
    """A map with fixed weights, at home in any precision."""

    def __init__(self, source: torch.Generator, rows: int) -> None:
        self.rows = draw(source, rows, 5)

    def positive(self, x: Tensor) -> Tensor:
        y = x / 5**0.25
        exponent = y @ self.rows.to(x).T - (y * y).sum(-1, keepdim=True) / 2
        return exponent.exp() / len(self.rows) ** 0.5

    def softplus(self, x: Tensor) -> Tensor:
        return (1 + (x @ self.rows.to(x).T).exp()).log()


def kernelized(source: torch.Generator) -> Example:
    known = Features(source, 6)

    def feature_map(x: Tensor) -> Tensor:
        learned = features.SpectralFeatures(5, 6, components=1).to(x).requires_grad_(False)
        learned.means.zero_()
        learned.noise.copy_(known.rows)
        y: Tensor = learned(x)
        return y

    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return all_pairs(known.positive(q) @ known.positive(k).T, v)

    options = {"feature_map": feature_map}
    return Example(qkv(source, (9,)), lambda *x: each_head(cell, *x), options)


def ff_kernel(source: torch.Generator) -> Example:
    known = Features(source, 4)

    def feature_map(x: Tensor) -> Tensor:
        net = features.FeedForwardFeatures(5, 4).to(x).requires_grad_(False)
        net.layers[0].weight.copy_(known.rows)
        net.layers[0].bias.zero_()
        y: Tensor = net(x)
        return y

    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return all_pairs(known.softplus(q) @ known.softplus(k).T, v, causal=True)

    options = {"feature_map": feature_map, "causal": True}
    return Example(qkv(source, (9,)), lambda *x: each_head(cell, *x), options)


def nprf(implementation: str) -> Callable[[torch.Generator], Example]:
    def make(source: torch.Generator) -> Example:
        omega = draw(source, 6, 5)

        def phi(x: Tensor) -> Tensor:
            unit = x / x.square().sum(-1, keepdim=True).sqrt()
            return torch.exp(unit @ omega.to(x).T - 0.5) / 6**0.5

        def cell(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            at = torch.arange(8)
            distances = at - at[:, None]
            return all_pairs(phi(q) @ phi(k).T * bias[0][distances + 7].exp(), v)

        def expected(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return each_head(cell, q, k, v, bias.expand(2, 8, 2, 15))

        options = {"projection": omega, "implementation": implementation}
        return Example((*qkv(source, (8,)), draw(source, 2, 15)), expected, options)

    return make


def advisor(source: torch.Generator) -> Example:
    known = Features(source, 6)

    def cell(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensor:
        k, v = torch.cat([k, more_k[0]]), torch.cat([v, more_v[0]])

        # The shifts cancel but for what is added to every feature.
        def lifted(x: Tensor, axes: tuple[int, ...]) -> Tensor:
            y = x / 5**0.25
            exponent = y @ known.rows.to(x).T - (y * y).sum(-1, keepdim=True) / 2
            return (exponent - exponent.detach().amax(axes, keepdim=True)).exp() + 1e-4

        return all_pairs(lifted(q, (1,)) @ lifted(k, (0, 1)).T, v)

    def expected(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensor:
        extra = (x.transpose(0, 1).expand(2, 7, 2, *x.shape[::2]) for x in (more_k, more_v))
        return each_head(cell, q, k, v, *extra)

    inputs = (*qkv(source, (7,)), draw(source, 3, 2, 5), draw(source, 3, 2, 3))
    return Example(inputs, expected, {"projection": known.rows})


def soft(normalised: bool) -> Callable[[torch.Generator], Example]:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None] - b).square().sum(-1) / 2)

    def cell(x: Tensor, v: Tensor) -> Tensor:
        x = x / 5**0.25
        y = torch.stack([x[:4].mean(0), x[4:8].mean(0), x[8:].mean(0)])
        among = kernel(y, y)
        inverse = torch.linalg.inv(among + 0.5 * torch.eye(3, dtype=x.dtype))
        if normalised:
            roots = among.sum(-1).sqrt()
            inverse = inverse / (roots[:, None] * roots)
        return kernel(x, y) @ inverse @ kernel(y, x) @ v

    def make(source: torch.Generator) -> Example:
        q, _, v = qkv(source, (10,))
        options = {"ratio": 4, "ridge": 0.5, "iterations": 40, "normalised": normalised}
        return Example((q, v), lambda *x: each_head(cell, *x), options)

    return make


def set_transformer(source: torch.Generator) -> Example:
    mask = torch.tensor([[True] * 6 + [False], [True] * 3 + [False] + [True] * 3])

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(10)
        weights = scores.exp() * mask[:, None, None]
        o = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
        return q + o

    q, k, v = draw(source, 2, 4, 2, 5), draw(source, 2, 7, 2, 5), draw(source, 2, 7, 2, 5)
    return Example((q, k, v), expected, {"key_mask": mask})


def ponet(source: torch.Generator) -> Example:
    segments = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])

    def cell(q: Tensor, k: Tensor, o: Tensor, segment: Tensor, local: Tensor) -> Tensor:
        scores = k @ q.mean(0) / math.sqrt(5)
        everywhere = scores.softmax(0) @ k
        rows = []
        for t in range(9):
            own = segment[segments == segments[t]].amax(0)
            near = local[max(t - 1, 0) : t + 2].amax(0)
            rows.append((everywhere + own) * o[t] + near)
        return torch.stack(rows)

    inputs = tuple(draw(source, 2, 9, 2, 5) for _ in range(5))
    return Example(inputs, lambda *x: each_head(cell, *x), {"segments": segments})


def rat(length: int, chunk: int) -> Callable[[torch.Generator], Example]:
    def cell(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        keys, values, outputs = [], [], []
        for t in range(len(q)):
            if t % chunk == 0:
                key, value = torch.zeros_like(k[0]), torch.zeros_like(v[0])
            key = gate[t] * key + (1 - gate[t]) * k[t]
            value = gate[t] * value + (1 - gate[t]) * v[t]
            all_k, all_v = torch.stack([*keys, key]), torch.stack([*values, value])
            outputs.append((all_k @ q[t] / math.sqrt(len(q[t]))).softmax(0) @ all_v)
            if t % chunk == chunk - 1:
                keys.append(key)
                values.append(value)
        return torch.stack(outputs)

    def make(source: torch.Generator) -> Example:
        inputs = tuple(draw(source, 2, length, 2, 5) for _ in range(3))
        gate = draw(source, 2, length, 2, 5).sigmoid()
        return Example((*inputs, gate), lambda *x: each_head(cell, *x), {"chunk": chunk})

    return make


def tlinformer(source: torch.Generator) -> Example:
    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, outputs = q @ k.T / math.sqrt(5), []
        for t in range(4, 7):
            outputs.append(scores[t, :7].softmax(0) @ v[:7])
        for t in range(7, 11):
            past = scores[t, :7].softmax(0) @ v[:7]
            outputs.append(past + scores[t, 7 : t + 1].softmax(0) @ v[7 : t + 1])
        return torch.stack(outputs)

    def expected(*inputs: Tensor) -> Tensor:
        return each_head(cell, *inputs)

    return Example(qkv(source, (11,)), expected, {"window": 4, "observed": 3})


def sala_sparse(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (11,))

    def blocks_of(q: Tensor, k: Tensor, rows: range) -> set[int]:
        """The blocks of two keys that the queries `rows` of a head keep: three of those in sight."""
        total = dict.fromkeys(range(rows[-1] // 2 + 1), 0.0)
        for t in rows:
            ends = range(1, t + 1)  # of windows of two keys, one for each step
            scores = [float(q[t] @ (k[e - 1] + k[e]) / 2) / math.sqrt(len(q[t])) for e in ends]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
            found = dict(zip(ends, weights, strict=True))
            for block in total:
                total[block] += max(found.get(2 * block + n, 0.0) for n in (0, 1, 2))
        forced = {0, *range(rows[0] // 2, rows[-1] // 2 + 1)}
        others = sorted(set(total) - forced, key=lambda block: (-total[block], block))
        return forced | set(others[: max(3 - len(forced), 0)])

    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for start in range(0, 11, 3):
            rows = range(start, min(start + 3, 11))
            kept = blocks_of(q.detach(), k.detach(), rows)
            for t in rows:
                seen = [j for j in range(t + 1) if j // 2 in kept]
                weights = torch.softmax(k[seen] @ q[t] / math.sqrt(len(q[t])), 0)
                outputs.append(weights @ v[seen])
        return torch.stack(outputs)

    options = {"block": 2, "tile": 3, "local": 1, "length": 2, "stride": 1, "kept": 3}
    return Example((q, k, v), lambda *x: each_head(cell, *x), {"sparse": True, **options})


STATE_DEFINITIONS: dict[str, tuple[Callable[[torch.Generator], Example], ...]] = {
    "kda": (kda,),
    "gated_deltanet": (gated_deltanet,),
    "lightning_attention": (lightning,),
    "lightning_attention_2": (lightning_blocks,),
    "mlstm": (mlstm,),
    "tfla": (tfla,),
    "transnormer": (transnormer(True), transnormer(False)),
    "transnormer_llm": (transnormer_llm,),
    "titans_memory": (titans(1), titans(4)),
    "sala": (lightning, sala_sparse),
    "based": (based,),
    "performer": (performer(False), performer(True)),
    "cosformer": (cosformer,),
    "cottention": (
        cottention("query"),
        cottention("key"),
        cottention("query", causal=False),
        cottention("key", causal=False),
    ),
    "dijiang": (dijiang,),
    "fastmax": (fastmax,),
    "nala": (nala,),
    "l2vit": (l2vit,),
    "kernelized_transformer": (kernelized,),
    "ff_kernel_attention": (ff_kernel,),
    "nprf_rpe": (nprf("fft"), nprf("pairs")),
    "kernel_attention_advisor": (advisor,),
    "soft": (soft(False), soft(True)),
    "set_transformer": (set_transformer,),
    "ponet": (ponet,),
    "rat": (rat(11, 4), rat(8, 4), rat(5, 8)),
    "tlinformer": (tlinformer,),
}
