"""Lists finer than blocks: what they mean, that the tiled edition walks them, what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import foveal as fv

Make = Callable[
    [torch.Generator], tuple["fv.TokenSelection | fv.SpanSelection | fv.ColumnSelection", Tensor]
]
LQ, LK = 21, 27


def single_keys(source: torch.Generator) -> tuple[fv.TokenSelection, Tensor]:
    mask = torch.rand(2, 2, LQ, LK, generator=source) < 0.3
    return fv.TokenSelection.from_mask(mask), mask


def keys_of_tiles(source: torch.Generator) -> tuple[fv.TokenSelection, Tensor]:
    mask = torch.rand(1, 4, 3, LK, generator=source) < 0.3
    return fv.TokenSelection.from_mask(mask, 8), mask.repeat_interleave(8, 2)[:, :, :LQ]


def runs(source: torch.Generator) -> tuple[fv.SpanSelection, Tensor]:
    starts, stops = (torch.randint(0, LK + 1, (2, 1, LQ, 2), generator=source) for _ in range(2))
    key = torch.arange(LK)
    seen = (key >= starts[..., None]) & (key < stops[..., None])
    return fv.SpanSelection(starts.int(), stops.int()), seen.any(3)


def columns(source: torch.Generator) -> tuple[fv.ColumnSelection, Tensor]:
    starts = torch.tensor([[0, 3, -1], [5, 19, 25], [-1, -1, -1]]).expand(1, 4, 3, 3)
    single = torch.tensor([[4, 20], [-1, -1], [7, 26]]).expand(1, 4, 3, 2)
    seen = torch.zeros(1, 4, 3, LK, dtype=torch.bool)
    for tile, keys in enumerate(([*range(7), 20], [*range(5, 9), *range(19, 23), 25, 26], [7, 26])):
        seen[:, :, tile, keys] = True
    chosen = fv.ColumnSelection(starts.int(), single.int(), q_block=8, kv_block=4)
    return chosen, seen.repeat_interleave(8, 2)[:, :, :LQ]


MAKERS: list[Make] = [single_keys, keys_of_tiles, runs, columns]


@pytest.mark.parametrize("make", MAKERS)
def test_lists_mean_their_keys(make: Make, source: torch.Generator) -> None:
    selection, seen = make(source)
    assert torch.equal(fv.Chosen(selection).dense_mask(LQ, LK), seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_tiles_agree_with_the_definition(make: Make, causal: bool, source: torch.Generator) -> None:
    selection, _ = make(source)
    pattern: fv.Pattern = fv.Chosen(selection)
    pattern = pattern & fv.Causal() if causal else pattern
    q, k, v = inputs = [
        torch.randn(2, n, h, 5, generator=source, dtype=torch.float64).requires_grad_()
        for n, h in ((LQ, 4), (LK, 2), (LK, 2))
    ]
    results = []
    for name in ("cpu", "reference"):
        o, lse = fv.attend(q, k, v, pattern, return_lse=True, implementation=name)
        seen = torch.where(lse.isfinite(), lse, 0.0)
        gradients = torch.autograd.grad(o.sin().sum() + seen.cos().sum(), inputs)
        results.append((o, lse, *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_heads_are_marked() -> None:
    chosen = fv.HeadSelection(torch.tensor([[0, 2], [1, -1]]))
    assert chosen.mask(3).tolist() == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fv.TokenSelection(torch.tensor([[[[1, 0]]]])), "out of order"),
        (lambda: fv.TokenSelection(torch.tensor([[[[1, 1]]]])), "out of order"),
        (lambda: fv.TokenSelection(torch.zeros(2, 3, 4).int()), "integers"),
        (lambda: fv.TokenSelection(torch.zeros(1, 1, 1, 1).int(), 0), "q_block"),
        (
            lambda: fv.SpanSelection(torch.zeros(1, 1, 2, 1).int(), torch.zeros(1, 1, 3, 1).int()),
            "alike",
        ),
        (lambda: fv.HeadSelection(torch.zeros(3).int()), "integers"),
        (
            lambda: fv.attend(
                *(torch.zeros(1, 3, 1, 2),) * 3,
                fv.Chosen(fv.TokenSelection(torch.zeros(1, 1, 2, 1).int())),
            ),
            "need 3 lists",
        ),
        (
            lambda: fv.attend(
                *(torch.zeros(1, 3, 4, 2),) * 3,
                fv.Chosen(fv.TokenSelection(torch.zeros(1, 3, 3, 1).int())),
            ),
            "heads",
        ),
    ],
)
def test_bad_lists_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(fv.errors.SelectionError, match=message):
        make()
