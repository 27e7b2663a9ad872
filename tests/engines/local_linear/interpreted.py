"""What a process with Triton's interpreter runs: the Triton edition on the CPU, in tiny tiles."""

from __future__ import annotations

from typing import Any

import torch

import foveal as fv
from foveal.testing.bounds import check_near, error, neighbour
from tests.engines.local_linear.cases import agree as agree_by
from tests.engines.tile.interpreted import ready, start

__all__ = [
    "agree",
    "contained",
    "decoded",
    "decoded_beside_its_keys",
    "first_rows",
    "lists_open_rows",
    "marked",
    "ready",
    "small_gradients",
    "solved_again",
    "spread",
    "start",
]


def agree(name: str, kind: str, dtype: torch.dtype, seed: int) -> None:
    """Raises AssertionError where a case is further off than its precision allows."""
    agree_by(name, kind, dtype, seed, "triton")


def _draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source) for shape in shapes]


def decoded(seed: int, pattern: fv.Pattern, ridge: float | None) -> list[bool]:
    """Whether o and lse of few queries on many keys are as good as float32 allows; without a ridge of
    one query with a given r."""
    queries = 1 if ridge is None else 2
    shapes = (2, queries, 4, 12), (2, 531, 2, 12), (2, 531, 2, 20), (2, queries, 4, 12)
    drawn = _draw(seed, *shapes)

    def result(
        tensors: list[torch.Tensor], dtype: torch.dtype, implementation: str
    ) -> dict[str, torch.Tensor]:
        q, k, v, r = (x.to(dtype) for x in tensors)
        score = fv.Parallax(0.3 * r) if ridge is None else fv.LocalLinear(ridge)
        o, lse = fv.attend(
            q, k + 1, v, pattern, score, return_lse=True, implementation=implementation
        )
        return {"o": o, "lse": lse}

    def errors_at(number: int) -> dict[str, float]:
        source = torch.Generator().manual_seed(number)
        near = [neighbour(x, source) for x in drawn] if number else drawn
        wide = result(near, torch.float64, "reference")
        plain = result(near, torch.float32, "reference")
        return {name: error(x, wide[name]) for name, x in plain.items()}

    exact = result(drawn, torch.float64, "reference")
    verdicts = check_near(result(drawn, torch.float32, "triton"), exact, errors_at)
    return [verdict.ok for verdict in verdicts]


def decoded_beside_its_keys(seed: int) -> bool:
    """Whether o is the mean value where a query is so near its keys that squares of the distance are 0."""
    (v,) = _draw(seed, (1, 300, 1, 8))
    q, k = torch.zeros(1, 1, 1, 8), torch.full((1, 300, 1, 8), 1e-22)
    o = fv.attend(q, k, v, fv.Causal(), fv.LocalLinear(1e-3), implementation="triton")
    return torch.allclose(o[0, 0], v[0].mean(0), rtol=1e-4, atol=1e-5)


def small_gradients(seed: int) -> bool:
    """Whether gradients of an output whose own is tiny are those of a large one, made as small."""
    tensors = _draw(seed, *((1, 21, 1, 8),) * 4)
    found = []
    for size in (1.0, 1e-20):
        q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
        o = fv.attend(q, k, v, fv.Causal(), fv.LocalLinear(0.5), implementation="triton")
        found.append([x / size for x in torch.autograd.grad(o, (q, k, v), size * tensors[3])])
    return all(torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in zip(*found, strict=True))


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: fv.Pattern) -> Any:
    """The launches of the Hopper edition, of which an interpreter runs the portable ones."""
    from foveal._problem import describe
    from foveal.engines.local_linear import hopper, kernels
    from foveal.engines.tile.parts import whole_task
    from foveal.scores.base import Geometry
    from foveal.scores.normal import NormalForm

    problem = describe(q, k, v, True)
    pattern = pattern.simplify(problem.extent)
    geometry = Geometry(pattern, problem.extent, 1, 2, 1)
    task = whole_task(problem, pattern, NormalForm(0.25, None, None, ()), geometry, q.device)
    return hopper._Call(task, kernels.Solver(torch.tensor([2.0, 10.0]), 1e-3, 50), q, k, v)


def marked(seed: int, pattern: fv.Pattern, odd: float) -> bool:
    """Whether o is found anew, and not finite in the rows alone that see it, where a sum was not finite."""
    q, k, v = (x.half() for x in _draw(seed, (1, 70, 2, 16), (1, 70, 1, 16), (1, 70, 1, 16)))
    k[0, 10 + seed % 50, 0, 3] = odd
    call = _call(q, k, v, pattern)
    for x in (call.mean, call.lse, call.x, call.o, call.levels, call.residual, call.direction):
        x.fill_(torch.nan)
    call.reached.ratio.fill_(torch.nan)
    call.reached.count.zero_()
    call.noise.zero_()
    call.marks.copy_(torch.tensor([1, 0], dtype=torch.int32))
    for one in (*call.rest(), call.output()[1]):
        one()
    wide = (x.double() for x in (q, k, v))
    score = fv.LocalLinear(torch.tensor([2.0, 10.0]))
    exact = fv.attend(*wide, pattern, score, implementation="reference")
    if not torch.equal(call.o.isnan(), exact.isnan()):
        return False
    return torch.allclose(call.o.double(), exact, rtol=1e-2, atol=1e-2, equal_nan=True)


def solved_again(seed: int) -> list[bool]:
    """Whether tiles that a mark or a row with too much noise names are solved anew, and no others."""
    from foveal.engines.local_linear import kernels

    q, k = (x.half() for x in _draw(seed, (1, 70, 2, 16), (1, 70, 1, 16)))
    task, solver = (getattr(_call(q, k, k, fv.Causal()), name) for name in ("task", "solver"))
    mean, lse = kernels.moments(task, q, k, k)
    exact, _ = kernels.solve(task, solver, q, k, k, mean, lse)
    noisy = int(torch.randint(70, (), generator=torch.Generator().manual_seed(seed)))
    first = noisy // 32 * 32
    named = torch.zeros(1, 70, 2, dtype=torch.bool)
    named[0, first : first + 32, 1] = True
    found = []
    for marks, expected in (
        ((0, 0), torch.zeros_like(named)),
        ((0, 1), named),
        ((1, 0), torch.ones_like(named)),
    ):
        call = _call(q, k, k, fv.Causal())
        call.mean.copy_(mean)
        call.lse.copy_(lse)
        call.noise.zero_()
        call.marks.copy_(torch.tensor(marks, dtype=torch.int32))
        call.x.fill_(torch.nan)
        call.levels[3].fill_(7.0)
        call.reached.ratio.fill_(0.5)
        call.reached.ratio[0, 1, noisy] = 1.5
        call.reached.count.fill_(3)
        call.rest()[1]()
        again = expected.transpose(1, 2)
        near = torch.allclose(call.x[expected], exact[expected], rtol=1e-2, atol=1e-2)
        found += [
            near,
            bool(call.x[~expected].isnan().all()),
            bool((call.levels[3][again] == 0).all() & (call.levels[3][~again] == 7).all()),
            bool((call.reached.count[again] > 3).all() & (call.reached.count[~again] == 3).all()),
            bool((call.reached.ratio[again] <= 1).all()),
            torch.equal(call.direction[expected], call.x[expected].half()),
        ]
    return found


def spread(seed: int) -> float:
    """How far the spread of keys is from that of a float64 covariance of the same keys, relatively."""
    from foveal.engines.local_linear.prepare import local_linear_spread

    (k,) = _draw(seed, (2, 700, 3, 48))
    k = k * torch.linspace(0.2, 3, 48) + 1
    found = torch.empty(6)
    sizes = {"D": 48, "PAD": 64, "ROWS": 128, "SOME": 512}
    noise, marks = torch.empty(1), torch.ones(2, dtype=torch.int32)
    places = k.stride()[:3], 700, 3, 1400 * 3, 0.5
    local_linear_spread[(6,)](k, noise, marks, found, *places, **sizes)
    some = k[:, torch.arange(512) * 700 // 512].double().transpose(1, 2).flatten(0, 1)
    covariances = torch.stack([torch.cov(x.T, correction=0) for x in some])
    values = torch.linalg.eigvalsh(covariances)
    exact = values.square().mean(1) - values.mean(1).square() * (1 + 48 / 512)
    return float(((found - exact).abs() / exact).max())


def lists_open_rows(seed: int) -> bool:
    """Whether the rows that are open are listed once each, box by box, and counted."""
    from foveal.engines.local_linear.open_rows import UNSOLVED, local_linear_open_rows

    X, Y, R = 19, 13, (8, 4, 1)
    drawn = torch.rand(4, X * Y, generator=torch.Generator().manual_seed(seed))
    reached = torch.where(drawn < 0.4, UNSOLVED.value, drawn)
    rows = torch.full((4, X * Y), -1, dtype=torch.int32)
    counts = torch.empty(4, dtype=torch.int32)
    local_linear_open_rows[(4,)](reached, rows, counts, X, Y, 1, R=R, SLOTS=64)
    x, y = torch.arange(X)[:, None], torch.arange(Y)[None]
    boxes = x // R[0] * -(-Y // R[1]) + y // R[1]
    within = x % R[0] * R[1] + y % R[1]
    order = (boxes * R[0] * R[1] + within).flatten().argsort()
    expected = [order[(drawn[i] < 0.4)[order]] for i in range(4)]
    return all(
        rows[i].tolist() == each.tolist() + [-1] * (X * Y - len(each)) and counts[i] == len(each)
        for i, each in enumerate(expected)
    )


def first_rows(seed: int, ridge: float) -> float:
    """The largest error, relative to o, in 16 bits where rows have fewer keys than dimensions."""
    tensors = _draw(seed, *((1, 18, 1, 16),) * 3)
    q, k, v = (x.half() for x in tensors)
    score = fv.LocalLinear(ridge)
    o = fv.attend(q, k, v, fv.Causal(), score, implementation="triton")
    wide = (x.double() for x in (q, k, v))
    exact = fv.attend(*wide, fv.Causal(), score, implementation="reference")
    return float((o - exact).abs().max() / exact.abs().max())


def contained(seed: int, pattern: fv.Pattern) -> bool:
    """Whether NaN reaches the rows that see it and no others."""
    q, k, v, r = _draw(seed, *((1, 40, 2, 8),) * 4)
    k[0, 25, 0, 1], v[0, 10, 1, 3], q[0, 4, 1, 0] = torch.nan, torch.inf, torch.nan
    for score in (fv.LocalLinear(), fv.Parallax(r)):
        exact = fv.attend(q, k, v, pattern, score, implementation="reference")
        got = fv.attend(q, k, v, pattern, score, implementation="triton")
        if not torch.equal(got.isnan(), exact.isnan()):
            return False
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3, equal_nan=True)
    return True
