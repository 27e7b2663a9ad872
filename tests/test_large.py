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


def needs(gibibytes: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        gibibytes * 2**30 > FREE_BYTES,
        reason=f"keys of more than 2^31 elements need {gibibytes} GiB of free memory here",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "backward", [pytest.param(False, marks=needs(16)), pytest.param(True, marks=needs(64))]
)
def test_keys_of_more_than_2_to_the_31_elements(backward: bool, source: torch.Generator) -> None:
    """The last queries see the last keys only, so a short call must give the same."""
    length, heads, head_dim, last = 2**20 + 1, 8, 256, 64
    q = torch.randn(1, 16, heads, head_dim, generator=source)
    k = torch.randn(1, length, 1, head_dim, generator=source).expand(-1, -1, heads, -1)
    v = torch.randn(1, length, 1, 1, generator=source).expand(-1, -1, heads, -1)
    assert k.numel() > 2**31
    k, v = (x.requires_grad_(backward) for x in (k, v))
    # An even number of tokens is cut off in front, so that dilation classes stay what they are.
    short = slice(length - last - 1, None)
    for pattern in (fv.Sliding(3), fv.Neighborhood(5, dilation=2)):
        o = fv.attend(q, k, v, pattern, implementation="cpu")
        expected = fv.attend(q, k[:, short], v[:, short], pattern, implementation="reference")
        torch.testing.assert_close(o, expected)
        if backward:
            got = torch.autograd.grad(o.sum(), (k, v))
            want = torch.autograd.grad(expected.sum(), (k, v))
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x[:, short], y[:, short])
