"""Counts iterations of local linear attention's solves: plain, preconditioned and with a warm start.

python scripts/local_linear_iterations.py           a table; seconds on one thread
python scripts/local_linear_iterations.py causal    means over the rows of a causal sequence; a minute
"""

from __future__ import annotations

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


def main() -> None:
    torch.set_num_threads(1)
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
