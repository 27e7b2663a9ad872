"""The masks of the suite against their definitions, written as loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from foveal.bench.cases import Case
from foveal.bench.masks import LENGTHS, MASKS, documents, masks_suite, reach
from foveal.bench.ours import Foveal
from foveal.patterns import Blocks

CPU = torch.device("cpu")
L = 128
W = reach(L)


def _owner(lengths: tuple[int, ...]) -> list[int]:
    return [number for number, length in enumerate(lengths) for _ in range(length)]


OWN = _owner(documents(L))
FIRST = [OWN.index(owner) for owner in OWN]
LAST = OWN.index(OWN[-1])
RULES: dict[str, Callable[[int, int], bool]] = {
    "full": lambda i, j: True,
    "causal": lambda i, j: j <= i,
    "full documents": lambda i, j: OWN[i] == OWN[j],
    "causal documents": lambda i, j: OWN[i] == OWN[j] and j <= i,
    "window": lambda i, j: abs(i - j) <= W,
    "causal window": lambda i, j: 0 <= i - j <= W,
    "shared question": lambda i, j: (OWN[i] == OWN[j] and j <= i) or (OWN[j] == 0 < OWN[i]),
    "causal blockwise": lambda i, j: j <= i and (OWN[i] == OWN[j] or i >= LAST),
    "global window": lambda i, j: abs(i - j) <= W or min(i, j) < W,
}


def _case(name: str, length: int = L) -> Case:
    cases = masks_suite(CPU, (length,)).cases
    found = next(case for case in cases if isinstance(case, Case) and case.column == name)
    assert isinstance(found, Case)
    return found


def _mask(name: str, length: int = L) -> torch.Tensor:
    return _case(name, length).pattern.dense_mask(length, length)


@pytest.mark.parametrize("name", RULES)
def test_equals_its_definition(name: str) -> None:
    rule = RULES[name]
    wanted = torch.tensor([[rule(i, j) for j in range(L)] for i in range(L)])
    assert torch.equal(_mask(name), wanted)


def test_prefixes_see_each_other_and_are_causal_behind() -> None:
    causal = torch.ones(L, L).tril().bool()
    mask = _mask("prefix, causal")
    p = int(mask[0].sum())
    assert 1 <= p <= L
    wanted = causal.clone()
    wanted[:p, :p] = True
    assert torch.equal(mask, wanted)

    mask = _mask("prefix documents")
    p = int(mask[0].sum())
    assert 1 <= p <= documents(L)[0]
    for i in range(L):
        for j in range(L):
            inside = max(i, j) < FIRST[i] + p
            assert bool(mask[i, j]) == (OWN[i] == OWN[j] and (j <= i or inside))


def test_block_causal_documents_end_with_the_block_of_the_query() -> None:
    mask = _mask("block-causal documents")
    starts = [int(row.nonzero()[0]) for row in mask]
    assert starts == sorted(starts)
    for i, row in enumerate(mask):
        seen = row.nonzero()[:, 0]
        assert len(seen) == int(seen[-1] - seen[0]) + 1
        assert int(seen[-1]) + 1 == min((i // W + 1) * W, L)
        assert (i - starts[i]) // W < 8
        assert starts[i] % W == 0


@pytest.mark.parametrize("name", ["blocks, uniform", "blocks, variable"])
def test_block_lists_keep_a_tenth_for_each_key_head(name: str) -> None:
    device = torch.device("cuda")
    case = next(c for c in masks_suite(device, (8192,)).cases if name in c.name)
    assert isinstance(case.pattern, Blocks)
    lists = case.pattern.selection
    assert lists.indices.shape[:2] == (1, case.kv_heads)
    assert lists.density(8192) == pytest.approx(0.1, abs=0.02)
    masks = lists.block_mask(8192 // lists.kv_block)[0]
    assert not torch.equal(masks[0], masks[1])


def test_variable_blocks_differ_in_size() -> None:
    case = next(c for c in masks_suite(torch.device("cuda"), (8192,)).cases if "variable" in c.name)
    mask = case.pattern.selection.block_mask(128)[0, 0]
    runs = torch.unique_consecutive(mask, dim=0, return_counts=True)[1]
    assert len(set(runs.tolist())) > 2
    assert int(runs[:-1].min()) >= 2


@pytest.mark.parametrize("length", [256, 4096, 65536])
def test_documents_fill_the_sequence_and_follow_the_histogram(length: int) -> None:
    lengths = documents(length)
    assert sum(lengths) == length
    assert min(lengths) >= 1
    assert lengths == documents(length)
    if length == 65536:
        logs = torch.tensor(lengths[1:-1]).double().log()
        assert float(logs.median()) == pytest.approx(math.log(1100), abs=0.6)


def test_the_suite_has_every_mask_at_every_length() -> None:
    gpu = masks_suite(torch.device("cuda"), max_tokens=8192)
    assert len(gpu.cases) == len(MASKS) * sum(n <= 8192 for n in LENGTHS)
    assert {(c.q_heads, c.kv_heads, c.head_dim, c.dtype) for c in gpu.cases} == {
        (64, 8, 128, torch.bfloat16)
    }
    assert [c.tokens for c in masks_suite(CPU, (300, 100), 200).cases] == [100] * len(MASKS)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.name)
def test_work_is_the_area_of_the_mask(mask) -> None:
    case = _case(mask.name, 256)
    explained = Foveal().explained(case, CPU)
    area = int(case.pattern.dense_mask(256, 256).sum()) * case.q_heads
    assert explained.flops == 4 * 64 * area
