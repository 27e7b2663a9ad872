"""Random problems of pattern x score x dtype x head_dim x length, gradients included, against float64.

Problems come in families that share their kernels: compilation would take most of the time otherwise.
Where repeatable results are promised, a second run must give the same bits: always in the portable edition,
in others while PyTorch's deterministic algorithms are on, as they are in every second family.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import foveal as fv
from foveal._errors import RefusedError
from foveal.patterns.base import Extent, Pattern
from foveal.scores.base import Composed, Score
from foveal.testing.agreement import Agreement
from foveal.testing.inputs import LAYOUTS, Layout, Sizes, packed_lengths, qkv
from foveal.tuning import tile as tuning

Writer = Callable[[dict[str, object]], None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILY = 40
"""Problems of a family."""
_SMALL = tuning.Config(32, 32, 2, 1)
_FATAL = ("CUDA error", "illegal memory", "misaligned", "device-side assert", "unspecified launch")


@dataclasses.dataclass(frozen=True)
class Case:
    sizes: Sizes
    pattern: Pattern
    score: Score
    dtype: torch.dtype
    layout: Layout
    cu_seqlens: torch.Tensor | None
    kind: str
    scored: str

    def labels(self) -> dict[str, object]:
        """What problems are counted by."""
        return {
            "pattern": self.kind if self.cu_seqlens is None else f"{self.kind}, documents",
            "score": self.scored,
            "dtype": str(self.dtype).removeprefix("torch."),
            "head_dim": self.sizes.head_dim,
            "value_dim": self.sizes.value_dim or self.sizes.head_dim,
        }

    def __str__(self) -> str:
        packed = "" if self.cu_seqlens is None else f" cu{self.cu_seqlens.tolist()}"
        return f"{self.pattern.key}{packed} | {self.score.key} | {self.sizes} | {self.dtype} | {self.layout}"


def run(
    implementations: list[str],
    numbers: range,
    seconds: float,
    done: set[tuple[int, str]],
    write: Writer,
    sizes: str,
) -> int:
    """The problems of these families, but for those done; 3 when the device stops answering.

    sizes: of tiles, "shipped", "small" (their kernels compile in half the time) or "both": small ones in
    three of four families.
    """
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    for number in numbers:
        small = sizes == "small" or (sizes == "both" and number % 4 > 0)
        for member, case in enumerate(family(number), start=number * FAMILY):
            for implementation in implementations:
                if (member, implementation) in done:
                    continue
                if time.monotonic() > end:
                    return 0
                write({"begin": member, "implementation": implementation, "case": str(case)})
                with contextlib.ExitStack() as stack:
                    if small:
                        stack.enter_context(_small_tiles())
                    if number % 2:
                        stack.enter_context(_repeatable())
                    record = _record(case, implementation, member)
                write({"number": member, "implementation": implementation, **record})
                if any(sign in str(record["error"]) for sign in _FATAL):
                    return 3
    return 0


@contextlib.contextmanager
def _small_tiles() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for stage in (tuning.FORWARD, tuning.BACKWARD_Q, tuning.BACKWARD_KV):
            stack.enter_context(tuning.forced(stage, _SMALL))
        yield


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """PyTorch is asked for results that repeat, and fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


def _record(case: Case, implementation: str, number: int) -> dict[str, object]:
    began = time.monotonic()
    record: dict[str, object] = {"ok": True, **case.labels(), "case": str(case), "error": None}
    try:
        record |= _judge(case, implementation, number)
    except RefusedError as refusal:
        record["refused"] = refusal.reason
    except Exception as error:
        record |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    return record | {"seconds": round(time.monotonic() - began, 2)}


def _judge(case: Case, implementation: str, number: int) -> dict[str, object]:
    source = torch.Generator().manual_seed(number)
    q, k, v = qkv(case.sizes, source, case.dtype, case.layout)
    problem = Agreement(q, k, v, case.pattern, case.score, case.cu_seqlens)
    moved = (_moved(x, DEVICE) for x in (q, k, v))
    there = Agreement(*moved, case.pattern, _score_on(case.score, DEVICE), case.cu_seqlens)
    found = there.results(implementation)
    promised = implementation != "hopper" or torch.are_deterministic_algorithms_enabled()
    again = there.results(implementation) if promised else found
    verdicts = problem.verdicts({name: x.cpu() for name, x in found.items()})
    bad = [str(verdict) for verdict in verdicts if not verdict.ok]
    if not all(torch.equal(found[n].nan_to_num(), again[n].nan_to_num()) for n in found):
        bad.append("two runs differ")
    worst = max(v.error / v.allowed if v.allowed else float(v.error > 0) for v in verdicts)
    return {"ok": not bad, "worst": round(worst, 4), "error": "; ".join(bad) or None}


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """x on the device with the strides that it has here."""
    size = 1 + sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True) if n)
    if not x.numel():
        return x.to(device)
    return x.as_strided((size,), (1,)).to(device).as_strided(x.shape, x.stride())


def _score_on(score: Score, device: str) -> Score:
    if isinstance(score, Composed):
        return Composed(tuple(_score_on(member, device) for member in score.members))
    if not dataclasses.is_dataclass(score):
        return score
    tensors = {
        field.name: value.to(device)
        for field in dataclasses.fields(score)
        if isinstance(value := getattr(score, field.name), torch.Tensor)
    }
    return dataclasses.replace(score, **tensors)


def family(number: int) -> Iterator[Case]:
    """The problems of a family, the same in every run: what compilers see is drawn once."""
    fixed, free = random.Random(2 * number), random.Random(2 * number + 1)
    kinds = list(_KINDS)
    kind = kinds[number % len(kinds)]
    lists = kind.startswith("lists")
    dtype = fixed.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    dims = (1, 3, 8, 16, 33, 40, 64, 64, 71, 80, 128, 128, 192, 256)
    D = fixed.choice(dims[:10] if dtype == torch.float32 else dims)
    value_dim = fixed.choice((None, None, None, 24, 64, 5))
    kv_heads, groups = (2, 2) if lists else (fixed.choice((1, 2)), fixed.choice((1, 2, 3)))
    layout = fixed.choice(LAYOUTS)
    unit = fixed.choice(((64, 64), (128, 128), (32, 64), (64, 16)))
    shape = _Shape(_lengths(fixed), unit, fixed.choice((1, 2, 4)))
    cross = kind in ("causal", "dense", "sliding") and fixed.random() < 0.4
    packed = kind in ("causal", "dense", "sliding") and not cross and fixed.random() < 0.4
    scores = [name for name in _SCORES if not (packed and name.startswith("table"))]
    score = fixed.choice(scores)
    per_head, per_batch = fixed.random() < 0.5, fixed.random() < 0.5
    batch = fixed.choice((1, 2))
    on_grid = kind.startswith(("grid", "space"))
    if on_grid and score.startswith("distance"):
        score = "key bias"
    for member in range(FAMILY):
        # On grids the tiles follow the pattern: two patterns a family.
        place = random.Random(2 * number + member * 2 // FAMILY) if on_grid else free
        grid, pattern = _KINDS[kind](place, shape)
        kv_grid = (shape.length(free),) if cross else grid
        sizes = Sizes(grid, kv_grid, batch, kv_heads * groups, kv_heads, D, value_dim)
        source = torch.Generator().manual_seed(free.randint(0, 2**30))
        cu_seqlens = packed_lengths(grid[0], 4, source) if packed else None
        made = _SCORES[score](_Drawn(sizes, pattern, source, free, per_head, per_batch))
        yield Case(sizes, pattern, made, dtype, layout, cu_seqlens, kind, score)


Range = tuple[int, int, int]


def _lengths(r: random.Random) -> Range:
    """First, last and step of lengths that are cut into tiles of the same sizes."""
    if r.random() < 0.2:
        return r.choice(((1, 1, 1), (1, 15, 1), (17, 31, 1), (33, 63, 1)))
    return (80, 320, 16) if r.random() < 0.2 else (65, 331, 2)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Sizes that the problems of a family share."""

    lengths: Range
    unit: tuple[int, int]
    lists: int

    def length(self, r: random.Random) -> int:
        first, last, step = self.lengths
        return r.randrange(first, last + 1, step)


Placed = tuple[tuple[int, ...], Pattern]
Kind = Callable[[random.Random, _Shape], Placed]


def _sequence(make: Callable[[random.Random], Pattern]) -> Kind:
    return lambda r, shape: ((shape.length(r),), make(r))


def _plane(make: Callable[[random.Random, int, int], Placed]) -> Kind:
    return lambda r, shape: make(r, r.randint(6, 19), r.randint(6, 21))


def _lists(other: Callable[[random.Random], Pattern] | None, union: bool = False) -> Kind:
    """Lists of blocks, alone or joined with another pattern."""

    def draw(r: random.Random, shape: _Shape) -> Placed:
        unit, L = shape.unit, shape.length(r)
        if union:
            L += -L % unit[1]
        source = torch.Generator().manual_seed(r.randint(0, 2**30))
        lists = torch.rand(
            1, r.choice((1, 2, 4)), -(-L // unit[0]), -(-L // unit[1]), generator=source
        )
        selection = fv.BlockSelection.from_block_mask(lists < r.choice((0.3, 0.6, 0.9)), *unit)
        blocks = fv.Blocks(selection)
        if other is None:
            return (L,), blocks
        return (L,), blocks | other(r) if union else blocks & other(r)

    return draw


def _window(r: random.Random) -> tuple[int, int]:
    return r.randint(2, 6), r.randint(2, 6)


def _neighborhood(r: random.Random, X: int, Y: int, **options: Any) -> Placed:
    return (X, Y), fv.Neighborhood(_window(r), **options)


def _stepped(r: random.Random, X: int, Y: int) -> Placed:
    window = _window(r)
    stride = (r.randint(1, window[0]), r.randint(1, window[1]))
    return (X, Y), fv.Neighborhood(window, stride, causal=(r.random() < 0.3, r.random() < 0.3))


def _space(r: random.Random, shape: _Shape) -> Placed:
    cube = (r.randint(4, 6), r.randint(4, 7), r.randint(4, 8))
    window = tuple(r.randint(1, n) for n in cube)
    causal = tuple(r.random() < 0.3 for _ in cube)
    return cube, fv.Neighborhood(window, causal=causal)


_KINDS: dict[str, Kind] = {
    "causal": _sequence(lambda r: fv.Causal()),
    "dense": _sequence(lambda r: fv.Dense()),
    "sliding": _sequence(lambda r: fv.Sliding(r.randint(0, 90), r.choice((0, 0, 5)))),
    "grid": _plane(_stepped),
    "lists": _lists(None),
    "sink tokens": _sequence(
        lambda r: fv.Sliding(r.randint(0, 90), 0, sink_tokens=r.randint(1, 9))
    ),
    "space": _space,
    "lists and causal": _lists(lambda r: fv.Causal()),
    "grid clipped": _plane(lambda r, X, Y: _neighborhood(r, X, Y, border="clip")),
    "strided": _sequence(lambda r: fv.Strided(r.randint(2, 7))),
    "grid wrapped": _plane(
        lambda r, X, Y: _neighborhood(r, 2 * X, 2 * Y, dilation=2, border="wrap")
    ),
    "union": _sequence(lambda r: fv.Sliding(r.randint(0, 20)) | fv.Strided(r.randint(2, 9))),
    "grid dilated": _plane(lambda r, X, Y: _neighborhood(r, 2 * X, Y, dilation=(2, 1))),
    "lists and sink tokens": _lists(lambda r: fv.Sliding(r.randint(0, 90), 0, sink_tokens=3)),
    "grid windows": _plane(lambda r, X, Y: ((X, Y), fv.Partition((4, 3), shift=(2, 1)))),
    "lists or sink tokens": _lists(
        lambda r: fv.Sliding(r.randint(0, 90), 0, sink_tokens=3), union=True
    ),
    "grid around": _plane(lambda r, X, Y: ((X, Y), fv.Partition((4, 5), before=1, after=2))),
    "grid axis": _plane(lambda r, X, Y: ((X, Y), fv.Axial(0))),
    "grid causal": _plane(lambda r, X, Y: ((X, Y), fv.Causal())),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What scores are drawn from."""

    sizes: Sizes
    pattern: Pattern
    source: torch.Generator
    chance: random.Random
    per_head: bool
    per_batch: bool

    @property
    def kv_grid(self) -> tuple[int, ...]:
        return self.sizes.kv_grid or self.sizes.q_grid

    @property
    def Lq(self) -> int:
        return torch.Size(self.sizes.q_grid).numel()

    @property
    def Lk(self) -> int:
        return torch.Size(self.kv_grid).numel()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.source)

    def slopes(self) -> torch.Tensor:
        return torch.rand(self.sizes.q_heads, generator=self.source)

    def one_of(self, *options: Any) -> Any:
        return self.chance.choice(options)

    def sink(self) -> torch.Tensor:
        return self.normal(self.sizes.q_heads)

    def heads(self) -> int:
        return self.sizes.q_heads if self.per_head else 1

    def batch(self) -> int:
        return self.sizes.batch if self.per_batch else 1

    def table(self) -> fv.Score:
        extent = Extent(self.sizes.q_grid, self.kv_grid)
        reach = self.pattern.reach(extent)
        return fv.RelativeBias(self.normal(self.heads(), *(2 * r + 1 for r in reach)))


_SCORES: dict[str, Callable[[_Drawn], Score]] = {
    "softmax": lambda d: fv.Softmax(),
    "scale": lambda d: fv.Softmax(scale=d.one_of(0.3, 1.0, 0.05)),
    "negative scale": lambda d: fv.Softmax(scale=-0.2),
    "soft cap": lambda d: fv.Softmax(scale=d.one_of(0.3, -0.2, 1.0), soft_cap=d.one_of(5.0, 30.0)),
    "soft cap, sink": lambda d: fv.Softmax(soft_cap=20.0, sink=d.sink()),
    "sink": lambda d: fv.Softmax(sink=d.sink()),
    "key bias": lambda d: fv.KeyBias(d.normal(d.batch(), d.heads(), d.Lk)),
    "bias": lambda d: fv.Bias(d.normal(d.batch(), d.heads(), d.Lq, d.Lk)),
    "biases, soft cap": lambda d: (
        fv.Softmax(soft_cap=10.0)
        + fv.Bias(d.normal(1, 1, 1, d.Lk))
        + fv.Bias(d.normal(1, d.sizes.q_heads, d.Lq, 1))
    ),
    "distance": lambda d: fv.Softmax(soft_cap=15.0) + fv.Alibi(d.slopes()),
    "distance, key bias": lambda d: (
        fv.Alibi(d.slopes()) + fv.KeyBias(d.normal(1, d.sizes.q_heads, d.Lk))
    ),
    "table": lambda d: d.table(),
    "table, soft cap, key bias": lambda d: (
        fv.Softmax(soft_cap=9.0) + d.table() + fv.KeyBias(d.normal(d.sizes.batch, 1, d.Lk))
    ),
}
