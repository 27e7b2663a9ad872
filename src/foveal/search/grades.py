"""Numbers that papers on kernel generation report, from what a search or a judge found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SUGGESTIONS = 10
"""Replies that `proficiency` looks at."""


@dataclass(frozen=True)
class Outcome:
    """One candidate: whether it passed every stage, and its speed-up over the reference."""

    correct: bool
    speedup: float = 0.0


def fast(outcomes: Sequence[Outcome], least: float) -> float:
    """fast_p = (1/N) sum 1[correct and speed-up > p]; N counts failures too."""
    return sum(o.correct and o.speedup > least for o in outcomes) / max(len(outcomes), 1)


def typical(outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the speed-ups of correct candidates; 0 where none is."""
    found = sorted(o.speedup for o in outcomes if o.correct)
    if len(found) < 2:
        return (found[0],) * 3 if found else (0.0, 0.0, 0.0)
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, middle, high


def proficiency(outcomes: Sequence[Outcome]) -> float:
    """How well a model writes kernels, by its first ten replies to one request.

    0: none is correct; 1/4: one is; 1/2: several are, and wrong ones among them; 3/4: all are; 1: the first
    is correct and faster than the reference.  Paper: Evaluation of OpenAI Codex for HPC Parallel Programming
    Models Kernel Generation, 2023, arXiv 2306.15121 (whose wording of the grades is not established).
    """
    seen = outcomes[:SUGGESTIONS]
    right = sum(o.correct for o in seen)
    if seen and seen[0].correct and seen[0].speedup > 1:
        return 1.0
    if right == 0:
        return 0.0
    if right == len(seen):
        return 0.75
    return 0.25 if right == 1 else 0.5


def reward(outcome: Outcome, most: float = 4.0) -> float:
    """A reward for training that only a verdict can give: 0 unless correct, else speed-up / (1 + speed-up).

    Speed-ups count up to `most`.  Paper: Fine-Tuning GPT-5 for GPU Kernel Generation, 2026,
    arXiv 2602.11000 (whose formula is not established; this one is ours).
    """
    if not outcome.correct:
        return 0.0
    counted = min(max(outcome.speedup, 0.0), most)
    return counted / (1 + counted)
