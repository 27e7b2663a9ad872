"""What each score adds to a pair, written out pair by pair, against the reference."""

import math

import pytest
import torch

import foveal as fv
from foveal.testing import Sizes, definition, qkv

IMPLEMENTATIONS = ["reference", "cpu"]


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    added: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax of scale q.k + added [B, Hq, Lq, Lk] over the visible keys; flat q, k, v."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k) + added
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def assert_adds(
    score: fv.Score,
    added: torch.Tensor,
    pattern: fv.Pattern,
    tensors: tuple[torch.Tensor, ...],
    parameter: torch.Tensor,
) -> None:
    """Output and the parameter's gradient."""
    q, k, v = tensors
    mask = pattern.dense_mask(tuple(q.shape[1:-2]), tuple(k.shape[1:-2]))
    want = expected(*(x.flatten(1, -3) for x in tensors), mask, added).view(*q.shape[:-1], -1)
    weights = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view(want.shape)
    (gradient,) = torch.autograd.grad(want, parameter, weights, retain_graph=True)
    for implementation in IMPLEMENTATIONS:
        got = fv.attend(q, k, v, pattern, score, implementation=implementation)
        torch.testing.assert_close(got, want)
        (found,) = torch.autograd.grad(got, parameter, weights)
        torch.testing.assert_close(found, gradient)


def draw(source: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64, requires_grad=True)


SIZES = Sizes((11,), (14,), batch=2, q_heads=4, kv_heads=2, head_dim=3, value_dim=5)
PATTERNS = [fv.Dense(), fv.Causal(), fv.Sliding(4, 1), fv.Strided(2)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 11, 14), (1, 4, 11, 14), (2, 1, 11, 1), (1, 1, 1, 14)])
def test_bias(pattern: fv.Pattern, shape: tuple[int, ...], source: torch.Generator) -> None:
    bias = draw(source, *shape)
    tensors = qkv(SIZES, source, torch.float64)
    assert_adds(fv.Bias(bias), bias.expand(2, 4, 11, 14), pattern, tensors, bias)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_key_bias(pattern: fv.Pattern, heads: int, batch: int, source: torch.Generator) -> None:
    bias = draw(source, batch, heads, 14)
    added = bias.repeat_interleave(4 // heads, dim=1)[:, :, None, :]
    assert_adds(fv.KeyBias(bias), added, pattern, qkv(SIZES, source, torch.float64), bias)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alibi(pattern: fv.Pattern, source: torch.Generator) -> None:
    slopes = draw(source, 4)
    distance = torch.tensor([[abs(i + 3 - j) for j in range(14)] for i in range(11)])
    added = -slopes[:, None, None] * distance
    assert_adds(fv.Alibi(slopes), added, pattern, qkv(SIZES, source, torch.float64), slopes)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("spare", [0, 2])
def test_relative_bias_on_a_sequence(heads: int, spare: int, source: torch.Generator) -> None:
    reach = 4 + spare
    table = draw(source, heads, 2 * reach + 1)
    index = torch.tensor(
        [[min(max(j - i - 3, -reach), reach) + reach for j in range(14)] for i in range(11)]
    )
    added = table[:, index].expand(4, 11, 14)
    tensors = qkv(SIZES, source, torch.float64)
    assert_adds(fv.RelativeBias(table), added, fv.Sliding(4, 1), tensors, table)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("border", ["shift", "clip", "wrap"])
@pytest.mark.parametrize("window", [(3, 4), (5, 2)])
def test_relative_bias_of_a_neighborhood(
    window: tuple[int, int], border: str, dilation: int, source: torch.Generator
) -> None:
    """Index (j - i) / dilation + window - 1 on each axis; the short way round where it wraps."""
    grid = (10, 8)
    pattern = fv.Neighborhood(window, dilation=dilation, border=border)
    table = draw(source, 2, *(2 * w - 1 for w in window))
    tokens = [(x, y) for x in range(grid[0]) for y in range(grid[1])]
    mask = pattern.dense_mask(grid, grid)
    added = torch.zeros(2, len(tokens), len(tokens), dtype=torch.float64)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            if mask[i, j]:
                index = []
                for a in range(2):
                    step = (key[a] - query[a]) // dilation
                    if border == "wrap":
                        around = grid[a] // dilation
                        before = window[a] // 2
                        step = (step + before) % around - before
                    index.append(step + window[a] - 1)
                added[:, i, j] += table[:, index[0], index[1]]
    tensors = qkv(Sizes(grid, q_heads=2, head_dim=3), source, torch.float64)
    assert_adds(fv.RelativeBias(table), added, pattern, tensors, table)


def test_order_is_scale_cap_terms_sink(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((9,), q_heads=2, head_dim=3), source, torch.float64)
    bias, sink = draw(source, 1, 2, 9, 9), draw(source, 2)
    scores = 1.5 * torch.tanh(0.8 * torch.einsum("bihd,bjhd->bhij", q, k) / 1.5) + bias
    total = scores.exp().sum(-1) + sink.exp()[:, None]
    want = torch.einsum("bhij,bjhd->bihd", scores.exp() / total[..., None], v)
    softmax = fv.Softmax(scale=0.8, soft_cap=1.5, sink=sink)
    for score in (softmax + fv.Bias(bias), fv.Bias(bias) + softmax):
        for implementation in IMPLEMENTATIONS:
            o, lse = fv.attend(
                q, k, v, fv.Dense(), score, return_lse=True, implementation=implementation
            )
            torch.testing.assert_close(o, want)
            torch.testing.assert_close(lse, total.log().transpose(1, 2))


def test_terms_add_up(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((9,), q_heads=2), source, torch.float64)
    a, b = draw(source, 1, 2, 9, 9), draw(source, 1, 1, 9, 9)
    for implementation in IMPLEMENTATIONS:
        got = fv.attend(
            q, k, v, fv.Causal(), fv.Bias(a) + fv.Bias(b), implementation=implementation
        )
        want = fv.attend(q, k, v, fv.Causal(), fv.Bias(a + b), implementation="reference")
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_of_minus_infinity_hides_its_pairs(
    implementation: str, source: torch.Generator
) -> None:
    """Users pass masks this way; a row hidden altogether sees no key."""
    q, k, v = (x.requires_grad_() for x in qkv(Sizes((12,), q_heads=2), source, torch.float64))
    mask = torch.rand(1, 2, 12, 12, generator=source) < 0.5
    mask[:, :, 3] = False
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    results = fv.attend(
        q, k, v, fv.Dense(), fv.Bias(bias), return_lse=True, implementation=implementation
    )
    want = definition(q, k, v, mask)
    for got, expected_one in zip(results, want, strict=True):
        torch.testing.assert_close(got, expected_one)
    weights = [torch.ones_like(x) for x in want]
    for got, expected_one in zip(
        torch.autograd.grad(results, (q, k, v), weights),
        torch.autograd.grad(want, (q, k, v), weights),
        strict=True,
    ):
        torch.testing.assert_close(got, expected_one)


def test_scale_defaults_to_the_root_of_head_dim(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((7,), head_dim=9), source, torch.float64)
    for implementation in IMPLEMENTATIONS:
        got = fv.attend(q, k, v, fv.Sliding(2), implementation=implementation)
        want = fv.attend(
            q, k, v, fv.Sliding(2), fv.Softmax(scale=1 / 3), implementation=implementation
        )
        torch.testing.assert_close(got, want)


def test_large_scores_do_not_overflow(source: torch.Generator) -> None:
    q, k, v = (100 * x for x in qkv(Sizes((30,), q_heads=2), source))
    for implementation in (None, *IMPLEMENTATIONS):
        o, lse = fv.attend(q, k, v, fv.Sliding(9), return_lse=True, implementation=implementation)
        assert bool(o.isfinite().all())
        assert bool(lse.isfinite().all())
        o = fv.attend(
            q, k, v, fv.Sliding(9), fv.Softmax(sink=torch.tensor([1e4, -1e4])),
            implementation=implementation,
        )  # fmt: skip
        assert bool(o.isfinite().all())


def test_written_keys_name_the_kind() -> None:
    score = fv.Softmax(soft_cap=3.0) + fv.RelativeBias(torch.ones(4, 5))
    assert score.key == "Softmax(soft_cap=3.0) + RelativeBias(4x5)"
    assert fv.Softmax(sink=torch.ones(4)).key != fv.Softmax().key
