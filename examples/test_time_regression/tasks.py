"""Tasks to train on: regression in context, recall of pairs, composition of permutations."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.recall.tasks import HIDDEN, Recall

__all__ = ["InContext", "Permutations", "Recall", "Task"]


@dataclass(frozen=True)
class InContext:
    """Points x and values y = f(x) + noise of a function that is another one in every sequence, then f at a
    point alone; f is linear on either side of a plane.

    Each point stands twice: with its value hidden, which is asked for, then with its value.
    """

    dim: int
    points: int
    noise: float = 0.1
    name = "in-context regression"
    measure = "mean squared error of the last quarter, over the variance of the values"

    def batch(self, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens [count, 2 points, dim + 2], targets [count, 2 points], NaN where none is asked for."""
        device = source.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, device=device)

        x = normal(count, self.points, self.dim)
        slopes = normal(count, self.dim, 2) * self.dim**-0.5
        side = x @ normal(count, self.dim, 1) > 0
        y = torch.where(side, x @ slopes[..., :1], x @ slopes[..., 1:])
        told = y + self.noise * normal(*y.shape)
        asking = torch.cat([x, torch.zeros_like(y), torch.ones_like(y)], dim=-1)
        telling = torch.cat([x, told, torch.zeros_like(y)], dim=-1)
        tokens = torch.stack([asking, telling], dim=2).flatten(1, 2)
        targets = torch.stack([y, torch.full_like(y, torch.nan)], dim=2).flatten(1)
        return tokens, targets

    def loss(self, out: Tensor, targets: Tensor) -> Tensor:
        asked = ~targets.isnan()
        found: Tensor = (out[..., 0][asked] - targets[asked]).square().mean()
        return found

    def score(self, out: Tensor, targets: Tensor) -> Tensor:
        """The loss of the last quarter, where most is known; lower is better."""
        late = slice(3 * targets.shape[1] // 4, None)
        return self.loss(out[:, late], targets[:, late]) / targets[~targets.isnan()].var()


@dataclass(frozen=True)
class Permutations:
    """Permutations of `items`; what is the product of all so far?"""

    items: int
    length: int
    name = "permutations"
    measure = "share of products that are right"

    @property
    def vocabulary(self) -> int:
        return len(list(itertools.permutations(range(self.items))))

    def batch(self, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and products by their numbers, int64 [count, length]."""
        every = list(itertools.permutations(range(self.items)))
        number = {each: index for index, each in enumerate(every)}
        table = torch.tensor(
            [[number[tuple(b[a[i]] for i in range(self.items))] for b in every] for a in every],
            device=source.device,
        )
        tokens = torch.randint(
            len(every), (count, self.length), generator=source, device=source.device
        )
        products = [tokens[:, 0]]
        for t in range(1, self.length):
            products.append(table[products[-1], tokens[:, t]])
        return tokens, torch.stack(products, dim=1)


Task = InContext | Recall | Permutations


def loss_of(task: Task, out: Tensor, targets: Tensor) -> Tensor:
    """What training lowers."""
    if isinstance(task, InContext):
        return task.loss(out, targets)
    flat = out.flatten(0, 1), targets.flatten()
    return torch.nn.functional.cross_entropy(*flat, ignore_index=HIDDEN)


def score_of(task: Task, out: Tensor, targets: Tensor) -> Tensor:
    """What the report shows."""
    if isinstance(task, InContext):
        return task.score(out, targets)
    asked = targets != HIDDEN
    right: Tensor = (out.argmax(-1) == targets)[asked].double().mean()
    return right
