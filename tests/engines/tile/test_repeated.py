"""Calls of the portable edition only launch, so that they are repeated; nothing is computed here."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal import _plan
from foveal.engines.tile import parts, recorded, replay, triton
from foveal.engines.tile.recorded import KernelRun
from foveal.layers.sphere import area_score
from foveal.testing import Sizes, qkv

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The launches of every call that was repeated; kernels are noted and not run."""
    from foveal.engines.tile import gather

    counts: list[int] = []

    def start(self: Any) -> None:
        waiting, self._waiting = self._waiting, []
        for kernel, grid, arguments, options in waiting:
            self._add(kernel, object(), grid, arguments, options)

    def run(self: replay.Replay, given: list[int]) -> replay.Results:
        counts.append(len(self.launches))
        made = [allocate() for allocate in self.allocations]
        return tuple(None if result is None else result(made) for result in self.results)

    def launched(
        self: KernelRun,
        kind: Any,
        tensors: tuple[Tensor, ...],
        needed: tuple[bool, ...],
        compute: Callable[[], replay.Results],
    ) -> replay.Results:
        return replay.replayed(self.division.replays, kind, tensors, compute)

    monkeypatch.setattr(triton, "refuses", lambda problem, pattern, score: None)
    monkeypatch.setattr(parts, "take", gather.take)
    monkeypatch.setattr(parts, "put", gather.put)
    monkeypatch.setattr(replay._Recorder, "_start", start)
    monkeypatch.setattr(replay.Replay, "run", run)
    monkeypatch.setattr(recorded.KernelRun, "_launched", launched)
    monkeypatch.setattr(_plan, "_STATIC", type(_plan._STATIC)(8))
    monkeypatch.setattr(_plan, "_LISTED", type(_plan._LISTED)(8))
    return counts


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    ("pattern", "areas"), [(fv.Sphere(0.3), True), (fv.Sphere(0.3), False), (fv.Dense(), True)]
)
def test_gradients_are_repeated_as_launches(
    pattern: fv.Pattern,
    areas: bool,
    with_lse: bool,
    repeated: list[int],
    source: torch.Generator,
) -> None:
    q, k, v = qkv(Sizes((12, 24), head_dim=16), source)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    score = area_score((12, 24)) if areas else fv.Softmax()
    call = functools.partial(fv.attend, *leaves, pattern, score, implementation="triton")
    o = call(return_lse=True)[0] if with_lse else call()
    before = len(repeated)
    for _ in range(4):
        torch.autograd.grad(o, leaves, torch.ones_like(o), retain_graph=True)
    assert len(repeated) >= before + 2, "the first call uploads lists, the second is kept"
