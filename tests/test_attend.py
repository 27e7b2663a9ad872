"""Outputs, lse and all gradients of every implementation against the float64 reference."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveal as fv
from foveal.testing import LAYOUTS, Sizes, check_attend, poisoned_allocations, qkv
from tests.problems import PATTERNS, SCORES, Grids, fits

HALVES = (torch.bfloat16, torch.float16)


def name_of(value: object) -> str:
    return value.key if isinstance(value, fv.Pattern) else str(value).removeprefix("torch.")


def sizes_of(grids: Grids, **options: int) -> Sizes:
    return Sizes(*grids, **{"batch": 2, "q_heads": 4, "kv_heads": 2, "value_dim": 5} | options)


def check_plain(
    draw: Callable[[], tuple[Tensor, Tensor, Tensor]],
    pattern: fv.Pattern,
    implementation: str | None = None,
) -> None:
    """`check_attend` on what may run as PyTorch's own fused attention.

    Its float32 gradients exceed what is allowed, by up to a sixth, on one problem in 600 (8 of 5,024, each
    with all neighbours); so a problem that fails is followed by another, which may not.
    """
    try:
        check_attend(*draw(), pattern, return_lse=False, implementation=implementation)
    except AssertionError:
        check_attend(*draw(), pattern, return_lse=False, implementation=implementation)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=name_of)
def test_cpu_agrees_for_every_pattern_and_score(
    pattern: fv.Pattern, grids: Grids, score: str, source: torch.Generator
) -> None:
    if not fits(score, grids):
        return
    sizes = sizes_of(grids)
    for dtype in (torch.float32, torch.float64):
        q, k, v = qkv(sizes, source, dtype)
        check_attend(q, k, v, pattern, SCORES[score](sizes, pattern, source), implementation="cpu")


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=name_of)
def test_cpu_agrees_in_half_precision(
    pattern: fv.Pattern, grids: Grids, dtype: torch.dtype, source: torch.Generator
) -> None:
    sizes = sizes_of(grids)
    q, k, v = qkv(sizes, source, dtype)
    for score in ("softmax", "sink", "everything"):
        if fits(score, grids):
            made = SCORES[score](sizes, pattern, source)
            check_attend(q, k, v, pattern, made, implementation="cpu")


@pytest.mark.parametrize("score", SCORES)
def test_scores_agree_in_half_precision(score: str, source: torch.Generator) -> None:
    sizes = Sizes((40,), batch=2, q_heads=6, kv_heads=2)
    for dtype in HALVES:
        q, k, v = qkv(sizes, source, dtype)
        made = SCORES[score](sizes, fv.Sliding(9, 2), source)
        check_attend(q, k, v, fv.Sliding(9, 2), made, implementation="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=name_of)
@pytest.mark.parametrize("pattern", [fv.Dense(), fv.Causal()], ids=name_of)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_plain_problems_agree_through_the_plan(
    pattern: fv.Pattern, dtype: torch.dtype, kv_heads: int, source: torch.Generator
) -> None:
    for length in (1, 33, 70):
        sizes = Sizes((length,), batch=2, q_heads=4, kv_heads=kv_heads)
        draw = functools.partial(qkv, sizes, source, dtype)
        for implementation in (None, "sdpa"):
            check_plain(draw, pattern, implementation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", [None, "cpu", "sdpa"])
@pytest.mark.parametrize("pattern", [fv.Dense(), fv.Causal()], ids=name_of)
def test_plain_problems_in_every_layout(
    pattern: fv.Pattern, implementation: str | None, layout: str, source: torch.Generator
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sizes = Sizes((37,), batch=2, q_heads=4, kv_heads=2, head_dim=12)
        draw = functools.partial(qkv, sizes, source, dtype, layout)
        check_plain(draw, pattern, implementation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("pattern", "grids"), PATTERNS[::3], ids=name_of)
def test_cpu_agrees_in_every_layout(
    pattern: fv.Pattern, grids: Grids, layout: str, source: torch.Generator
) -> None:
    q, k, v = qkv(sizes_of(grids), source, torch.float32, layout)
    check_attend(q, k, v, pattern, implementation="cpu")


@pytest.mark.parametrize("head_dim", [1, 7, 65, 200])
@pytest.mark.parametrize("value_dim", [1, 7, 65])
def test_odd_head_sizes(head_dim: int, value_dim: int, source: torch.Generator) -> None:
    sizes = Sizes((29,), q_heads=2, head_dim=head_dim, value_dim=value_dim)
    q, k, v = qkv(sizes, source)
    for pattern in (fv.Dense(), fv.Causal(), fv.Sliding(5), fv.Neighborhood(6, dilation=2)):
        check_attend(q, k, v, pattern, implementation="cpu")
        check_plain(functools.partial(qkv, sizes, source), pattern)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_query_heads_share_key_heads_in_order(kv_heads: int, source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((4, 5), batch=2, q_heads=6, kv_heads=kv_heads), source, torch.float64)
    group = 6 // kv_heads
    for implementation in ("reference", "cpu"):
        pattern = fv.Neighborhood((3, 3))
        o = fv.attend(q, k, v, pattern, implementation=implementation)
        for head in range(6):
            key_head = slice(head // group, head // group + 1)
            one = fv.attend(
                q[..., head : head + 1, :],
                k[..., key_head, :],
                v[..., key_head, :],
                pattern,
                implementation="reference",
            )
            torch.testing.assert_close(o[..., head : head + 1, :], one)


@pytest.mark.parametrize("pattern", [fv.Dense(), fv.Causal(), fv.Sliding(3, 1), fv.Strided(2)])
@pytest.mark.parametrize("implementation", [None, "cpu", "reference"])
@pytest.mark.parametrize(
    ("batch", "Lq", "Lk"), [(0, 5, 5), (1, 0, 0), (1, 0, 5), (2, 5, 0), (0, 0, 0), (1, 1, 1)]
)
def test_empty_and_single(
    pattern: fv.Pattern, implementation: str | None, batch: int, Lq: int, Lk: int
) -> None:
    q = torch.ones(batch, Lq, 4, 3, requires_grad=True)
    k = torch.ones(batch, Lk, 2, 3, requires_grad=True)
    v = torch.ones(batch, Lk, 2, 6, requires_grad=True)
    o, lse = fv.attend(q, k, v, pattern, return_lse=True, implementation=implementation)
    assert o.shape == (batch, Lq, 4, 6)
    assert lse.shape == (batch, Lq, 4)
    if Lk == 0:
        assert bool((o == 0).all())
        assert bool((lse == -torch.inf).all())
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert gradient.shape == x.shape
        assert bool(gradient.isfinite().all())
    assert fv.attend(q, k, v, pattern, implementation=implementation).shape == o.shape


@pytest.mark.parametrize("grids", [((1, 1), (1, 1)), ((1, 1, 1), (1, 1, 1)), ((1,), (1,))])
def test_one_token(grids: Grids, source: torch.Generator) -> None:
    q, k, v = qkv(Sizes(*grids, q_heads=2, kv_heads=1), source)
    for pattern in (fv.Neighborhood(1), fv.Partition(3, 1), fv.Axial(0), fv.Causal()):
        for implementation in (None, "cpu"):
            o = fv.attend(q, k, v, pattern, implementation=implementation)
            torch.testing.assert_close(o, v.expand_as(o))
        check_attend(q, k, v, pattern, implementation="cpu")


@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=name_of)
def test_nothing_unwritten_is_read(
    pattern: fv.Pattern, grids: Grids, source: torch.Generator
) -> None:
    sizes = sizes_of(grids)
    q, k, v = qkv(sizes, source)
    with poisoned_allocations():
        check_attend(q, k, v, pattern, implementation="cpu")
        check_attend(q, k, v, pattern, SCORES["sink"](sizes, pattern, source), implementation="cpu")
        if isinstance(pattern, fv.Dense | fv.Causal):
            check_attend(q, k, v, pattern, return_lse=False)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize(
    "pattern",
    [fv.Dense(), fv.Causal(), fv.Sliding(3, sink_tokens=1), fv.Neighborhood(5)],
    ids=name_of,
)
def test_scales_that_turn_the_order_round(
    pattern: fv.Pattern, scale: float, source: torch.Generator
) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(Sizes((30,), q_heads=2), source, torch.float64))
    s = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    w = s.masked_fill(~pattern.dense_mask(30, 30), -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", w, v)
    weight = torch.randn(expected.shape, generator=source, dtype=torch.float64)
    for implementation in (None, "cpu", "reference"):
        o = fv.attend(q, k, v, pattern, fv.Softmax(scale=scale), implementation=implementation)
        torch.testing.assert_close(o, expected)
        got, wanted = (
            torch.autograd.grad(side, (q, k, v), weight, retain_graph=True)
            for side in (o, expected)
        )
        torch.testing.assert_close(got, wanted)


def test_lse_is_the_log_of_the_denominator(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((11,), q_heads=2), source, torch.float64)
    _, lse = fv.attend(q, k, v, fv.Sliding(3), fv.Softmax(scale=0.5), return_lse=True)
    scores = 0.5 * torch.einsum("bihd,bjhd->bihj", q, k)
    for i in range(11):
        expected = torch.logsumexp(scores[:, i, :, max(0, i - 3) : i + 1], dim=-1)
        torch.testing.assert_close(lse[:, i], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=name_of)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_dtypes_of_the_results(dtype: torch.dtype, implementation: str) -> None:
    q = torch.ones(1, 4, 2, 3, dtype=dtype)
    o, lse = fv.attend(q, q, q, fv.Sliding(1), return_lse=True, implementation=implementation)
    assert o.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "table", "sink", "none"])
def test_gradients_of_one_tensor_only(wanted: str, source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((5, 6), q_heads=2), source)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "table": torch.randn(2, 5, 5, generator=source),
        "sink": torch.randn(2, generator=source),
    }
    if wanted != "none":
        tensors[wanted].requires_grad_()
    results = []
    for implementation in ("cpu", "reference"):
        score = fv.Softmax(sink=tensors["sink"]) + fv.RelativeBias(tensors["table"])
        o = fv.attend(q, k, v, fv.Neighborhood(3), score, implementation=implementation)
        assert o.requires_grad == (wanted != "none")
        if wanted != "none":
            results.append(torch.autograd.grad(o.square().sum(), tensors[wanted])[0])
    if results:
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_the_caller_keeps_their_tensors(source: torch.Generator) -> None:
    """No implementation writes into what it was given."""
    sizes = Sizes((6, 5), q_heads=2)
    q, k, v = qkv(sizes, source)
    pattern = fv.Neighborhood(3)
    score = SCORES["everything"](sizes, pattern, source)
    before = [x.clone() for x in (q, k, v)]
    for implementation in ("cpu", "reference"):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        fv.attend(*leaves, pattern, score, implementation=implementation).sum().backward()
        for x, kept in zip((q, k, v), before, strict=True):
            assert torch.equal(x.detach(), kept)


def test_results_repeat_exactly(source: torch.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(Sizes((9, 10), q_heads=3), source))

    def results() -> list[torch.Tensor]:
        o = fv.attend(q, k, v, fv.Neighborhood((5, 4), dilation=(1, 2)))
        return [o, *torch.autograd.grad(o.sum(), (q, k, v))]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


@pytest.mark.parametrize("score", [fv.Softmax(), fv.Softmax(soft_cap=5.0)], ids=lambda s: s.key)
def test_modes_of_the_caller_hold_in_the_worker_threads(
    score: fv.Score, source: torch.Generator
) -> None:
    q, k, v = qkv(Sizes((9000,), q_heads=2, head_dim=8), source)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = fv.attend(q.requires_grad_(), k, v, fv.Sliding(40), score)
        (dq,) = torch.autograd.grad(expected.sum(), q)
        with torch.inference_mode():
            found = fv.attend(q, k, v, fv.Sliding(40), score)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, expected)
    assert dq.isfinite().all()


def test_inference_mode_and_no_grad(source: torch.Generator) -> None:
    q, k, v = qkv(Sizes((30,)), source)
    expected = fv.attend(q, k, v, fv.Sliding(4))
    with torch.inference_mode():
        torch.testing.assert_close(fv.attend(q, k, v, fv.Sliding(4)), expected)
    with torch.no_grad():
        o = fv.attend(q.requires_grad_(), k, v, fv.Sliding(4))
    assert not o.requires_grad
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION])
def test_backends_that_the_caller_turned_off_do_not_matter(
    backend: SDPBackend, source: torch.Generator
) -> None:
    q, k, v = qkv(Sizes((50,), q_heads=2, head_dim=8), source)
    with sdpa_kernel(backend):
        check_attend(q, k, v, fv.Sliding(9), return_lse=False, implementation="cpu")
