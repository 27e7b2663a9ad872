"""NATTEN's interface against its rules, written out pair by pair and computed densely in float64."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
import foveal.compat.natten as natten
from foveal.testing.bounds import check_near, error, neighbour
from tests.pattern_rules import neighborhood_keys, place, product_mask

OPERATORS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
QK = {1: natten.na1d_qk, 2: natten.na2d_qk, 3: natten.na3d_qk}
AV = {1: natten.na1d_av, 2: natten.na2d_av, 3: natten.na3d_av}


def per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * axes


def keys_of(grid: tuple[int, ...], arguments: dict[str, Any]) -> Any:
    names = (("kernel_size", 7), ("stride", 1), ("dilation", 1), ("is_causal", False))
    rules = [per_axis(arguments.get(*name), len(grid)) for name in names]

    def of(axis: int, i: int) -> list[int]:
        window, stride, dilation, causal = (rule[axis] for rule in rules)
        return neighborhood_keys(grid[axis], i, window, stride, dilation, causal, "shift")

    return of


def dense(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, extra: Any = None
) -> tuple[Tensor, Tensor]:
    grid = q.shape[1:-2]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    if extra is not None:
        k, v = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)
        visible = torch.cat([visible, visible.new_ones(len(visible), extra[0].shape[1])], 1)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    scores = scores.masked_fill(~visible, -torch.inf)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return o.unflatten(1, grid), scores.logsumexp(-1).transpose(1, 2).unflatten(1, grid)


def problem(chance: random.Random) -> tuple[tuple[int, ...], dict[str, Any]]:
    axes = chance.choice((1, 2, 2, 3))
    grid = tuple(chance.randint(2, {1: 24, 2: 8, 3: 5}[axes]) for _ in range(axes))
    rules = []
    for length in grid:
        dilation = chance.choice([d for d in (1, 1, 2, 3) if d <= length])
        window = chance.randint(1, length // dilation)
        rules.append((window, chance.randint(1, window), dilation, chance.random() < 0.4))
    names = ("kernel_size", "stride", "dilation", "is_causal")
    return grid, dict(zip(names, zip(*rules, strict=True), strict=True))


def draw(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_()


def assert_same(left: Any, right: Any, inputs: Any) -> None:
    sides = []
    for side in (left, right):
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in side]
        sides.append(torch.autograd.grad(side, inputs, weights, materialize_grads=True))
    for a, b in zip((*left, *sides[0]), (*right, *sides[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def chance_of(source: torch.Generator) -> random.Random:
    return random.Random(source.initial_seed())


@pytest.mark.parametrize("round_", range(24))
def test_fused_operators_follow_the_rules(round_: int, source: torch.Generator) -> None:
    chance = chance_of(source)
    grid, arguments = problem(chance)
    kv_heads = chance.choice((1, 2))
    heads, dim, value_dim = kv_heads * chance.choice((1, 3)), 4, chance.choice((4, 2))
    q = draw(source, 2, *grid, heads, dim)
    k, v = draw(source, 2, *grid, kv_heads, dim), draw(source, 2, *grid, kv_heads, value_dim)
    extra, inputs = None, [q, k, v]
    if chance.random() < 0.5:
        count = chance.randint(1, 6)
        extra = draw(source, 2, count, kv_heads, dim), draw(source, 2, count, kv_heads, value_dim)
        inputs += extra
        arguments |= {"additional_keys": extra[0], "additional_values": extra[1]}
    scale = chance.choice((None, 0.3))
    operator = OPERATORS[len(grid)]
    got = operator(q, k, v, scale=scale, return_lse=True, **arguments)
    visible = product_mask(grid, keys_of(grid, arguments))
    assert_same(got, dense(q, k, v, visible, scale, extra), inputs)


@pytest.mark.parametrize("round_", range(16))
def test_the_unfused_pair_follows_the_rules(round_: int, source: torch.Generator) -> None:
    """Slot by slot: the s-th key of the window in raster order, -inf where there is none."""
    chance = chance_of(source)
    grid, arguments = problem(chance)
    windows = arguments["kernel_size"]
    q, k, v = (draw(source, 2, 3, *grid, 4) for _ in range(3))
    rpb = (
        draw(source, 3, *(2 * window - 1 for window in windows)) if chance.random() < 0.6 else None
    )
    extra = [draw(source, 2, 3, 2, 4) for _ in range(2)] if chance.random() < 0.5 else None
    of, length = keys_of(grid, arguments), math.prod(grid)
    slots = math.prod(windows)
    index = torch.zeros(length, slots, dtype=torch.int64)
    exists = torch.zeros(length, slots, dtype=torch.bool)
    entry = torch.zeros(length, slots, dtype=torch.int64)
    for i in range(length):
        own = place(i, grid)
        lines = [of(axis, at) for axis, at in enumerate(own)]
        for places in itertools.product(*(range(len(line)) for line in lines)):
            slot = raster(places, windows)
            key = [line[p] for line, p in zip(lines, places, strict=True)]
            index[i, slot], exists[i, slot] = raster(key, grid), True
            steps = [
                (b - a) // d + w - 1
                for a, b, d, w in zip(own, key, arguments["dilation"], windows, strict=True)
            ]
            entry[i, slot] = raster(steps, [2 * w - 1 for w in windows])
    expected = torch.einsum("bhid,bhisd->bhis", q.flatten(2, -2), k.flatten(2, -2)[:, :, index])
    if rpb is not None:
        expected = expected + rpb.flatten(1)[:, entry]
    expected = expected.masked_fill(~exists, -torch.inf)
    values = v.flatten(2, -2)[:, :, index]
    if extra is not None:
        expected = torch.cat([expected, q.flatten(2, -2) @ extra[0].transpose(2, 3)], -1)
        values = torch.cat([values, extra[1][:, :, None].expand(-1, -1, length, -1, -1)], 3)
    keyed = {"additional_keys": extra[0]} if extra else {}
    valued = {"additional_values": extra[1]} if extra else {}
    attn = QK[len(grid)](q, k, rpb=rpb, **arguments, **keyed)
    torch.testing.assert_close(attn.flatten(2, -2), expected, rtol=1e-10, atol=1e-12)
    o = AV[len(grid)](attn.softmax(-1), v, **arguments, **valued)
    o_expected = torch.einsum("bhis,bhisd->bhid", expected.softmax(-1), values)
    inputs = [x for x in (q, k, v, rpb, *(extra or ())) if x is not None]
    assert_same((o.flatten(2, -2),), (o_expected,), inputs)


@pytest.mark.parametrize(
    ("grid", "arguments"),
    [
        ((16, 32), {"kernel_size": (8, 16), "stride": (1, 2), "dilation": (2, 1)}),
        (
            (6, 8, 10),
            {
                "kernel_size": (2, 4, 6),
                "stride": (1, 1, 4),
                "dilation": (1, 2, 1),
                "is_causal": (True, False, False),
            },
        ),
    ],
)
def test_documented_examples(
    grid: tuple[int, ...], arguments: dict[str, Any], source: torch.Generator
) -> None:
    """The example of its two-dimensional module, and half of that of its three-dimensional one."""
    q, k, v = (draw(source, 1, *grid, 1, 4) for _ in range(3))
    visible = product_mask(grid, keys_of(grid, arguments))
    got = OPERATORS[len(grid)](q, k, v, return_lse=True, **arguments)
    assert_same(got, dense(q, k, v, visible, None), (q, k, v))


def raster(places: Any, sizes: Any) -> int:
    total = 0
    for at, size in zip(places, sizes, strict=True):
        total = total * size + at
    return total


@pytest.mark.parametrize("round_", range(4))
def test_unfused_equals_fused(round_: int, source: torch.Generator) -> None:
    grid, arguments = problem(chance_of(source))
    q, k, v = (draw(source, 1, *grid, 2, 4) for _ in range(3))
    first = [x.movedim(-2, 1) for x in (q, k, v)]
    attn = natten.na_qk(first[0] * 0.5, first[1], **arguments).softmax(-1)
    o = natten.na_av(attn, first[2], **arguments).movedim(1, -2)
    assert_same((o,), (OPERATORS[len(grid)](q, k, v, **arguments),), (q, k, v))


def test_chunks_of_the_unfused_pair_do_not_show(
    monkeypatch: pytest.MonkeyPatch, source: torch.Generator
) -> None:
    q, k, v = (draw(source, 2, 2, 5, 6, 3) for _ in range(3))
    results = []
    for chunk in (1 << 24, 300):
        monkeypatch.setattr("foveal.compat.natten.unfused._CHUNK", chunk)
        attn = natten.na2d_qk(q, k, 3)
        o = natten.na2d_av(attn.softmax(-1), v, 3)
        results.append((o, *torch.autograd.grad(o.sin().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_it_can_be(dtype: torch.dtype, source: torch.Generator) -> None:
    grid, arguments = (7, 9), {"kernel_size": (5, 3), "stride": (2, 1), "is_causal": (True, False)}
    tensors = [torch.randn(2, *grid, 2, 8, generator=source).to(dtype) for _ in range(3)]
    extra = [torch.randn(2, 3, 2, 8, generator=source).to(dtype) for _ in range(2)]
    visible = product_mask(grid, keys_of(grid, arguments))
    got = natten.na2d(*tensors, additional_keys=extra[0], additional_values=extra[1], **arguments)
    assert got.dtype == dtype

    def results(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        exact, _ = dense(*(x.double() for x in tensors), visible, None, [x.double() for x in extra])
        plain, _ = dense(*tensors, visible, None, extra)
        return plain, exact

    def errors_at(number: int) -> dict[str, float]:
        near = [neighbour(x, source) for x in tensors] if number else tensors
        return {"o": error(*results(near))}

    (verdict,) = check_near({"o": got}, {"o": results(tensors)[1]}, errors_at)
    assert verdict.ok, str(verdict)


def test_a_whole_window_is_attention(source: torch.Generator) -> None:
    q, k, v = (draw(source, 2, 4, 5, 2, 3) for _ in range(3))
    flat = natten.attention(*(x.flatten(1, 2) for x in (q, k, v)), return_lse=True)
    whole = natten.na2d(q, k, v, kernel_size=(4, 5), return_lse=True)
    assert_same([x.flatten(1, 2) for x in whole], flat, (q, k, v))


def test_attention_is_causal_and_packed(source: torch.Generator) -> None:
    q, k, v = (draw(source, 1, 9, 2, 3) for _ in range(3))
    lengths = torch.tensor([4, 5])
    packed = natten.attention(
        q, k, v, is_causal=True, seqlens_Q=lengths, seqlens_KV=lengths, return_lse=True
    )
    pieces = [
        natten.attention(*(x[:, cut] for x in (q, k, v)), is_causal=True, return_lse=True)
        for cut in (slice(0, 4), slice(4, 9))
    ]
    expected = [torch.cat(pair, dim=1) for pair in zip(*pieces, strict=True)]
    assert_same(packed, expected, (q, k, v))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    again = natten.attention(
        q, k, v, is_causal=True, cumulative_seqlen_Q=cu, cumulative_seqlen_KV=cu, max_seqlen_Q=5
    )
    torch.testing.assert_close(again, packed[0])
    with pytest.raises(fv.errors.PackingError, match="queries"):
        natten.attention(q, k, v, seqlens_Q=lengths, seqlens_KV=torch.tensor([5, 4]))
    with pytest.raises(fv.errors.ShapeError, match="causal"):
        natten.attention(q, k[:, 1:], v[:, 1:], is_causal=True)


def test_merging_equals_one_call(source: torch.Generator) -> None:
    q, k, v = (draw(source, 1, 8, 2, 3) for _ in range(3))
    cuts = (slice(0, 3), slice(3, 8))
    parts = [natten.attention(q, k[:, cut], v[:, cut], return_lse=True) for cut in cuts]
    merged = natten.merge_attentions(*zip(*parts, strict=True), torch_compile=False)
    assert_same(merged, natten.attention(q, k, v, return_lse=True), (q, k, v))
    with pytest.raises(fv.errors.ShapeError, match="two"):
        natten.merge_attentions([parts[0][0]], [parts[0][1]])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("table", [False, True])
def test_modules_are_projections_around_the_operator(
    axes: int, table: bool, source: torch.Generator
) -> None:
    kind = getattr(natten, f"NeighborhoodAttention{axes}D")
    module = kind(12, 3, kernel_size=3, dilation=2, qk_scale=0.7, rel_pos_bias=table).double()
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"} | ({"rpb"} if table else set())
    assert set(module.state_dict()) == names
    x = draw(source, 2, *(7, 6, 6)[:axes], 12)
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).movedim(-2, 1).unbind(-2)
    attn = natten.na_qk(q * 0.7, k, 3, 2, rpb=module.rpb).softmax(-1)
    expected = module.proj(natten.na_av(attn, v, 3, 2).movedim(1, -2).flatten(-2))
    assert_same((module(x),), (expected,), (x, *module.parameters()))
    with pytest.raises(fv.errors.ShapeError, match="is needed"):
        module(x[0])


STEERING = {
    "q_tile_shape": (8, 8),
    "kv_tile_shape": (8, 8),
    "backward_q_tile_shape": (8, 8),
    "backward_kv_tile_shape": (8, 8),
    "backward_kv_splits": (2, 2),
    "backward_use_pt_reduction": True,
    "run_persistent_kernel": False,
    "kernel_schedule": "pp",
    "torch_compile": True,
    "backend": "hopper-fna",
}


@pytest.mark.parametrize("name", STEERING)
def test_what_steers_other_kernels_is_said_to_mean_nothing(
    name: str, source: torch.Generator
) -> None:
    q, k, v = (torch.randn(1, 5, 5, 2, 4, generator=source) for _ in range(3))
    with pytest.warns(natten.IgnoredArgumentWarning, match=name) as said:
        o = natten.na2d(q, k, v, kernel_size=3, **{name: STEERING[name]})
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(o, natten.na2d(q, k, v, 3, backend="cpu"))


def test_settings_tell_how_things_are() -> None:
    for mode in (True, False):
        natten.use_deterministic_algorithms(mode)
        assert natten.are_deterministic_algorithms_enabled() == mode
        assert torch.are_deterministic_algorithms_enabled() == mode
    natten.set_memory_usage_preference("default")
    for call in (
        lambda: natten.use_kv_parallelism_in_fused_na(True),
        lambda: natten.set_memory_usage_preference("unrestricted"),
    ):
        with pytest.warns(natten.IgnoredArgumentWarning, match="changes nothing"):
            call()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    assert natten.get_memory_usage_preference() == "default"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 9}, "window"),
        ({"kernel_size": 3.0}, "kernel_size: got 3.0"),
        ({"kernel_size": None}, "kernel_size: got None"),
        ({"kernel_size": 3, "stride": (1, 1, 1)}, "stride: got"),
        ({"kernel_size": 3, "is_causal": (2, 0)}, "causal"),
        ({"kernel_size": 3, "stride": 4}, "stride"),
        ({"kernel_size": 3, "dilation": 3}, "dilation"),
        ({"kernel_size": (3, 3, 3)}, "2 axes"),
        ({"kernel_size": 3, "additional_keys": torch.zeros(1, 2, 2, 4)}, "additional_keys"),
        ({"kernel_size": 3, "backend": "magic"}, "backend"),
        ({"kernel_size": 3, "attention_kwargs": {"magic": 1}}, "attention_kwargs"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], message: str, source: torch.Generator
) -> None:
    q = torch.randn(1, 6, 6, 2, 4, generator=source)
    with pytest.raises(ValueError, match=message):
        natten.na2d(q, q, q, **arguments)


def test_wrong_operands_of_the_unfused_pair_are_named() -> None:
    q = torch.zeros(1, 2, 9, 4)
    for given, options, message in (
        ((q, q.double(), 3), {}, "key: got torch.float64"),
        ((q, q, 3), {"rpb": torch.zeros(3, 5)}, "rpb: got"),
        ((q, q, 3), {"rpb": torch.zeros(2, 5, 5)}, "rpb: got"),
        ((q, q, 3), {"additional_keys": torch.zeros(1, 2, 2, 5)}, "additional_keys: got"),
        (([1], q, 3), {}, "query: got a list"),
    ):
        with pytest.raises(fv.errors.FovealError) as raised:
            natten.na1d_qk(*given, **options)
        assert message in str(raised.value)


def test_ranks_are_checked(source: torch.Generator) -> None:
    q = torch.randn(1, 6, 6, 2, 4, generator=source)
    with pytest.raises(fv.errors.ShapeError, match="query"):
        natten.na1d(q, q, q, kernel_size=3)
    with pytest.raises(fv.errors.ShapeError, match="3 axes"):
        natten.na3d_qk(q, q, 3)
    with pytest.raises(fv.errors.ShapeError, match="weights"):
        natten.na2d_av(torch.randn(1, 2, 6, 6, 8), q.movedim(-2, 1), 3)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_names_of_old_versions(axes: int, source: torch.Generator) -> None:
    from foveal.compat.natten import functional

    grid = (9, 8, 7)[:axes]
    q, k, v = (torch.randn(2, 3, *grid, 4, generator=source) for _ in range(3))
    rpb = torch.randn(3, *(5,) * axes, generator=source)
    qk, qkrpb, av = (getattr(functional, f"natten{axes}d{name}") for name in ("qk", "qkrpb", "av"))
    bare, biased = qk(q, k, 3, 2), qkrpb(q, k, rpb, 3, 2)
    assert torch.equal(bare, natten.na_qk(q, k, 3, 2))
    assert torch.equal(biased, natten.na_qk(q, k, 3, 2, rpb=rpb))
    assert torch.equal(qkrpb(q, k, None, 3, 2), bare)
    assert torch.equal(av(biased, v, 3, 2), natten.na_av(biased, v, 3, 2))
