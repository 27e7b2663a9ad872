"""More than 2^31 elements: sizes and positions stay exact."""

import os

import pytest
import torch

import foveal as fv

WIDE = 2**31 + 64
FREE_BYTES = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        (fv.Causal(), [True, True, True, False]),
        (fv.Sliding(3), [False, True, True, False]),
        (fv.Sliding(3, 1), [False, True, True, True]),
        (fv.Neighborhood(5), [False, True, True, True]),
        (fv.Neighborhood(4, stride=2, dilation=2), [False, False, True, False]),
        (fv.Neighborhood(3, border="wrap"), [False, True, True, True]),
        (fv.Partition(64), [False, False, True, True]),
        (fv.Strided(2), [True, False, True, False]),
        (fv.Fixed(64, 1), [False, True, True, False]),
        (fv.Axial(0, causal=True), [True, True, True, False]),
    ],
    ids=str,
)
def test_positions_beyond_31_bits(pattern: fv.Pattern, seen: list[bool]) -> None:
    extent = fv.Extent((2 * WIDE,), (2 * WIDE,))
    query = torch.tensor([WIDE])
    keys = torch.tensor([WIDE - 2**31, WIDE - 1, WIDE, WIDE + 1])
    assert pattern.allows(query[:, None], keys[None], extent).tolist() == [seen]


@pytest.mark.parametrize("pattern", [fv.Dense(), fv.Causal()])
def test_counts_beyond_31_bits(pattern: fv.Pattern) -> None:
    q = torch.empty(1024, 2**17, 64, 128, device="meta")
    plan = fv.explain(q, q, q, pattern)
    pairs = 2**34 if isinstance(pattern, fv.Dense) else 2**33 + 2**16
    assert plan.tiles.pairs == pairs
    assert plan.flops == 4 * 128 * 64 * 1024 * pairs
    assert plan.bytes == 4 * 4 * q.numel()


@pytest.mark.slow
@pytest.mark.skipif(
    FREE_BYTES < 60 * 2**30,
    reason="a result of more than 2^31 elements and its gradients need 60 GiB of free memory",
)
@pytest.mark.parametrize("pattern", [fv.Sliding(1), fv.Neighborhood(3), fv.Causal()], ids=str)
def test_a_result_of_more_than_2_to_the_31_elements(pattern: fv.Pattern) -> None:
    """Heads 0 and last are compared; those between share memory with them."""
    tokens, heads = 4, 2**24 + 1
    one = torch.randn(1, tokens, 1, 32)
    q = one.expand(1, tokens, heads, 32)
    assert q.numel() > 2**31
    o = fv.attend(q, q, q, pattern, implementation="cpu")
    expected = fv.attend(one, one, one, pattern, implementation="reference")
    for head in (0, heads // 2, heads - 1):
        torch.testing.assert_close(o[:, :, head : head + 1], expected)
