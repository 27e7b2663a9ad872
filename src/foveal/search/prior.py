"""What searches of kindred kernels found, as a guess before anything of this one was timed.

The logarithm of the time of a point x is guessed as

    g(x) = mean over kernels j of (posterior mean of a Gaussian process given the logs of j, less their mean),

up to a constant; a search then models what is left, ln t(x) - g(x).  Points of different kernels are compared
by their traits: see `Space.traits`.  Paper: D. Golovin et al., Google Vizier: A Service for Black-Box
Optimization, 2017 (transfer by regression on residuals).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foveal._errors import TaskError
from foveal.search.archive import Archive
from foveal.search.gaussian import Hyper, Posterior
from foveal.search.space import Space

_NOISE = 0.05
_FEWEST = 3


@dataclass(frozen=True)
class Known:
    """One kernel: traits of points that were timed [N][T], and the logarithm of what they took [N]."""

    name: str
    traits: tuple[tuple[float, ...], ...]
    logs: tuple[float, ...]


def guess(known: Sequence[Known], traits: Sequence[Sequence[float]]) -> Tensor:
    """g [P] at points with these traits; 0 where nothing is known."""
    points = torch.tensor(traits, dtype=torch.float64)
    total = torch.zeros(len(points), dtype=torch.float64)
    for each in known:
        x = torch.tensor(each.traits, dtype=torch.float64)
        y = torch.tensor(each.logs, dtype=torch.float64)
        spread = float(y.var(unbiased=False)) + 1e-6
        hyper = Hyper(torch.ones(x.shape[1], dtype=torch.float64), spread, _NOISE * spread, 0.0)
        total += Posterior(x, y - y.mean(), hyper).at(points)[0][:, 0]
    return total / max(len(known), 1)


def of_archive(path: str | Path, space: Space) -> Known:
    """What a search of another task over the same parameters found.

    Raises TaskError where its parameters are others, or fewer than three points were timed.
    """
    with Archive(path, readonly=True) as archive:
        judged = archive.entries(evaluated=True)
    names = {param.name for param in space.params}
    rows, logs = [], []
    for entry in judged:
        if entry.candidate.text is not None or not entry.evaluation or not entry.evaluation.speedup:
            continue
        if set(entry.candidate.params) != names:
            raise TaskError(
                f"{path}: it searched {', '.join(entry.candidate.params) or 'no parameters'}; "
                f"{', '.join(sorted(names))} are needed"
            )
        rows.append(tuple(space.traits(entry.candidate.params)))
        logs.append(-math.log(entry.evaluation.speedup))
    if len(rows) < _FEWEST:
        raise TaskError(f"{path}: got {len(rows)} timed points; at least {_FEWEST} are needed")
    return Known(str(path), tuple(rows), tuple(logs))


def read_known(path: str | Path) -> list[Known]:
    """Kernels from a file of JSON lines {name, traits, logs}."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        rows = tuple(tuple(map(float, row)) for row in entry["traits"])
        found.append(Known(entry["name"], rows, tuple(map(float, entry["logs"]))))
    return found


def write_known(known: Sequence[Known], path: str | Path) -> None:
    """The inverse of `read_known`."""
    lines = [json.dumps({"name": k.name, "traits": k.traits, "logs": k.logs}) for k in known]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
