"""Counts iterations of local linear attention's solves: plain, preconditioned and with a warm start.

python scripts/local_linear_iterations.py           a table; seconds on one thread
python scripts/local_linear_iterations.py causal    means over the rows of a causal sequence
python scripts/local_linear_iterations.py stops     where rows rest by two rules, and how well; minutes
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

QUERIES, KEYS, TOLERANCE, MOST = 64, 1024, 4e-3, 400
Change = Callable[[Tensor], Tensor]


def counts(dim: int, decay: float, ridge: float, source: torch.Generator) -> dict[str, int]:
    """Iterations of a tile until its slowest row rests; variance of the keys along axis i is i^(-2 decay)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    spread = torch.arange(1, dim + 1).float() ** -decay
    spread = spread / spread.square().mean().sqrt()
    centre = 0.5 * normal(dim) if decay else torch.zeros(dim)
    q, k = (normal(n, dim) * spread + centre for n in (QUERIES, KEYS))
    p = (q @ k.T * dim**-0.5).softmax(-1)
    mean = p @ k
    b = mean - q
    variance = p @ (k * k) - mean * mean
    centred = k - k.mean(0)
    shared = torch.linalg.inv(centred.T @ centred / KEYS + ridge * torch.eye(dim))

    def product(x: Tensor) -> Tensor:
        along = (p * (x @ k.T)) @ k
        return along - mean * (mean * x).sum(-1, keepdim=True) + ridge * x

    limit = TOLERANCE * b.norm(dim=-1, keepdim=True).clamp(max=2 * ridge**0.5)

    def run(change: Change, start: Tensor | None = None) -> int:
        x = torch.zeros_like(b) if start is None else start
        residual = b - product(x) if start is not None else b.clone()
        direction, count = change(residual), int(start is not None)
        while count < MOST:
            active = residual.norm(dim=-1, keepdim=True) > limit
            if not bool(active.any()):
                break
            image = product(direction)
            energy = (direction * image).sum(-1, keepdim=True)
            step = (residual * direction).sum(-1, keepdim=True) / energy
            residual = residual - torch.where(active, step, 0.0) * image
            changed = change(residual)
            direction = changed - (changed * image).sum(-1, keepdim=True) / energy * direction
            count += 1
        return count

    return {
        "plain": run(lambda x: x),
        "by the variances of the row": run(lambda x: x / (variance + ridge)),
        "by the covariance of all keys": run(lambda x: x @ shared),
        "plain, from b / (ridge + mean variance)": run(
            lambda x: x, b / (ridge + variance.mean(-1, keepdim=True))
        ),
    }


def plain(dim: int, keys: int, ridge: float) -> Tensor:
    """Iterations of each of a tile of queries on so many random keys, without anything that saves some."""
    source = torch.Generator().manual_seed(keys)
    q, k = (torch.randn(n, dim, generator=source) for n in (QUERIES, keys))
    p = (q @ k.T * dim**-0.5).softmax(-1)
    mean = p @ k
    residual = mean - q
    size = residual.square().sum(-1)
    limit = size.clamp(max=4 * ridge) * 2.0**-16
    direction, count = residual, torch.zeros(QUERIES)
    while bool((active := size > limit).any()):
        image = (p * (direction @ k.T)) @ k - mean * (mean * direction).sum(-1, keepdim=True)
        image += ridge * direction
        step = size / (direction * image).sum(-1)
        residual = residual - torch.where(active, step, 0.0)[:, None] * image
        before, size = size, residual.square().sum(-1)
        direction = residual + (size / before)[:, None] * direction
        count += active
    return count


def causal() -> None:
    """Mean iterations by length: of rows, and of the slowest of each tile."""
    lengths = [2**n for n in range(3, 16)]
    for dim in (64, 128):
        found = [plain(dim, keys, 10.0) for keys in lengths]
        for name, each in (
            ("rows", [x.mean() for x in found]),
            ("tiles", [x.max() for x in found]),
        ):
            sums = torch.tensor(each)
            # Rows between two lengths take the mean of both.
            parts = torch.cat(
                [sums[:1] * 8, (sums[1:] + sums[:-1]) / 2 * torch.tensor(lengths[:-1])]
            )
            means = parts.cumsum(0) / torch.tensor(lengths)
            shown = ", ".join(f"{n}: {float(x):.2f}" for n, x in zip(lengths, means, strict=True))
            print(f"D{dim} ridge 10, {name}: {shown}", flush=True)


def structured(kind: str, dim: int, keys: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries and keys, float64 of rounded numbers: of one kind of structure that keys may have."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    q, k = normal(QUERIES, dim), normal(keys, dim)
    if kind.startswith("long axes"):  # of the keys, which queries hardly see
        k[:, :4] *= 6
        q[:, :4] *= 0.02
        k += normal(dim) * kind.endswith("shifted")
    elif kind == "decaying axes":
        spread = torch.arange(1, dim + 1).float() ** -0.5
        spread = spread / spread.square().mean().sqrt()
        q, k = q * spread, k * spread + 0.5 * normal(dim)
    elif kind == "smooth":
        waves = torch.arange(1, 9)
        phases = torch.arange(keys)[:, None] / keys * 6 * waves + waves - 1
        k = phases.sin() @ normal(8, dim) / 2 + 0.3 * k
        q = k[-QUERIES:] + 0.3 * q
    elif kind == "clusters":
        k = 2 * normal(8, dim)[torch.randint(8, (keys,), generator=source)] + 0.5 * k
    return q.bfloat16().double(), k.bfloat16().double()


def stops(kind: str, dim: int, ridge: float, keys: int, by_gain: bool) -> tuple[float, Tensor]:
    """Mean passes, and residuals at rest over the tolerance, of the solve of the Hopper kernels in float64.

    by_gain: a last step without a product is taken to leave a tenth, or twice the share that the step before
    left if that is more; else what the spread of eigenvalues allows that its direction or all keys show.
    """
    q, k = structured(kind, dim, keys, torch.Generator().manual_seed(keys + dim))
    p = (q @ k.T * dim**-0.5).softmax(-1)
    mean = p @ k
    some = k[torch.arange(512) * keys // 512]
    covariance = torch.cov(some.T, correction=0)
    average = covariance.diagonal().mean()
    round_part = average.square() * (1 + dim / min(keys, 512))
    spread = (covariance.square().sum() / dim - round_part).clamp(min=0)

    def product(x: Tensor) -> Tensor:
        return (p * (x @ k.T - dot(x, mean)[:, None])) @ k + ridge * x

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(-1)

    b = mean - q
    before = dot(b, b)
    limit = before.clamp(max=4 * ridge) * 2.0**-16
    direction, residual, x = q, b, torch.zeros_like(b)
    rest, passes, open_rows = torch.zeros_like(b), torch.zeros(QUERIES), before > -1
    for count in range(200):
        image = product(direction)
        energy, length = dot(direction, image), dot(direction, direction)
        step = torch.where(before > limit, dot(residual, direction) / energy, 0.0)
        x, residual = x + step[:, None] * direction, residual - step[:, None] * image
        size, rate = dot(residual, residual), energy / length
        following = residual - (dot(residual, image) / energy)[:, None] * direction
        if by_gain:
            left = (4 * size / before).clamp(min=0.01)
        else:
            seen = dot(image, image) / length - rate * rate
            left = torch.maximum(3 * torch.maximum(seen, spread) / rate**2, size / before)
        steps = left < 0.0625
        short = (size <= limit) | (steps & (size * left <= limit))
        taken = steps if by_gain else steps & ((size > limit) | (left < 0.01))
        last = dot(residual, following) / (rate * dot(following, following).clamp(min=1e-300))
        now = open_rows & short
        rest[now] = (x + torch.where(taken, last, 0.0)[:, None] * following)[now]
        passes[now] = count
        open_rows &= ~short
        if not bool(open_rows.any()):
            break
        # Behind the step along q conjugate gradients start anew.
        before, direction = size, following if count else residual
    return float(passes.mean()), (b - product(rest)).norm(dim=-1) / limit.sqrt()


def compare_stops() -> None:
    """Both rules on every kind of keys."""
    kinds = ("random", "long axes", "long axes, shifted", "decaying axes", "smooth", "clusters")
    for kind in kinds:
        for dim, ridge, keys in itertools.product((64, 128), (10.0, 1.0), (512, 4096, 16384)):
            shown = []
            for by_gain in (True, False):
                mean, ratio = stops(kind, dim, ridge, keys, by_gain)
                above = f"{float((ratio > 1.02).double().mean()):.0%} of rows above the tolerance"
                name = "by gain" if by_gain else "by spread"
                shown.append(
                    f"{name} {mean:.2f} passes, {above}, at most {float(ratio.max()):.1f}x"
                )
            print(f"{kind}, D{dim}, ridge {ridge:g}, {keys} keys: {'; '.join(shown)}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["stops"]:
        compare_stops()
        return
    if sys.argv[1:] == ["causal"]:
        causal()
        return
    for dim in (64, 128):
        for decay in (0.0, 0.5, 1.0):
            for ridge in (10.0, 1.0, 0.1):
                source = torch.Generator().manual_seed(0)
                found = counts(dim, decay, ridge, source)
                shown = ", ".join(f"{name} {count}" for name, count in found.items())
                print(f"D{dim} decay {decay} ridge {ridge}: {shown}", flush=True)


if __name__ == "__main__":
    main()
