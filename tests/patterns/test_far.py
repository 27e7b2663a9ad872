"""Reaches and strides beyond every sequence: as large as the sequence, and in no more time."""

import sys
from collections.abc import Callable

import pytest
import torch

import foveal as fv

CASES: dict[str, tuple[Callable[[int], fv.Pattern], Callable[[int], fv.Pattern]]] = {
    "left": (lambda far: fv.Sliding(far, 1), lambda L: fv.Sliding(L, 1)),
    "right": (lambda far: fv.Sliding(2, far), lambda L: fv.Sliding(2, L)),
    "sinks": (lambda far: fv.Sliding(0, 3, far), lambda L: fv.Sliding(0, 3, L)),
    "stride": (fv.Strided, lambda L: fv.Strided(2 * L)),
    "all residues": (
        lambda far: fv.Strided(far, causal=False),
        lambda L: fv.Strided(2 * L, causal=False),
    ),
    "block": (fv.Fixed, fv.Fixed),
    "summary": (lambda far: fv.Fixed(far, far - 5), lambda L: fv.Causal()),
    "piece": (fv.Partition, fv.Partition),
    "before": (lambda far: fv.Partition(4, before=far), lambda L: fv.Partition(4, before=L)),
    "after": (lambda far: fv.Partition(4, 1, 0, far), lambda L: fv.Partition(4, 1, 0, L)),
}


@pytest.mark.parametrize("far", [10**7, sys.maxsize, 10**30], ids=["10^7", "2^63 - 1", "10^30"])
@pytest.mark.parametrize("name", CASES)
def test_far_is_as_long_as_the_sequence(name: str, far: int, source: torch.Generator) -> None:
    far_away, near = CASES[name]
    for Lq, Lk in ((12, 12), (5, 12), (12, 5)):
        mask = near(max(Lq, Lk)).dense_mask(Lq, Lk)
        assert torch.equal(far_away(far).dense_mask(Lq, Lk), mask)
        q = torch.randn(1, Lq, 2, 3, generator=source, dtype=torch.float64)
        k = torch.randn(1, Lk, 2, 3, generator=source, dtype=torch.float64)
        expected = fv.attend(q, k, k, near(max(Lq, Lk)), implementation="reference")
        torch.testing.assert_close(fv.attend(q, k, k, far_away(far)), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3, 7, 30])
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (23, 23), (5, 20), (20, 5), (0, 4), (4, 0), (0, 0)])
def test_residue_classes_hold_every_pair_once(stride: int, causal: bool, Lq: int, Lk: int) -> None:
    pattern = fv.Strided(stride, causal)
    found = torch.zeros(Lq, Lk, dtype=torch.int64)
    for part in pattern.parts(fv.Extent((Lq,), (Lk,))):
        inside = part.pattern.dense_mask(part.extent.Lq, part.extent.Lk).long()
        for queries, keys in zip(part.q_tokens, part.k_tokens, strict=True):
            found[queries[:, None], keys] += inside
    assert torch.equal(found, pattern.dense_mask(Lq, Lk).long())
