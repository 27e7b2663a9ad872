"""What a process with Triton's interpreter runs: the Triton edition on the CPU, in tiny tiles.

The interpreter decides when it is imported, so it needs a process of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import foveal as fv
from foveal.engines.tile import triton as edition
from foveal.patterns.base import Pattern
from foveal.scores.base import Score
from foveal.testing.agreement import check_attend
from foveal.testing.inputs import Sizes, qkv


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; `pattern` and `score` draw their tensors from a source."""

    sizes: Sizes
    pattern: Callable[[torch.Generator], Pattern]
    score: Callable[[torch.Generator], Score] = lambda source: fv.Softmax()
    dtype: torch.dtype = torch.float32
    layout: Any = "contiguous"
    cu_seqlens: tuple[int, ...] | None = None


def _draw(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda source: torch.randn(*shape, generator=source)


def _lists(heads: int, q_blocks: int, kv_blocks: int) -> Callable[[torch.Generator], Pattern]:
    def blocks(source: torch.Generator) -> Pattern:
        mask = torch.rand(1, heads, q_blocks, kv_blocks, generator=source) < 0.5
        return fv.Blocks(fv.BlockSelection.from_block_mask(mask, 16, 16))

    return blocks


def _joined(
    other: Pattern, heads: int, union: bool = False
) -> Callable[[torch.Generator], Pattern]:
    def pattern(source: torch.Generator) -> Pattern:
        lists = _lists(heads, 3, 3)(source)
        return lists | other if union else lists & other

    return pattern


def _always(value: Any) -> Callable[[torch.Generator], Any]:
    return lambda source: value


_sequence = Sizes((45,), None, 1, 2, 1, 20, 12)
_grid = Sizes((6, 7), None, 1, 2, 1, 16)
_sink = _draw(2)

CASES: dict[str, Case] = {
    "dense, odd sizes": Case(Sizes((37,), (21,), 2, 2, 1, 5, 33), _always(fv.Dense())),
    "causal": Case(_sequence, _always(fv.Causal())),
    "causal float16": Case(_sequence, _always(fv.Causal()), dtype=torch.float16),
    "causal, fewer queries": Case(Sizes((20,), (45,), 1, 2, 1, 16), _always(fv.Causal())),
    "few queries of many heads": Case(
        Sizes((5,), (45,), 2, 6, 2, 16, 12), _always(fv.Sliding(30)), layout="strided"
    ),
    "few blind queries of many heads": Case(Sizes((19,), (11,), 1, 6, 2, 16), _always(fv.Causal())),
    "causal, blind rows": Case(Sizes((45,), (20,), 1, 2, 1, 16), _always(fv.Causal())),
    "strided memory": Case(_sequence, _always(fv.Sliding(9, 2)), layout="strided"),
    "shared memory": Case(_sequence, _always(fv.Sliding(9, 2)), layout="broadcast"),
    "heads first": Case(_sequence, _always(fv.Sliding(9, 2)), layout="heads_first"),
    "one token": Case(Sizes((1,), None, 1, 3, 3, 1), _always(fv.Dense())),
    "packed documents": Case(_sequence, _always(fv.Causal()), cu_seqlens=(0, 7, 7, 30, 45)),
    "sink tokens": Case(_sequence, _always(fv.Sliding(6, 0, sink_tokens=2))),
    "strided": Case(_sequence, _always(fv.Strided(4))),
    "union": Case(_sequence, _always(fv.Sliding(3) | fv.Strided(5))),
    "neighborhood": Case(_grid, _always(fv.Neighborhood((3, 4)))),
    "neighborhood, strides": Case(_grid, _always(fv.Neighborhood((3, 4), stride=(2, 3)))),
    "neighborhood, 3-D": Case(Sizes((4, 3, 5), None, 1, 1, 1, 16), _always(fv.Neighborhood(3))),
    "neighborhood, wrapped": Case(
        Sizes((6, 6), None, 1, 2, 1, 16),
        _always(fv.Neighborhood((3, 3), dilation=2, border="wrap")),
        lambda source: fv.RelativeBias(_draw(2, 5, 5)(source)),
    ),
    "axis": Case(
        _grid, _always(fv.Axial(0)), lambda source: fv.RelativeBias(_draw(1, 11, 13)(source))
    ),
    "cross of two axes": Case(
        _grid,
        _always(fv.Axial(0) | fv.Axial(1)),
        lambda source: fv.RelativeBias(_draw(2, 11, 13)(source)),
    ),
    "sphere": Case(
        _grid, _always(fv.Sphere(0.9)), lambda source: fv.RelativeBias(_draw(1, 11, 13)(source))
    ),
    "scales": Case(Sizes((30,), None, 1, 2, 1, 16), _always(fv.Scales((1, 2, 3, 4), window=3))),
    "windows": Case(
        _grid, _always(fv.Partition((4, 4), shift=2)), lambda s: fv.Bias(_draw(1, 2, 42, 42)(s))
    ),
    "block lists": Case(_sequence, _lists(2, 3, 3)),
    "block lists of key heads": Case(Sizes((45,), None, 1, 4, 2, 16), _lists(2, 3, 3)),
    "block lists and causal": Case(_sequence, _joined(fv.Causal(), 1)),
    "block lists and sink tokens": Case(
        _sequence, _joined(fv.Sliding(6, 0, sink_tokens=2), 2), lambda s: fv.Softmax(sink=_sink(s))
    ),
    "block lists or a window": Case(
        Sizes((45,), (48,), 1, 2, 1, 16), _joined(fv.Sliding(6, 0, sink_tokens=2), 2, union=True)
    ),
    "negative scale": Case(_sequence, _always(fv.Causal()), _always(fv.Softmax(scale=-0.3))),
    "soft cap and sink": Case(
        _sequence, _always(fv.Causal()), lambda s: fv.Softmax(soft_cap=4.0, sink=_sink(s))
    ),
    "sink alone": Case(
        Sizes((45,), (20,), 1, 2, 1, 16), _always(fv.Causal()), lambda s: fv.Softmax(sink=_sink(s))
    ),
    "bias and key bias": Case(
        _sequence,
        _always(fv.Causal()),
        lambda s: fv.Softmax(soft_cap=4.0) + fv.Bias(_draw(1, 1, 45, 45)(s)) + fv.KeyBias(_draw(1, 2, 45)(s)),
    ),
    "broadcast biases": Case(
        Sizes((20,), (23,), 2, 2, 1, 16),
        _always(fv.Dense()),
        lambda s: fv.Bias(_draw(1, 2, 20, 1)(s)) + fv.Bias(_draw(2, 1, 1, 23)(s)),
    ),
    "distance and table": Case(
        Sizes((30,), (45,), 1, 2, 1, 16),
        _always(fv.Sliding(8)),
        lambda s: fv.Alibi(torch.rand(2, generator=s)) + fv.RelativeBias(_draw(2, 89)(s)),
    ),
    "table on a dilated grid": Case(
        _grid,
        _always(fv.Neighborhood((3, 3), dilation=2)),
        lambda s: fv.RelativeBias(_draw(2, 5, 5)(s)),
    ),
}  # fmt: skip


def start() -> None:
    """Makes the interpreter patch the language once per kernel, not once per device function."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    scope = getattr(interpreter, "_LangPatchScope", None)

    def patch_once(fn: Any) -> Any:
        languages = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
        patched = languages and all(m.load.__name__ == "<lambda>" for m in languages)
        return scope() if patched and scope is not None else patch(fn)

    interpreter._patch_lang = patch_once
    torch.set_num_threads(1)


def ready() -> bool:
    """Whether the interpreter runs here."""
    return bool(edition._interpreted())


def agree(name: str, seed: int) -> list[str]:
    """Verdicts on a case; raises AssertionError when one is not ok."""
    case, source = CASES[name], torch.Generator().manual_seed(seed)
    q, k, v = qkv(case.sizes, source, case.dtype, case.layout)
    packed = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32)
    verdicts = check_attend(
        q, k, v, case.pattern(source), case.score(source),
        cu_seqlens=packed, implementation="triton",
    )  # fmt: skip
    return [str(verdict) for verdict in verdicts]


def moved(seed: int) -> bool:
    """Whether tokens are taken out and put back as PyTorch's own operations do it."""
    from foveal.engines.tile import gather

    source = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(150, generator=source)[:140].view(2, 70)
    x = torch.randn(2, 3, 150, 5, generator=source).transpose(1, 2)
    columns = torch.randn(3, 150, generator=source).expand(2, 3, 150)
    own, own_columns = gather.take((x, columns), tokens)
    back, back_columns = torch.zeros(2, 150, 3, 5), torch.zeros(2, 3, 150)
    gather.put((back, back_columns), tokens, (own, own_columns))
    named = tokens.flatten()
    expected, expected_columns = torch.zeros_like(back), torch.zeros_like(back_columns)
    expected[:, named], expected_columns[:, :, named] = x[:, named], columns[:, :, named]
    return (
        torch.equal(own, x[:, tokens].flatten(0, 1))
        and torch.equal(own_columns, columns[:, :, tokens].transpose(1, 2).flatten(0, 1))
        and torch.equal(back, expected)
        and torch.equal(back_columns, expected_columns)
    )


def repeated(seed: int) -> bool:
    """Whether outputs and gradients are the same bits in two runs."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (x.requires_grad_() for x in qkv(Sizes((40,), None, 1, 2, 1, 16), source))
    table = torch.randn(2, 79, generator=source).requires_grad_()
    bias = torch.randn(1, 1, 40, 40, generator=source).requires_grad_()
    runs = []
    for _ in range(2):
        score = fv.RelativeBias(table) + fv.Bias(bias)
        o, lse = fv.attend(q, k, v, fv.Causal(), score, return_lse=True, implementation="triton")
        runs.append(torch.autograd.grad(o.sum() + lse.sum(), (q, k, v, table, bias)))
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def contained(pattern: Pattern, value: float, where: str, seed: int) -> bool:
    """Whether a value in one row of q, k or v reaches the outputs that it reaches by definition."""
    source = torch.Generator().manual_seed(seed)
    grid = (45,) if pattern.rank in (None, 1) else (6, 7)
    tensors = dict(zip("qkv", qkv(Sizes(grid, head_dim=16), source), strict=True))
    tensors[where].flatten(1, -3)[0, 11, 0, :2] = value
    tensors[where].flatten(1, -3)[0, 14, 0, :1] = -value
    q, k, v = tensors.values()
    o, lse = fv.attend(q, k, v, pattern, return_lse=True, implementation="triton")
    expected = fv.attend(q, k, v, pattern, return_lse=True, implementation="reference")
    return all(
        torch.equal(test(got), test(want))
        for got, want in zip((o, lse), expected, strict=True)
        for test in (torch.isnan, torch.isposinf, torch.isneginf)
    )


def contained_gradients(pattern: Pattern, where: str, seed: int) -> bool:
    """Whether NaN in a row of q, k, v or of the gradient of o reaches the gradients that it reaches when
    every row is computed from the keys that it sees, and from nothing else."""
    source = torch.Generator().manual_seed(seed)
    grid = (45,) if pattern.rank in (None, 1) else (6, 7)
    q, k, v = qkv(Sizes(grid, head_dim=16), source)
    do = torch.randn(q.shape, generator=source)
    {"q": q, "k": k, "v": v, "do": do}[where].flatten(1, -3)[0, 11, 0, :2] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = fv.attend(*leaves, pattern, fv.Softmax(soft_cap=20.0), implementation="triton")
    found = torch.autograd.grad(o, leaves, do)
    expected = [torch.zeros_like(x).flatten(1, -3)[0, :, 0] for x in leaves]
    flat = [x.detach().flatten(1, -3)[0, :, 0] for x in (*leaves, do)]
    for i, visible in enumerate(pattern.dense_mask(grid, grid)):
        row = [x.requires_grad_() for x in (flat[0][i], flat[1][visible], flat[2][visible])]
        weights = (20 * torch.tanh(row[1] @ row[0] / 4 / 20)).softmax(0)
        parts = torch.autograd.grad(weights @ row[2], row, flat[3][i])
        expected[0][i] += parts[0]
        expected[1][visible] += parts[1]
        expected[2][visible] += parts[2]
    return all(
        torch.equal(got.flatten(1, -3)[0, :, 0].isnan().any(-1), want.isnan().any(-1))
        for got, want in zip(found, expected, strict=True)
    )
