"""The step of autograd around kernels that give their own gradients, with kernels in plain PyTorch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal import _plan
from foveal.engines.tile import hopper, reference
from foveal.engines.tile.parts import Task
from foveal.patterns.base import Extent
from foveal.scores.base import Geometry
from foveal.testing import Sizes, check_attend, qkv
from tests.problems import PATTERNS, SCORES, Grids


class _Part:
    """The sizes that the reference reads of a problem."""

    def __init__(self, task: Task, q: Tensor, k: Tensor) -> None:
        self.extent: Extent = task.extent
        self.q_heads = q.shape[2]
        self.groups = q.shape[2] // k.shape[2]


class _Intervals(fv.Pattern):
    """The pairs of a share as kernels see them: intervals per axis, if it has some."""

    def __init__(self, pattern: fv.Pattern) -> None:
        self.pattern = pattern

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        bounds = self.pattern.bounds(extent)
        if bounds is None:
            return self.pattern.allows(q_pos, k_pos, extent)
        q_index = q_pos - (extent.Lk - extent.Lq)
        seen = torch.ones_like(q_index + k_pos, dtype=torch.bool)
        below = [torch.Size(grid).numel() for grid in (bounds.extent.q_grid, bounds.extent.kv_grid)]
        for axis, (lo, hi) in enumerate(zip(bounds.lower, bounds.upper, strict=True)):
            lengths = bounds.extent.q_grid[axis], bounds.extent.kv_grid[axis]
            below = [count // length for count, length in zip(below, lengths, strict=True)]
            q, k = q_index // below[0] % lengths[0], k_pos // below[1] % lengths[1]
            seen = seen & (k >= lo[q]) & (k < hi[q])
        return seen


def _results(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    pattern = _Intervals(task.pattern)
    geometry = Geometry(pattern, task.extent, len(q), q.shape[2], k.shape[2])
    o, lse = reference.attend(_Part(task, q, k), task.pattern, task.score, geometry, q, k, v)
    return o, lse.transpose(1, 2).contiguous() / 3.0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in place of those of Hopper: the reference on each share, a third of lse as statistic."""

    def forward(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _results(task, q, k, v)

    def backward(
        task: Task,
        tensors: tuple[Tensor, ...],
        do: Tensor,
        dlse: Tensor,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (*tensors[:3], *task.score.parameters)]
            own = task.score.with_parameters(leaves[3:])
            task = Task(
                task.pattern, task.extent, task.q_tokens, task.k_tokens, own, task.geometry, True
            )
            o, statistic = _results(task, *leaves[:3])
        torch.testing.assert_close(o, tensors[3])
        torch.testing.assert_close(statistic, tensors[4], equal_nan=True)
        found = torch.autograd.grad([o, statistic], leaves, [do, 3.0 * dlse], allow_unused=True)
        return tuple(d if n else None for d, n in zip(found, needed, strict=True))

    monkeypatch.setattr(hopper, "refuses", lambda problem, pattern, score: None)
    monkeypatch.setattr(hopper, "LSE_UNIT", 3.0)
    monkeypatch.setattr(hopper, "forward", forward)
    monkeypatch.setattr(hopper, "backward", backward)
    monkeypatch.setattr(_plan, "_STATIC", type(_plan._STATIC)(8))
    monkeypatch.setattr(_plan, "_LISTED", type(_plan._LISTED)(8))


@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=str)
def test_shares_are_gathered_and_put_back(
    pattern: fv.Pattern, grids: Grids, kernels: None, source: torch.Generator
) -> None:
    sizes = Sizes(*grids, batch=2, q_heads=4, kv_heads=2, value_dim=5)
    q, k, v = qkv(sizes, source)
    check_attend(q, k, v, pattern, implementation="hopper")
    check_attend(q, k, v, pattern, return_lse=False, implementation="hopper")
    check_attend(q, k, v, pattern, SCORES["sink"](sizes, pattern, source), implementation="hopper")


def test_folds_what_is_mapped(kernels: None, source: torch.Generator) -> None:
    q, k, v = (torch.randn(3, 2, 6, 6, 2, 4, generator=source) for _ in range(3))
    pattern = fv.Neighborhood((3, 3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fv.attend(q, k, v, pattern, implementation="hopper").square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, 0))(
        q, k[0], v
    )
    for entry in range(3):
        own = [x.clone().requires_grad_() for x in (q[entry], k[0], v[entry])]
        for a, b in zip(got, torch.autograd.grad(loss(*own), own), strict=True):
            torch.testing.assert_close(a[entry], b)


def test_second_derivatives_are_refused_in_a_sentence(
    kernels: None, source: torch.Generator
) -> None:
    x = torch.randn(1, 9, 1, 4, generator=source).requires_grad_()
    o = fv.attend(x, x, x, fv.Sliding(2), implementation="hopper")
    (gradient,) = torch.autograd.grad(o.square().sum(), x, create_graph=True)
    with pytest.raises(fv.errors.RefusedError, match="second derivative"):
        gradient.sum().backward()


def test_a_call_of_a_kind_is_planned_once(
    kernels: None, monkeypatch: pytest.MonkeyPatch, source: torch.Generator
) -> None:
    planned = []
    once = _plan._prepare
    monkeypatch.setattr(_plan, "_prepare", lambda *call: planned.append(call) or once(*call))
    q, k, v = qkv(Sizes((12,), q_heads=2), source)
    cuts = torch.tensor([0, 5, 12])
    for _ in range(3):
        fv.attend(q, k, v, fv.Sliding(3), implementation="hopper")
        fv.attend(q + 1, k, v, fv.Sliding(3), fv.Softmax(), implementation="hopper")
        fv.attend(q, k, v, fv.Causal(), cu_seqlens=cuts.clone(), implementation="hopper")
        fv.attend(q, k, v, score=fv.Softmax(sink=torch.randn(2)), implementation="hopper")
    assert len(planned) == 3
    fv.attend(q, k, v, fv.Sliding(3), fv.Softmax(0.5), implementation="hopper")
    fv.attend(q.double(), k.double(), v.double(), fv.Sliding(3), implementation="hopper")
    assert len(planned) == 5


def test_writes_to_lists_and_cuts_are_seen(kernels: None, source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((32,), q_heads=2), source)
    mask = torch.eye(4, dtype=torch.bool)[None, None]
    lists = fv.Blocks(fv.BlockSelection.from_block_mask(mask, 8, 8))
    cuts = torch.tensor([0, 5, 32])
    for implementation in ("hopper", None, "cpu"):
        for write in (0, 1):
            lists.selection.indices[0, 0, 2, 0] = write
            cuts[1] = 9 + write
            for options in ({"pattern": lists}, {"cu_seqlens": cuts}):
                got = fv.attend(q, k, v, implementation=implementation, **options)
                want = fv.attend(q, k, v, implementation="reference", **options)
                torch.testing.assert_close(got, want)


def test_plans_hold_no_tensor_of_a_call(kernels: None, source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((12,), q_heads=2), source)
    table = torch.randn(2, 23, generator=source)
    watched = [weakref.ref(x) for x in (q, table)]
    fv.attend(q, k, v, fv.Causal(), fv.RelativeBias(table), implementation="hopper")
    del q, table
    gc.collect()
    assert all(ref() is None for ref in watched)
