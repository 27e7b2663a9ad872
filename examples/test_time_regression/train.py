"""Small models that differ in nothing but how their layers mix tokens, trained on one task with one seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.recall.models import Convolved
from examples.test_time_regression.tasks import InContext, Task, loss_of, score_of
from foveal.layers import (
    CausalAttention,
    GatedDeltaNet,
    HybridStack,
    LightningAttention,
    LocalLinearAttention,
    StateLayer,
)

MIXERS: dict[str, Callable[[int, int], StateLayer]] = {
    "local linear": lambda dim, heads: LocalLinearAttention(
        dim, heads, tolerance=1e-3, implementation="triton" if torch.cuda.is_available() else None
    ),
    "softmax": lambda dim, heads: CausalAttention(dim, heads),
    "linear": lambda dim, heads: LightningAttention(dim, heads),
    "Gated DeltaNet": lambda dim, heads: GatedDeltaNet(
        dim, heads, head_dim=dim // heads, value_dim=dim // heads, largest_write=2.0
    ),
}


@dataclass(frozen=True)
class Run:
    """A model, its sizes, and how it is trained."""

    task: Task
    model: str
    dim: int
    heads: int
    depth: int
    steps: int
    batch: int
    seed: int
    learning_rate: float = 3e-3


class Model(nn.Module):
    """[B, L, outputs] of tokens, by a `HybridStack` of one kind of mixer."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        task, dim = run.task, run.dim
        numbers = isinstance(task, InContext)
        self.embedding = (
            nn.Linear(task.dim + 2, dim) if isinstance(task, InContext)
            else nn.Embedding(task.vocabulary, dim)
        )  # fmt: skip
        mixer = MIXERS[run.model]
        self.stack = HybridStack(dim, [lambda: Convolved(dim, mixer(dim, run.heads))], run.depth)
        self.head = nn.Linear(dim, 1 if numbers else task.vocabulary)  # type: ignore[union-attr]

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.stack(self.embedding(tokens)))
        return out


def train(run: Run, device: str) -> dict[str, Any]:
    """The record of a run."""
    torch.manual_seed(run.seed)
    source = torch.Generator(device).manual_seed(run.seed)
    model = Model(run).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.01)
    warm_up = max(run.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, max(1 - step / run.steps, 0.02))
    )
    began = time.perf_counter()
    for _ in range(run.steps):
        tokens, targets = run.task.batch(run.batch, source)
        loss = loss_of(run.task, model(tokens), targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    fresh = torch.Generator(device).manual_seed(10_000 + run.seed)
    with torch.no_grad():
        found = [_judged(run, model, fresh) for _ in range(4)]
    return {
        "task": run.task.name,
        "measure": run.task.measure,
        "sizes": asdict(run.task),
        "model": run.model,
        "dim": run.dim,
        "heads": run.heads,
        "depth": run.depth,
        "steps": run.steps,
        "batch": run.batch,
        "seed": run.seed,
        "score": sum(found) / len(found),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - began,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def _judged(run: Run, model: Model, source: torch.Generator) -> float:
    tokens, targets = run.task.batch(max(run.batch, 64), source)
    return float(score_of(run.task, model(tokens), targets))
