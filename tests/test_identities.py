"""Where two ways of writing a problem must give the same answer, on every implementation."""

import itertools

import pytest
import torch

import foveal as fv
from foveal.testing import Sizes, definition, qkv

IMPLEMENTATIONS = ["cpu", "reference"]


def results(
    implementation: str, tensors: tuple[torch.Tensor, ...], pattern: fv.Pattern, **options: object
) -> list[torch.Tensor]:
    """o, lse, dq, dk, dv for the same cotangents in every call."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    o, lse = fv.attend(q, k, v, pattern, return_lse=True, implementation=implementation, **options)
    source = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=source, dtype=x.dtype) for x in (o, lse)]
    return [o, lse, *torch.autograd.grad((o, lse), (q, k, v), weights)]


def assert_same(tensors: tuple[torch.Tensor, ...], first: fv.Pattern, second: fv.Pattern) -> None:
    expected = results("reference", tensors, second)
    for implementation in IMPLEMENTATIONS:
        for got, want in zip(results(implementation, tensors, first), expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("grid", [(12,), (5, 6), (5, 2, 3)])
def test_full_window_equals_dense(
    grid: tuple[int, ...], stride: int, source: torch.Generator
) -> None:
    strides = tuple(min(stride, n) for n in grid)
    tensors = qkv(Sizes(grid, q_heads=2), source, torch.float64)
    assert_same(tensors, fv.Neighborhood(grid, strides), fv.Dense())


def test_full_causal_window_equals_causal(source: torch.Generator) -> None:
    tensors = qkv(Sizes((19,), q_heads=2), source, torch.float64)
    for border in ("shift", "clip"):
        assert_same(tensors, fv.Neighborhood(19, causal=True, border=border), fv.Causal())


@pytest.mark.parametrize(
    ("grid", "window"), [((12,), (4,)), ((6, 8), (3, 4)), ((4, 3, 6), (2, 3, 2))]
)
def test_stride_of_the_window_equals_blocks(
    grid: tuple[int, ...], window: tuple[int, ...], source: torch.Generator
) -> None:
    tensors = qkv(Sizes(grid, q_heads=2), source, torch.float64)
    assert_same(tensors, fv.Neighborhood(window, stride=window), fv.Partition(window))


def test_causal_stride_of_the_window_is_causal_inside_blocks(source: torch.Generator) -> None:
    tensors = qkv(Sizes((20,), q_heads=2), source, torch.float64)
    assert_same(tensors, fv.Neighborhood(5, stride=5, causal=True), fv.Partition(5) & fv.Causal())


@pytest.mark.parametrize("causal", [False, True])
def test_dilation_that_fills_the_axis_equals_residue_classes(
    causal: bool, source: torch.Generator
) -> None:
    tensors = qkv(Sizes((20,), q_heads=2), source, torch.float64)
    assert_same(tensors, fv.Neighborhood(5, dilation=4, causal=causal), fv.Strided(4, causal))


def test_dilated_window_equals_the_window_of_each_class(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((6, 9), q_heads=2), source, torch.float64)
    expected = torch.empty_like(q)
    for r, c in itertools.product(range(2), range(3)):
        cut = (slice(None), slice(r, None, 2), slice(c, None, 3))
        expected[cut] = fv.attend(
            q[cut], k[cut], v[cut], fv.Neighborhood((3, 2)), implementation="reference"
        )
    for implementation in IMPLEMENTATIONS:
        got = fv.attend(
            q, k, v, fv.Neighborhood((3, 2), dilation=(2, 3)), implementation=implementation
        )
        torch.testing.assert_close(got, expected)


def test_window_of_three_blocks_equals_local_attention_inside(source: torch.Generator) -> None:
    w = 4
    q, k, v = qkv(Sizes((8 * w,), q_heads=2), source, torch.float64)
    blocks = fv.Partition(w, before=w, after=w)
    for implementation in IMPLEMENTATIONS:
        got = fv.attend(q, k, v, fv.Neighborhood(3 * w, stride=w), implementation=implementation)
        want = fv.attend(q, k, v, blocks, implementation=implementation)
        torch.testing.assert_close(got[:, w:-w], want[:, w:-w])
        assert not torch.allclose(got[:, :w], want[:, :w])


def test_one_window_on_every_axis_but_one_equals_axial(source: torch.Generator) -> None:
    tensors = qkv(Sizes((4, 5, 3), q_heads=2), source, torch.float64)
    for axis, length in enumerate((4, 5, 3)):
        window = tuple(length if a == axis else 1 for a in range(3))
        assert_same(tensors, fv.Neighborhood(window), fv.Axial(axis))
        causal = tuple(a == axis for a in range(3))
        assert_same(tensors, fv.Neighborhood(window, causal=causal), fv.Axial(axis, causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_axial_equals_attention_over_each_line(causal: bool, source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((3, 4, 5), batch=2, q_heads=2), source, torch.float64)
    for axis in range(3):
        lines = [x.movedim(axis + 1, -3).flatten(0, 2) for x in (q, k, v)]
        along = fv.Causal() if causal else fv.Dense()
        o = fv.attend(*lines, along, implementation="reference")
        rest = [n for a, n in enumerate((3, 4, 5)) if a != axis]
        want = o.unflatten(0, (2, *rest)).movedim(-3, axis + 1)
        for implementation in IMPLEMENTATIONS:
            got = fv.attend(q, k, v, fv.Axial(axis, causal), implementation=implementation)
            torch.testing.assert_close(got, want)


def rolled_window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int, shift: int, table: torch.Tensor
) -> torch.Tensor:
    """Shifted windows as published: roll, cut in windows, mask what came round, roll back.

    q, k, v [1, X, Y, H, D], table [H, 2 w - 1, 2 w - 1].
    """
    _, X, Y, H, D = q.shape
    back = lambda x: torch.roll(x, (-shift, -shift), (1, 2))  # noqa: E731
    side = torch.zeros(1, X, Y, 1, 1)
    for number, (a, b) in enumerate(
        itertools.product((slice(0, -w), slice(-w, -shift), slice(-shift, None)), repeat=2)
    ):
        side[:, a, b] = number

    def windows(x: torch.Tensor) -> torch.Tensor:
        cut = x.reshape(X // w, w, Y // w, w, *x.shape[3:])
        return cut.transpose(1, 2).reshape(-1, w * w, *x.shape[3:])

    q, k, v = (windows(back(x)) for x in (q, k, v))
    side = windows(side)[:, :, 0, 0]
    place = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij"), -1)
    place = place.reshape(-1, 2)
    offset = place[None] - place[:, None] + w - 1  # key minus query
    scores = torch.einsum("nihd,njhd->nhij", q, k) * D**-0.5
    scores = scores + table[:, offset[..., 0], offset[..., 1]]
    apart = side[:, :, None] != side[:, None, :]
    weights = scores.masked_fill(apart[:, None], -torch.inf).softmax(-1)
    o = torch.einsum("nhij,njhd->nihd", weights, v)
    o = o.reshape(X // w, Y // w, w, w, H, -1).transpose(1, 2).reshape(1, X, Y, H, -1)
    return torch.roll(o, (shift, shift), (1, 2))


@pytest.mark.parametrize(("w", "shift"), [(4, 2), (3, 1), (6, 3), (5, 4)])
def test_shifted_windows_equal_rolling_and_masking(
    w: int, shift: int, source: torch.Generator
) -> None:
    leaves = [*qkv(Sizes((2 * w, 3 * w), q_heads=3, head_dim=4), source, torch.float64)]
    leaves.append(torch.randn(3, 2 * w - 1, 2 * w - 1, generator=source, dtype=torch.float64))
    q, k, v, table = (x.requires_grad_() for x in leaves)
    want = rolled_window_attention(q, k, v, w, shift, table)
    weights = torch.randn(want.shape, generator=source, dtype=want.dtype)
    want_gradients = torch.autograd.grad(want, (q, k, v, table), weights)
    for implementation in IMPLEMENTATIONS:
        got = fv.attend(
            q, k, v, fv.Partition(w, shift), fv.RelativeBias(table), implementation=implementation
        )
        torch.testing.assert_close(got, want)
        gradients = torch.autograd.grad(got, (q, k, v, table), weights)
        for gradient, expected in zip(gradients, want_gradients, strict=True):
            torch.testing.assert_close(gradient, expected)


def test_wrapped_window_commutes_with_rolling(source: torch.Generator) -> None:
    tensors = qkv(Sizes((7, 8), q_heads=2), source, torch.float64)
    pattern = fv.Neighborhood((3, 4), border="wrap")
    rolled = tuple(torch.roll(x, (2, -3), (1, 2)) for x in tensors)
    for implementation in IMPLEMENTATIONS:
        plain = fv.attend(*tensors, pattern, implementation=implementation)
        got = fv.attend(*rolled, pattern, implementation=implementation)
        torch.testing.assert_close(torch.roll(got, (-2, 3), (1, 2)), plain)


def test_sliding_equals_the_clipped_neighborhood(source: torch.Generator) -> None:
    tensors = qkv(Sizes((23,), q_heads=2), source, torch.float64)
    assert_same(tensors, fv.Neighborhood(7, border="clip"), fv.Sliding(3, 3))
    assert_same(tensors, fv.Neighborhood(6, border="clip"), fv.Sliding(3, 2))
    assert_same(tensors, fv.Neighborhood(6, causal=True), fv.Sliding(5))
    assert_same(tensors, fv.Sliding(23), fv.Causal())
    assert_same(tensors, fv.Sliding(23, 23), fv.Dense())
    assert_same(tensors, fv.Sliding(0, 0, sink_tokens=23), fv.Causal())


def test_factorised_patterns_at_their_ends(source: torch.Generator) -> None:
    tensors = qkv(Sizes((17,), q_heads=2), source, torch.float64)
    assert_same(tensors, fv.Strided(1), fv.Causal())
    assert_same(tensors, fv.Strided(1, causal=False), fv.Dense())
    assert_same(tensors, fv.Fixed(4, 4), fv.Causal())
    assert_same(tensors, fv.Fixed(17, 1), fv.Causal())
    assert_same(tensors, fv.Partition(17), fv.Dense())


def test_the_last_queries_of_a_longer_call(source: torch.Generator) -> None:
    """Lq < Lk is the end of the square problem: what decoding with a cache needs."""
    q, k, v = qkv(Sizes((21,), q_heads=2), source, torch.float64)
    for pattern in (
        fv.Causal(),
        fv.Sliding(4, sink_tokens=2),
        fv.Neighborhood(5, dilation=2),
        fv.Strided(3),
        fv.Fixed(4, 2),
        fv.Partition(4, 1),
    ):
        for implementation in IMPLEMENTATIONS:
            whole = fv.attend(q, k, v, pattern, implementation=implementation)
            last = fv.attend(q[:, -6:], k, v, pattern, implementation=implementation)
            torch.testing.assert_close(last, whole[:, -6:])


def test_disjoint_halves_merge_by_lse(source: torch.Generator) -> None:
    """The merge rule, through which gradients of both outputs flow."""
    q, k, v = (x.requires_grad_() for x in qkv(Sizes((16,), q_heads=2), source, torch.float64))
    near, far = fv.Partition(4), fv.Strided(4, causal=False)
    both = near | far
    o1, l1 = fv.attend(q, k, v, near, return_lse=True, implementation="cpu")
    mask = both.dense_mask(16, 16) & ~near.dense_mask(16, 16)
    o2, l2 = definition(q, k, v, mask)
    merged = o1 - torch.sigmoid(l2 - l1)[..., None] * (o1 - o2)
    want = fv.attend(q, k, v, both, implementation="cpu")
    torch.testing.assert_close(merged, want)
    weights = torch.randn(want.shape, generator=source, dtype=want.dtype)
    for got, expected in zip(
        torch.autograd.grad(merged, (q, k, v), weights),
        torch.autograd.grad(want, (q, k, v), weights),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_key_bias_of_log_weights_repeats_keys(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((9,), q_heads=2), source, torch.float64)
    counts = torch.randint(1, 4, (9,), generator=source)
    repeated = [x.repeat_interleave(counts, dim=1) for x in (k, v)]
    want = fv.attend(q, *repeated, implementation="reference")
    for implementation in IMPLEMENTATIONS:
        score = fv.KeyBias(counts.double().log()[None, None])
        got = fv.attend(q, k, v, fv.Dense(), score, implementation=implementation)
        torch.testing.assert_close(got, want)


def test_sink_equals_one_more_key_without_value(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((9,), q_heads=2), source, torch.float64)
    sink = torch.randn(2, generator=source, dtype=torch.float64)
    extra = [torch.cat([torch.zeros(1, 1, 2, 8, dtype=x.dtype), x], 1) for x in (k, v)]
    bias = torch.zeros(1, 2, 9, 10, dtype=torch.float64)
    bias[..., 0] = sink[:, None]
    want = fv.attend(q, *extra, fv.Dense(), fv.Bias(bias), implementation="reference")
    for implementation in IMPLEMENTATIONS:
        got = fv.attend(q, k, v, fv.Dense(), fv.Softmax(sink=sink), implementation=implementation)
        torch.testing.assert_close(got, want)
