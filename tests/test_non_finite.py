"""NaN and inf go to the rows that see them, as in a plain softmax, and to no others."""

import pytest
import torch

import foveal as fv
from foveal.testing import Sizes, qkv

IMPLEMENTATIONS = [None, "cpu", "reference"]
PATTERNS = [
    (fv.Dense(), (9,)),
    (fv.Causal(), (140,)),
    (fv.Sliding(3, 2), (40,)),
    (fv.Sliding(3, 0, sink_tokens=2), (40,)),
    (fv.Neighborhood(5, 2), (70,)),
    (fv.Neighborhood((3, 4), dilation=(2, 1)), (7, 9)),
    (fv.Neighborhood((3, 3), border="wrap"), (6, 6)),
    (fv.Neighborhood((3, 3), causal=(True, False)), (9, 10)),
    (fv.Axial(0), (6, 7)),
    (fv.Partition((3, 4), (1, 2)), (8, 9)),
    (fv.Strided(4), (50,)),
    (fv.Fixed(5, 2), (43,)),
    (fv.Causal() & fv.Strided(2, causal=False), (30,)),
    (fv.Sliding(2) | fv.Strided(7), (40,)),
]


def by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor):
    """A plain softmax over the visible keys of each row, one row at a time."""
    group = q.shape[2] // k.shape[2]
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -torch.inf)
    for i, visible in enumerate(mask):
        keys = torch.nonzero(visible)[:, 0]
        if not len(keys):
            continue
        for h in range(q.shape[2]):
            scores = torch.einsum("bd,bjd->bj", q[:, i, h], k[:, keys, h // group])
            scores = scores * q.shape[-1] ** -0.5
            weights = torch.softmax(scores, dim=-1)
            o[:, i, h] = (weights[..., None] * v[:, keys, h // group]).sum(1)
            lse[:, i, h] = torch.logsumexp(scores, dim=-1)
    return o, lse


def poisoned(
    grid: tuple[int, ...], tensor: str, value: float, source: torch.Generator
) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """q, k, v with one bad number, and where it stands (flat token)."""
    sizes = Sizes(grid, batch=2, q_heads=4, kv_heads=2, head_dim=4, value_dim=4)
    tensors = dict(zip("qkv", qkv(sizes, source, torch.float64), strict=True))
    flat = tensors[tensor].flatten(1, -3)
    place = tuple(int(torch.randint(0, n, (), generator=source)) for n in flat.shape)
    if tensor == "q":
        tensors["k"][..., place[-1]] = tensors["k"][..., place[-1]].abs()
    flat[place] = value
    return tensors, place


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("pattern", "grid"), PATTERNS, ids=lambda p: str(p))
@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("q", torch.nan),
        ("q", torch.inf),
        ("k", torch.nan),
        ("k", torch.inf),
        ("k", -torch.inf),
        ("v", torch.nan),
        ("v", torch.inf),
    ],
)
def test_reaches_the_rows_that_see_it(
    pattern: fv.Pattern,
    grid: tuple[int, ...],
    tensor: str,
    value: float,
    implementation: str | None,
    source: torch.Generator,
) -> None:
    tensors, _ = poisoned(grid, tensor, value, source)
    q, k, v = tensors.values()
    flat = (x.flatten(1, -3) for x in (q, k, v))
    expected, expected_lse = by_rows(*flat, pattern.dense_mask(grid, grid))
    o, lse = fv.attend(q, k, v, pattern, return_lse=True, implementation=implementation)
    only_o = fv.attend(q, k, v, pattern, implementation=implementation)
    o, lse, only_o = o.flatten(1, -3), lse.flatten(1, -2), only_o.flatten(1, -3)
    counted = expected_lse != -torch.inf  # a row of -inf alone is 0/0 in a plain softmax
    torch.testing.assert_close(o[counted], expected[counted], equal_nan=True)
    torch.testing.assert_close(only_o[counted], expected[counted], equal_nan=True)
    # An infinite score makes lse inf or, shifted by the largest score, NaN: neither is finite.
    expected_lse = expected_lse.masked_fill(expected_lse == torch.inf, torch.nan)
    lse = lse.masked_fill(lse == torch.inf, torch.nan)
    torch.testing.assert_close(lse[counted], expected_lse[counted], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_plain_causal_through_the_plan(
    tensor: str, dtype: torch.dtype, source: torch.Generator
) -> None:
    """PyTorch's fused kernel alone would spread NaN to earlier rows."""
    q, k, v = qkv(Sizes((200,), q_heads=2), source, dtype)
    clean = fv.attend(q, k, v, fv.Causal())
    place = 150
    {"q": q, "k": k, "v": v}[tensor][:, place] = torch.nan
    o = fv.attend(q, k, v, fv.Causal())
    assert bool(o[:, :place].isfinite().all())
    torch.testing.assert_close(o[:, :place], clean[:, :place], rtol=0.02, atol=0.02)
    rows = o[:, place : place + 1] if tensor == "q" else o[:, place:]
    assert bool(rows.isnan().all())
    if tensor == "q":
        torch.testing.assert_close(o[:, place + 1 :], clean[:, place + 1 :], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stays_in_its_document(implementation: str | None, source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((30,), q_heads=2), source)
    v[:, 12] = torch.nan
    k[:, 13] = torch.nan
    cu_seqlens = torch.tensor([0, 10, 20, 30])
    for pattern in (fv.Dense(), fv.Causal(), fv.Strided(2)):
        o = fv.attend(q, k, v, pattern, cu_seqlens=cu_seqlens, implementation=implementation)
        assert bool(o[:, :10].isfinite().all())
        assert bool(o[:, 20:].isfinite().all())
        assert bool(o[:, 10:20].isnan().any())


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_stays_in_the_listed_blocks(implementation: str, source: torch.Generator) -> None:
    mask = torch.tensor([[[1, 0, 0], [0, 1, 1], [1, 0, 1]], [[0, 1, 0], [1, 0, 0], [0, 0, 1]]])
    pattern = fv.Blocks(fv.BlockSelection.from_block_mask(mask[None].bool(), 8, 8))
    q, k, v = qkv(Sizes((24,), q_heads=2), source)
    k[:, 3] = torch.nan
    o = fv.attend(q, k, v, pattern, implementation=implementation)
    sees = pattern.dense_mask(24, 24)[0, :, :, 3].T
    assert torch.equal(o.isnan().all(-1)[0], sees)
    assert torch.equal(o.isnan().any(-1)[0], sees)


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize(("pattern", "grid"), PATTERNS[1:], ids=lambda p: str(p))
def test_dq_of_other_rows_stays_as_it_was(
    pattern: fv.Pattern, grid: tuple[int, ...], tensor: str, source: torch.Generator
) -> None:
    tensors, (batch, token, head, channel) = poisoned(grid, tensor, torch.nan, source)
    mask = pattern.dense_mask(grid, grid)
    spoilt = mask[:, token] if tensor != "q" else torch.arange(len(mask)) == token

    def dq(value: float) -> torch.Tensor:
        changed = {name: x.clone() for name, x in tensors.items()}
        changed[tensor].flatten(1, -3)[batch, token, head, channel] = value
        leaves = [x.requires_grad_() for x in changed.values()]
        o = fv.attend(*leaves, pattern, implementation="cpu")
        weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
        return torch.autograd.grad(o, leaves, weights)[0].flatten(1, -3)

    torch.testing.assert_close(dq(torch.nan)[:, ~spoilt], dq(0.5)[:, ~spoilt])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_rows_of_infinite_scores_alone_agree(value: float) -> None:
    """Every implementation answers alike where each visible score is infinite."""
    q = torch.ones(1, 6, 1, 2)
    k = torch.ones(1, 6, 1, 2)
    k[:, :3] = value
    v = torch.arange(6.0).view(1, 6, 1, 1)
    results = [
        fv.attend(q, k, v, fv.Sliding(1), return_lse=True, implementation=implementation)
        for implementation in ("cpu", "reference")
    ]
    for got, expected in zip(*results, strict=True):
        got, expected = (x.masked_fill(x == torch.inf, torch.nan) for x in (got, expected))
        torch.testing.assert_close(got, expected, equal_nan=True)
