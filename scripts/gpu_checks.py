"""Cases of pattern x score x dtype x head_dim x odd lengths, each against float64, gradients included."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import foveal as fv
from foveal._errors import RefusedError
from foveal.patterns.base import Pattern
from foveal.scores.base import Composed, Score
from foveal.testing.bounds import check
from foveal.testing.inputs import LAYOUTS, Sizes, qkv

Writer = Callable[[dict[str, object]], None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_FATAL = ("CUDA error", "illegal memory", "misaligned", "device-side assert", "unspecified launch")


@dataclasses.dataclass(frozen=True)
class Case:
    sizes: Sizes
    pattern: Pattern
    score: Score
    dtype: torch.dtype
    layout: Any = "contiguous"
    cu_seqlens: torch.Tensor | None = None

    def __str__(self) -> str:
        packed = "" if self.cu_seqlens is None else f" cu{self.cu_seqlens.tolist()}"
        return f"{self.pattern.key}{packed} | {self.score.key} | {self.sizes} | {self.dtype} | {self.layout}"


def run(
    implementations: list[str], shard: int, shards: int, start: int, seconds: float, write: Writer
) -> int:
    """Every `shards`-th case from `start` or `shard` on; 3 when the device stops answering."""
    torch.set_num_threads(2)
    end = time.monotonic() + seconds
    for number, case in enumerate(cases()):
        if number % shards != shard or number < start:
            continue
        if time.monotonic() > end:
            break
        for implementation in implementations:
            write({"begin": number})
            record = {"number": number, "implementation": implementation, "case": str(case)}
            began = time.monotonic()
            try:
                record |= _judge(case, implementation)
            except RefusedError as refusal:
                record |= {"ok": True, "refused": refusal.reason}
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                record |= {
                    "ok": False,
                    "error": text[:2000],
                }
            record["seconds"] = round(time.monotonic() - began, 2)
            write(record)
            if any(sign in str(record.get("error")) for sign in _FATAL):
                return 3
    return 0


def _judge(case: Case, implementation: str) -> dict[str, object]:
    source = torch.Generator().manual_seed(1)
    q, k, v = qkv(case.sizes, source, case.dtype, case.layout)
    exact = _results(case, q, k, v, "reference", torch.float64, "cpu")
    plain = _results(case, q, k, v, "reference", None, "cpu")
    found = _results(case, q, k, v, implementation, None, DEVICE)
    again = _results(case, q, k, v, implementation, None, DEVICE)
    verdicts = [check(name, found[name].cpu(), plain[name], exact[name]) for name in exact]
    bad = [str(verdict) for verdict in verdicts if not verdict.ok]
    worst = max(v.error / v.allowed if v.allowed else float(v.error > 0) for v in verdicts)
    same = all(torch.equal(found[n].nan_to_num(), again[n].nan_to_num()) for n in found)
    error = "; ".join(bad) + ("" if same else "; two runs differ")
    return {"ok": not bad and same, "worst": round(worst, 4), "error": error or None}


def _results(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    implementation: str,
    dtype: torch.dtype | None,
    device: str,
) -> dict[str, torch.Tensor]:
    leaves: dict[str, torch.Tensor] = {}
    for name, tensor in (("dq", q), ("dk", k), ("dv", v)):
        moved = _moved(tensor, device)
        leaves[name] = (moved if dtype is None else moved.to(dtype)).requires_grad_()
    score = _score_on(case.score, device, leaves, dtype)
    o, lse = fv.attend(
        leaves["dq"], leaves["dk"], leaves["dv"], case.pattern, score,
        cu_seqlens=case.cu_seqlens, return_lse=True, implementation=implementation,
    )  # fmt: skip
    source = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(x.shape, generator=source, dtype=torch.float64).to(x.device, x.dtype)
        for x in (o, lse)
    ]
    gradients = torch.autograd.grad([o, lse], list(leaves.values()), weights, allow_unused=True)
    found = {"o": o.detach(), "lse": lse.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """x on the device with the strides that it has here."""
    if device == "cpu":
        return x.detach()
    size = 1 + sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True) if n)
    if not x.numel():
        return x.detach().to(device)
    storage = x.as_strided((size,), (1,)).to(device)
    return storage.as_strided(x.shape, x.stride())


def _score_on(
    score: Score, device: str, leaves: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> Score:
    """The score with leaves on the device for tensors; they are added to `leaves`."""
    if isinstance(score, Composed):
        return Composed(tuple(_score_on(m, device, leaves, dtype) for m in score.members))
    if not dataclasses.is_dataclass(score):
        return score
    found = {}
    for field in dataclasses.fields(score):
        tensor = getattr(score, field.name)
        if isinstance(tensor, torch.Tensor):
            leaf = tensor.detach().to(device, dtype or tensor.dtype).requires_grad_()
            leaves[f"d{type(score).__name__}.{field.name}.{len(leaves)}"] = leaf
            found[field.name] = leaf
    return dataclasses.replace(score, **found)


def cases() -> Iterator[Case]:
    """First one case per feature, then random ones without end, the same in every run."""
    for number, (grid, pattern) in enumerate(_patterns(random.Random(0))):
        for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 1 if number > 3 else 3]:
            sizes = Sizes(grid, None, 1, 4, 2, 64)
            yield Case(sizes, pattern, fv.Softmax(), dtype)
    chosen = random.Random(1)
    while True:
        options = list(_patterns(chosen))
        grid, pattern = chosen.choice(options)
        yield _random_case(chosen, grid, pattern)


def _patterns(r: random.Random) -> list[tuple[tuple[int, ...], Pattern]]:
    """A grid and a pattern on it, one of each kind."""
    L = r.choice((1, 63, 129, 200, 257, 331))
    X, Y = r.randint(6, 19), r.randint(6, 21)
    window = (r.randint(2, 6), r.randint(2, 6))
    stride = (r.randint(1, window[0]), r.randint(1, window[1]))
    cube = (r.randint(4, 6), r.randint(4, 7), r.randint(4, 8))
    unit = r.choice(((64, 64), (128, 128), (32, 64), (64, 16)))
    heads = r.choice((1, 2, 4))
    blocks = (-(-L // unit[0]), -(-L // unit[1]))
    mask = torch.rand(1, heads, *blocks, generator=torch.Generator().manual_seed(r.randint(0, 999)))
    listed = fv.Blocks(fv.BlockSelection.from_block_mask(mask < 0.6, *unit))
    left, right = r.randint(0, 90), r.choice((0, 0, 5))
    return [
        ((L,), fv.Causal()),
        ((L,), fv.Dense()),
        ((X, Y), fv.Neighborhood(window, stride)),
        ((L,), listed & fv.Causal()),
        ((L,), fv.Sliding(left, right)),
        ((L,), listed),
        ((*cube,), fv.Neighborhood((3, 4, 2), causal=(False, True, False))),
        ((L,), fv.Sliding(left, 0, sink_tokens=r.randint(1, 9))),
        ((X, Y), fv.Neighborhood(window, border="clip")),
        ((2 * X, 2 * Y), fv.Neighborhood(window, dilation=2, border="wrap")),
        ((2 * X, Y), fv.Neighborhood(window, dilation=(2, 1))),
        ((X, Y), fv.Partition((4, 3), shift=(2, 1))),
        ((X, Y), fv.Partition((4, 5), before=1, after=2)),
        ((L,), fv.Strided(r.randint(2, 7))),
        ((X, Y), fv.Axial(0)),
        ((L,), listed & fv.Sliding(left, 0, sink_tokens=3)),
        ((L,), fv.Sliding(left // 4, 0) | fv.Strided(r.randint(2, 9))),
        ((X, Y), fv.Causal()),
    ]


def _random_case(r: random.Random, grid: tuple[int, ...], pattern: Pattern) -> Case:
    kv_heads = 2 if pattern.depends_on_data else r.choice((1, 2))
    groups = 2 if pattern.depends_on_data else r.choice((1, 2, 3))
    D = r.choice((1, 8, 16, 40, 64, 64, 80, 128, 128, 192, 256))
    dtype = r.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    if dtype == torch.float32:
        D = min(D, 80)
        if grid == (1,):
            # One weight of exactly 1: the plain computation makes no error to compare with.
            dtype = torch.float16
    value_dim = r.choice((None, None, None, 24, 64))
    kv_grid = grid
    cu_seqlens = None
    batch = r.choice((1, 2))
    if isinstance(pattern, fv.Causal | fv.Dense | fv.Sliding) and len(grid) == 1:
        if r.random() < 0.4:
            kv_grid = (r.choice((1, 70, 190, 300)),)
        elif r.random() < 0.4:
            cuts = sorted(r.randint(0, grid[0]) for _ in range(3))
            cu_seqlens = torch.tensor([0, *cuts, grid[0]], dtype=torch.int32)
    sizes = Sizes(grid, kv_grid, batch, kv_heads * groups, kv_heads, D, value_dim)
    score = _random_score(r, sizes, pattern, cu_seqlens is not None)
    return Case(sizes, pattern, score, dtype, r.choice(LAYOUTS), cu_seqlens)


def _random_score(r: random.Random, sizes: Sizes, pattern: Pattern, packed: bool) -> Score:
    g = torch.Generator().manual_seed(r.randint(0, 10**6))
    kv_grid = sizes.kv_grid or sizes.q_grid
    heads, B = sizes.q_heads, sizes.batch
    Lq, Lk = torch.Size(sizes.q_grid).numel(), torch.Size(kv_grid).numel()
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    scores: list[Score] = [fv.Softmax()] * 3
    scores.append(
        fv.Softmax(scale=r.choice((0.3, -0.2, 1.0)), soft_cap=r.choice((None, 5.0, 30.0)))
    )
    scores.append(fv.Softmax(soft_cap=20.0, sink=draw(heads)))
    scores.append(fv.Softmax(sink=draw(heads)))
    scores.append(fv.KeyBias(draw(r.choice((1, B)), r.choice((1, heads)), Lk)))
    scores.append(fv.Bias(draw(r.choice((1, B)), r.choice((1, heads)), Lq, Lk)))
    scores.append(
        fv.Softmax(soft_cap=10.0) + fv.Bias(draw(1, 1, 1, Lk)) + fv.Bias(draw(1, heads, Lq, 1))
    )
    if len(kv_grid) == 1:
        scores.append(fv.Softmax(soft_cap=15.0) + fv.Alibi(torch.rand(heads, generator=g)))
        scores.append(fv.Alibi(torch.rand(heads, generator=g)) + fv.KeyBias(draw(1, heads, Lk)))
    if not packed and Lk <= 300:
        extent = fv.patterns.base.Extent(sizes.q_grid, kv_grid)
        table = draw(r.choice((1, heads)), *(2 * reach + 1 for reach in pattern.reach(extent)))
        scores.append(fv.RelativeBias(table))
        scores.append(
            fv.Softmax(soft_cap=9.0) + fv.RelativeBias(table) + fv.KeyBias(draw(B, 1, Lk))
        )
    return r.choice(scores)
