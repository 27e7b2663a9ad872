"""One model on one task: trained, judged, and what it took."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.recall.models import LanguageModel
from examples.recall.tasks import HIDDEN, Task


@dataclass(frozen=True)
class Run:
    """A model of one width and number of heads, and how it is trained."""

    task: Task
    model: str
    dim: int
    heads: int
    steps: int
    batch: int
    learning_rate: float = 3e-3
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"task": {"name": self.task.name, **asdict(self.task)}}


def train(run: Run, device: str) -> dict[str, Any]:
    """The record of a run: score, bytes of state, weights, seconds."""
    torch.manual_seed(run.seed)
    source = torch.Generator(device).manual_seed(run.seed)
    model = LanguageModel(run.model, run.task.vocabulary, run.dim, run.heads).to(device)
    trainer = _Trainer(model, device)
    warm_up = max(run.steps // 10, 1)
    began = time.perf_counter()
    for step in range(run.steps):
        share = min((step + 1) / warm_up, max(1 - step / run.steps, 0.02))
        trainer.step(*run.task.batch(run.batch, source), share * run.learning_rate)
    score = _score(model, run, torch.Generator(device).manual_seed(run.seed + 1))
    return run.describe() | {
        "score": score,
        "state_bytes": model.state_bytes(run.task.length),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - began,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


_EAGER = 3
"""Steps before the graph of a step is captured: the first ones compile and fill caches."""


class _Trainer:
    """Steps of a model; on CUDA all but the first are one graph, without work on the host."""

    def __init__(self, model: LanguageModel, device: str) -> None:
        self.model = model
        self.rate = torch.zeros((), device=device)
        on_cuda = device == "cuda"
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=self.rate, weight_decay=0.01, capturable=on_cuda
        )
        self.left = _EAGER if on_cuda else None
        self.stream = torch.cuda.Stream() if on_cuda else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: tuple[Tensor, Tensor] | None = None

    def step(self, tokens: Tensor, targets: Tensor, rate: float) -> None:
        """One step of the optimiser at a learning rate."""
        self.rate.fill_(rate)
        if self.stream is None:
            self._step(tokens, targets)
            return
        if self.left:
            self.left -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._step(tokens, targets)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None or self.batch is None:
            self.batch = (tokens.clone(), targets.clone())
            self.optimiser.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step(*self.batch)
        self.batch[0].copy_(tokens)
        self.batch[1].copy_(targets)
        self.graph.replay()

    def _step(self, tokens: Tensor, targets: Tensor) -> None:
        logits = self.model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=HIDDEN)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()


@torch.no_grad()
def _score(model: LanguageModel, run: Run, source: torch.Generator) -> float:
    """The score on fresh data, the mean over four batches."""
    found = []
    for _ in range(4):
        tokens, targets = run.task.batch(run.batch, source, held_out=True)
        found.append(float(run.task.score(model(tokens), targets)))
    return sum(found) / len(found)
