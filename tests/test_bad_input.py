"""Every row of the bad-input table: what is raised, what it says, and that nothing was computed."""

import re
from collections.abc import Callable

import pytest
import torch

import foveal as fv
from foveal import errors
from foveal.scores.base import Score
from tests.watch import COMPUTING, Watch

Q = torch.randn(2, 8, 4, 6)
K = torch.randn(2, 8, 2, 6)
GRID = torch.randn(1, 4, 6, 2, 3)
PACKED = torch.randn(1, 10, 2, 3)


def lists(*rows: list[int], q_block: int = 4, kv_block: int = 4) -> fv.Blocks:
    indices = torch.tensor(rows, dtype=torch.int32)[None, None]
    return fv.Blocks(fv.BlockSelection(indices, q_block, kv_block))


def refusal(error: type[Exception], argument: str, came: str, needed: str, **call: object):
    """A bad call and the error that it must raise."""
    return pytest.param(error, argument, came, needed, call, id=f"{argument}: {came}"[:60])


def with_score(score: Score, **call: object) -> dict[str, object]:
    return {"score": score, **call}


class Foreign(Score):
    """A score that no engine knows."""


TENSORS = [
    refusal(errors.ShapeError, "q", "[8, 4, 6]", "axes", q=Q[0]),
    refusal(errors.ShapeError, "k", "[8, 2, 6]", "axes", k=K[0]),
    refusal(errors.ShapeError, "v", "[8, 2, 6]", "axes", v=K[0]),
    refusal(
        errors.ShapeError, "q", "[1, 1, 1, 1, 1, 4, 6]", "axes", q=torch.ones(1, 1, 1, 1, 1, 4, 6)
    ),
    refusal(errors.ShapeError, "k", "[2, 2, 4, 2, 6]", "axes", k=K.unflatten(1, (2, 4))),
    refusal(errors.ShapeError, "k", "[3, 8, 2, 6]", "batch", k=torch.ones(3, 8, 2, 6)),
    refusal(
        errors.ShapeError,
        "k",
        "[2, 8, 3, 6]",
        "divide the 4",
        k=torch.ones(2, 8, 3, 6),
        v=torch.ones(2, 8, 3, 6),
    ),
    refusal(
        errors.ShapeError,
        "k",
        "[2, 8, 8, 6]",
        "divide the 4",
        k=torch.ones(2, 8, 8, 6),
        v=torch.ones(2, 8, 8, 6),
    ),
    refusal(
        errors.ShapeError,
        "k",
        "[2, 8, 0, 6]",
        "heads",
        k=torch.ones(2, 8, 0, 6),
        v=torch.ones(2, 8, 0, 6),
    ),
    refusal(errors.ShapeError, "k", "[2, 8, 2, 5]", "head_dim", k=torch.ones(2, 8, 2, 5)),
    refusal(errors.ShapeError, "v", "[2, 7, 2, 6]", "[2, 8, 2, 6]", v=torch.ones(2, 7, 2, 6)),
    refusal(errors.ShapeError, "v", "[2, 8, 1, 6]", "[2, 8, 2, 6]", v=torch.ones(2, 8, 1, 6)),
    refusal(errors.ShapeError, "v", "[1, 8, 2, 6]", "[2, 8, 2, 6]", v=torch.ones(1, 8, 2, 6)),
    refusal(errors.DtypeError, "q", "torch.int64", "float", q=Q.long()),
    refusal(errors.DtypeError, "v", "torch.complex64", "float", v=K.to(torch.complex64)),
    refusal(errors.DtypeError, "k", "torch.bfloat16", "torch.float32", k=K.bfloat16()),
    refusal(errors.DtypeError, "v", "torch.float64", "torch.float32", v=K.double()),
    refusal(errors.DeviceError, "k", "meta", "cpu", k=K.to("meta")),
    refusal(errors.DeviceError, "v", "meta", "cpu", v=K.to("meta")),
]

GRIDS = {"q": GRID, "k": GRID, "v": GRID}
PATTERNS = [
    refusal(errors.PatternError, "window", "9", "8 tokens", pattern=fv.Neighborhood(9)),
    refusal(
        errors.PatternError,
        "window",
        "5 with dilation 2",
        "8 tokens",
        pattern=fv.Neighborhood(5, dilation=2),
    ),
    refusal(
        errors.PatternError, "window", "5", "4 tokens", pattern=fv.Neighborhood((5, 3)), **GRIDS
    ),
    refusal(
        errors.PatternError,
        "pattern",
        "Neighborhood((3, 3))",
        "2 axes",
        pattern=fv.Neighborhood((3, 3)),
    ),
    refusal(
        errors.PatternError,
        "pattern",
        "Partition((3, 3, 3))",
        "3 axes",
        pattern=fv.Partition((3, 3, 3)),
        **GRIDS,
    ),
    refusal(
        errors.PatternError,
        "dilation",
        "3",
        "divide",
        pattern=fv.Neighborhood(2, dilation=3, border="wrap"),
    ),
    refusal(errors.PatternError, "axis", "2", "2 axes", pattern=fv.Axial(2), **GRIDS),
    refusal(errors.PatternError, "axis", "-3", "2 axes", pattern=fv.Axial(-3), **GRIDS),
    refusal(
        errors.PatternError,
        "Neighborhood",
        "(2, 6)",
        "same grid",
        pattern=fv.Neighborhood(2),
        q=GRID[:, :2],
        k=GRID,
        v=GRID,
    ),
    refusal(
        errors.PatternError,
        "pattern",
        "Axial",
        "share the grid",
        pattern=fv.Axial(1),
        q=GRID[:, :2],
        k=GRID,
        v=GRID,
    ),
    refusal(
        errors.PatternError,
        "pattern",
        "Partition",
        "share the grid",
        pattern=fv.Partition(2),
        q=GRID[:, :2],
        k=GRID,
        v=GRID,
    ),
    refusal(errors.PatternError, "pattern", "Documents()", "cu_seqlens", pattern=fv.Documents()),
    refusal(
        errors.PatternError,
        "pattern",
        "Documents()",
        "cu_seqlens",
        pattern=fv.Documents() & fv.Causal(),
    ),
    refusal(errors.SelectionError, "indices", "[1, 1, 1, 1]", "2 lists", pattern=lists([0])),
    refusal(errors.SelectionError, "indices", "block 2", "2 blocks", pattern=lists([0], [2])),
    refusal(
        errors.SelectionError,
        "indices",
        "[1, 3, 2, 1]",
        "head",
        pattern=fv.Blocks(fv.BlockSelection(torch.zeros(1, 3, 2, 1, dtype=torch.int32), 4, 4)),
    ),
    refusal(
        errors.SelectionError,
        "indices",
        "[3, 1, 2, 1]",
        "batch",
        pattern=fv.Blocks(fv.BlockSelection(torch.zeros(3, 1, 2, 1, dtype=torch.int32), 4, 4)),
    ),
]

PACKS = {"q": PACKED, "k": PACKED, "v": PACKED}
PACKINGS = [
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "[0, 6, 4, 10]",
        "descend",
        cu_seqlens=torch.tensor([0, 6, 4, 10]),
        **PACKS,
    ),
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "[0, 4, 9]",
        "10",
        cu_seqlens=torch.tensor([0, 4, 9]),
        **PACKS,
    ),
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "[0, 4, 11]",
        "10",
        cu_seqlens=torch.tensor([0, 4, 11]),
        **PACKS,
    ),
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "[1, 4, 10]",
        "start at 0",
        cu_seqlens=torch.tensor([1, 4, 10]),
        **PACKS,
    ),
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "[0]",
        "N + 1",
        cu_seqlens=torch.tensor([], dtype=torch.int32),
        **PACKS,
    ),
    refusal(errors.PackingError, "cu_seqlens", "[0]", "10", cu_seqlens=torch.tensor([0]), **PACKS),
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "[1, 2]",
        "integers",
        cu_seqlens=torch.tensor([[0, 10]]),
        **PACKS,
    ),
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "[2]",
        "integers",
        cu_seqlens=torch.tensor([0.0, 10.0]),
        **PACKS,
    ),
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "(4, 6)",
        "packed alike",
        cu_seqlens=torch.tensor([0, 24]),
        **GRIDS,
    ),
    refusal(
        errors.PackingError,
        "cu_seqlens",
        "(4,)",
        "packed alike",
        cu_seqlens=torch.tensor([0, 10]),
        q=PACKED[:, :4],
        k=PACKED,
        v=PACKED,
    ),
    refusal(
        errors.PatternError,
        "window",
        "5",
        "4 tokens",
        cu_seqlens=torch.tensor([0, 4, 10]),
        pattern=fv.Neighborhood(5),
        **PACKS,
    ),
]

SCORES = [
    refusal(errors.ScoreError, "sink", "[2]", "[4]", **with_score(fv.Softmax(sink=torch.ones(2)))),
    refusal(
        errors.ScoreError, "sink", "[1, 4]", "[4]", **with_score(fv.Softmax(sink=torch.ones(1, 4)))
    ),
    refusal(
        errors.ScoreError, "Bias", "[8, 8]", "[2, 4, 8, 8]", **with_score(fv.Bias(torch.ones(8, 8)))
    ),
    refusal(
        errors.ScoreError,
        "Bias",
        "[2, 2, 8, 8]",
        "[2, 4, 8, 8]",
        **with_score(fv.Bias(torch.ones(2, 2, 8, 8))),
    ),
    refusal(
        errors.ScoreError,
        "Bias",
        "[2, 4, 8, 7]",
        "[2, 4, 8, 8]",
        **with_score(fv.Bias(torch.ones(2, 4, 8, 7))),
    ),
    refusal(
        errors.ScoreError, "KeyBias", "[2, 8]", "8", **with_score(fv.KeyBias(torch.ones(2, 8)))
    ),
    refusal(
        errors.ScoreError,
        "KeyBias",
        "[2, 3, 8]",
        "[1, 2, 4]",
        **with_score(fv.KeyBias(torch.ones(2, 3, 8))),
    ),
    refusal(
        errors.ScoreError,
        "KeyBias",
        "[3, 1, 8]",
        "[2 or 1",
        **with_score(fv.KeyBias(torch.ones(3, 1, 8))),
    ),
    refusal(errors.ScoreError, "slopes", "[2]", "[4]", **with_score(fv.Alibi(torch.ones(2)))),
    refusal(
        errors.ScoreError,
        "Alibi",
        "(4, 6)",
        "one axis",
        **with_score(fv.Alibi(torch.ones(2)), **GRIDS),
    ),
    refusal(
        errors.ScoreError,
        "table",
        "[4, 15, 15]",
        "odd size",
        **with_score(fv.RelativeBias(torch.ones(4, 15, 15))),
    ),
    refusal(
        errors.ScoreError,
        "table",
        "[4, 14]",
        "odd size",
        **with_score(fv.RelativeBias(torch.ones(4, 14))),
    ),
    refusal(
        errors.ScoreError,
        "table",
        "[3, 15]",
        "[4 or 1]",
        **with_score(fv.RelativeBias(torch.ones(3, 15))),
    ),
    refusal(
        errors.ScoreError,
        "table",
        "[4, 13]",
        "15 entries",
        **with_score(fv.RelativeBias(torch.ones(4, 13))),
    ),
    refusal(
        errors.ScoreError,
        "table",
        "[4, 7]",
        "9 entries",
        pattern=fv.Neighborhood(5),
        score=fv.RelativeBias(torch.ones(4, 7)),
    ),
    refusal(
        errors.ScoreError,
        "score",
        "Softmax",
        "at most one Softmax",
        **with_score(fv.Softmax() + fv.Softmax()),
    ),
    refusal(errors.ScoreError, "score", "Foreign", "additive terms", **with_score(Foreign())),
    refusal(
        errors.DeviceError,
        "Bias",
        "meta",
        "cpu",
        **with_score(fv.Bias(torch.ones(1, 1, 8, 8, device="meta"))),
    ),
    refusal(
        errors.DeviceError,
        "KeyBias",
        "meta",
        "cpu",
        **with_score(fv.KeyBias(torch.ones(1, 1, 8, device="meta"))),
    ),
    refusal(
        errors.DeviceError,
        "slopes",
        "meta",
        "cpu",
        **with_score(fv.Alibi(torch.ones(4, device="meta"))),
    ),
    refusal(
        errors.DeviceError,
        "table",
        "meta",
        "cpu",
        **with_score(fv.RelativeBias(torch.ones(1, 15, device="meta"))),
    ),
    refusal(
        errors.DeviceError,
        "sink",
        "meta",
        "cpu",
        **with_score(fv.Softmax(sink=torch.ones(4, device="meta"))),
    ),
    refusal(
        errors.DtypeError,
        "Bias",
        "torch.int64",
        "float",
        **with_score(fv.Bias(torch.ones(1, 1, 8, 8, dtype=torch.int64))),
    ),
    refusal(
        errors.DtypeError,
        "Bias",
        "torch.bool",
        "float",
        **with_score(fv.Bias(torch.ones(1, 1, 8, 8, dtype=torch.bool))),
    ),
    refusal(
        errors.DtypeError,
        "sink",
        "torch.int64",
        "float",
        **with_score(fv.Softmax(sink=torch.ones(4, dtype=torch.int64))),
    ),
]


@pytest.mark.parametrize(
    ("error", "argument", "came", "needed", "call"), [*TENSORS, *PATTERNS, *PACKINGS, *SCORES]
)
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_bad_call_says_what_is_needed(
    error: type[Exception],
    argument: str,
    came: str,
    needed: str,
    call: dict[str, object],
    implementation: str | None,
) -> None:
    arguments = {"q": Q, "k": K, "v": K, "implementation": implementation} | call
    with Watch() as watch, pytest.raises(error) as raised:
        fv.attend(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{argument}: got "), message
    assert came in message, message
    assert needed in message, message
    assert raised.value.argument == argument
    assert isinstance(raised.value, errors.FovealError)
    assert isinstance(raised.value, ValueError | TypeError)
    assert not watch.operators & COMPUTING


@pytest.mark.parametrize(
    ("make", "error", "argument", "came"),
    [
        (lambda: fv.Neighborhood(0), errors.PatternError, "window", "0"),
        (lambda: fv.Neighborhood((3, -1)), errors.PatternError, "window", "-1"),
        (lambda: fv.Neighborhood(3.0), errors.PatternError, "window", "3.0"),
        (lambda: fv.Neighborhood(True), errors.PatternError, "window", "True"),
        (lambda: fv.Neighborhood(3, stride=4), errors.PatternError, "stride", "4"),
        (lambda: fv.Neighborhood((5, 3), stride=(5, 4)), errors.PatternError, "stride", "4"),
        (lambda: fv.Neighborhood(3, stride=0), errors.PatternError, "stride", "0"),
        (lambda: fv.Neighborhood(3, dilation=0), errors.PatternError, "dilation", "0"),
        (lambda: fv.Neighborhood(3, border="zero"), errors.PatternError, "border", "'zero'"),
        (lambda: fv.Neighborhood(3, causal=2), errors.PatternError, "causal", "2"),
        (lambda: fv.Neighborhood((3, 3), causal=(True, 0)), errors.PatternError, "causal", "0"),
        (
            lambda: fv.Neighborhood(3, causal=True, border="wrap"),
            errors.PatternError,
            "border",
            "'wrap'",
        ),
        (
            lambda: fv.Neighborhood((3, 3), stride=(1, 1, 1)),
            errors.PatternError,
            "Neighborhood",
            "3",
        ),
        (lambda: fv.Neighborhood((3, 3, 3, 3)), errors.PatternError, "Neighborhood", "4 axes"),
        (lambda: fv.Sliding(-1), errors.PatternError, "left", "-1"),
        (lambda: fv.Sliding(3, -2), errors.PatternError, "right", "-2"),
        (lambda: fv.Sliding(3, sink_tokens=-1), errors.PatternError, "sink_tokens", "-1"),
        (lambda: fv.Sliding(2.5), errors.PatternError, "left", "2.5"),
        (lambda: fv.Sliding(True), errors.PatternError, "left", "True"),
        (lambda: fv.Strided(0), errors.PatternError, "stride", "0"),
        (lambda: fv.Fixed(4, 5), errors.PatternError, "summary", "5"),
        (lambda: fv.Fixed(4, 0), errors.PatternError, "summary", "0"),
        (lambda: fv.Fixed(-4), errors.PatternError, "stride", "-4"),
        (lambda: fv.Partition(0), errors.PatternError, "size", "0"),
        (lambda: fv.Partition(4, 4), errors.PatternError, "shift", "4"),
        (lambda: fv.Partition(4, before=-1), errors.PatternError, "before", "-1"),
        (lambda: fv.Partition((4, 4), after=(1, 1, 1)), errors.PatternError, "Partition", "3"),
        (lambda: fv.Axial(1.5), errors.PatternError, "axis", "1.5"),
        (lambda: fv.Softmax(scale=float("nan")), errors.ScoreError, "scale", "nan"),
        (lambda: fv.Softmax(scale=float("inf")), errors.ScoreError, "scale", "inf"),
        (lambda: fv.Softmax(soft_cap=0.0), errors.ScoreError, "soft_cap", "0.0"),
        (lambda: fv.Softmax(soft_cap=-3.0), errors.ScoreError, "soft_cap", "-3.0"),
        (lambda: lists([1, 0]), errors.SelectionError, "indices", "order"),
        (lambda: lists([1, 1]), errors.SelectionError, "indices", "order"),
        (lambda: lists([-1, 0]), errors.SelectionError, "indices", "order"),
        (lambda: lists([0, -2]), errors.SelectionError, "indices", "order"),
        (lambda: lists([0], q_block=0), errors.SelectionError, "q_block", "0"),
        (lambda: lists([0], kv_block=-4), errors.SelectionError, "kv_block", "-4"),
        (
            lambda: fv.BlockSelection(torch.zeros(2, 2, 1, dtype=torch.int32)),
            errors.SelectionError,
            "indices",
            "[2, 2, 1]",
        ),
        (
            lambda: fv.BlockSelection(torch.zeros(1, 2, 2, 1)),
            errors.SelectionError,
            "indices",
            "[1, 2, 2, 1]",
        ),
    ],
)
def test_a_bad_value_cannot_be_made(
    make: object, error: type[Exception], argument: str, came: str
) -> None:
    with pytest.raises(error) as raised:
        make()
    assert re.match(rf"{argument}: got .*{re.escape(came)}.*; .+", str(raised.value))


LINE = torch.randn(1, 6, 2, 3)
GATE = -torch.rand(1, 6, 2)


@pytest.mark.parametrize(
    ("make", "argument", "came"),
    [
        (lambda: fv.attend([1.0], K, K), "q", "a list"),
        (lambda: fv.attend(Q, None, K), "k", "None"),
        (lambda: fv.attend(Q.numpy(), K, K), "q", "a ndarray"),
        (lambda: fv.attend(Q, K, K, cu_seqlens=[0, 8]), "cu_seqlens", "a list"),
        (lambda: fv.explain(Q, K, 3), "v", "a int"),
        (lambda: fv.tiles(Q, None), "k", "None"),
        (lambda: fv.tiles(Q, K, "causal"), "pattern", "str"),
        (lambda: fv.tiles(Q, K, device="tpu"), "device", "tpu"),
        (lambda: fv.explain(Q, K, K, device="meta"), "device", "meta"),
        (lambda: fv.scan(None, LINE, LINE), "q", "None"),
        (lambda: fv.scan(LINE, LINE, LINE, log_decay=0.9), "log_decay", "a float"),
        (lambda: fv.scan(LINE, LINE, LINE, cu_seqlens=[0, 6]), "cu_seqlens", "a list"),
        (lambda: fv.scan(LINE, LINE, LINE, initial_state=[3]), "initial_state", "a int"),
        (lambda: fv.scan(LINE, LINE, LINE, initial_state=3.0), "initial_state", "a float"),
        (lambda: fv.scan_step([LINE], LINE, LINE, fv.Delta(), None), "q", "a list"),
        (lambda: fv.scan(LINE, LINE, LINE, scale=float("nan")), "scale", "nan"),
        (lambda: fv.scan(LINE, LINE, LINE, scale="1"), "scale", "1"),
        (lambda: fv.explain_scan(LINE, LINE, LINE, log_decay=0.9), "log_decay", "a float"),
        (lambda: fv.convolve(None, GATE), "x", "None"),
        (lambda: fv.convolve(GATE, None), "filter", "None"),
        (lambda: fv.convolve(GATE, [GATE, 3]), "filter", "a int"),
        (lambda: fv.explain_convolve(GATE, "x"), "filter", "a str"),
        (lambda: fv.local_mix(None, LINE, 3), "weights", "None"),
        (lambda: fv.fftconv(GATE, [1.0]), "filter", "a list"),
        (lambda: fv.fftconv(GATE, GATE, skip=1.0), "skip", "a float"),
        (lambda: fv.fftconv(GATE, GATE[0].T, causal=(False,)), "causal", "(False,)"),
        (lambda: fv.system(["gna"]), "system", "['gna']"),
        (lambda: fv.decode(None, None), "q", "None"),
        (lambda: fv.decode(LINE, [LINE]), "cache", "list"),
        (lambda: fv.page_mass(LINE, None), "cache", "NoneType"),
        (lambda: fv.explain_decode(LINE, LINE), "cache", "Tensor"),
        (lambda: fv.Softmax(sink=[0.0, 0.0]), "sink", "a list"),
        (lambda: fv.Softmax(scale="1"), "scale", "1"),
        (lambda: fv.Softmax(scale=torch.tensor(2.0)), "scale", "2.0"),
        (lambda: fv.Softmax(soft_cap="30"), "soft_cap", "30"),
        (lambda: fv.Bias(1.0), "Bias", "a float"),
        (lambda: fv.KeyBias(None), "KeyBias", "None"),
        (lambda: fv.Alibi([0.5, 0.25]), "slopes", "a list"),
        (lambda: fv.RelativeBias(None), "table", "None"),
        (lambda: fv.Entmax("1.5"), "alpha", "1.5"),
        (lambda: fv.LocalLinear("1"), "ridge", "1"),
        (lambda: fv.Parallax(None), "r", "None"),
        (lambda: fv.Partition(None), "size", "None"),
        (lambda: fv.Partition([4, 4]), "size", "[4, 4]"),
        (lambda: fv.Partition(()), "size", "()"),
        (lambda: fv.Scales(3), "grids", "3"),
        (lambda: fv.Scales((2, "3")), "grids", "(2, '3')"),
        (lambda: fv.Scales((2, 3), window="3"), "window", "3"),
        (lambda: fv.Sphere("0.1"), "radius", "0.1"),
        (lambda: fv.Rows([0], [1]), "lower", "a list"),
        (lambda: fv.Tree([[0, 0]]), "groups", "a list"),
        (lambda: fv.Lifetimes(None), "ends", "None"),
        (lambda: fv.Blocks(torch.zeros(1, 1, 1, 1, dtype=torch.int32)), "selection", "Tensor"),
        (lambda: fv.BlockSelection([[0]]), "indices", "a list"),
        (lambda: lists([0], q_block=4.0), "q_block", "4.0"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(
    make: Callable[[], object], argument: str, came: str
) -> None:
    with Watch() as watch, pytest.raises(errors.FovealError) as raised:
        make()
    assert re.match(rf"{argument}: got .*{re.escape(came)}.*; .+", str(raised.value))
    assert not watch.operators & COMPUTING


@pytest.mark.parametrize(
    "join",
    [
        lambda: fv.Causal() & "sliding",
        lambda: fv.Causal() | None,
        lambda: fv.Softmax() + 1.0,
        lambda: fv.Causal() & fv.Softmax(),
    ],
)
def test_only_likes_are_joined(join: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        join()


def test_names_that_are_no_text_are_unknown_too() -> None:
    for call in (
        lambda: fv.system(3),
        lambda: fv.attend(Q, K, K, implementation=3),
        lambda: fv.scan(LINE, LINE, LINE, implementation=3),
    ):
        with pytest.raises(errors.UnknownNameError, match="got 3; known: "):
            call()


def test_an_unknown_option_of_a_system_is_named() -> None:
    gna = fv.system("gna")
    with pytest.raises(
        errors.UnknownNameError, match=r"option: got 'windw'; did you mean window\?"
    ):
        gna.op(GRID, GRID, GRID, windw=3)
    with pytest.raises(errors.UnknownNameError, match="option: got 'causl'"):
        gna.pattern((4, 6), causl=True)


@pytest.mark.parametrize(
    ("implementation", "reason", "call"),
    [
        ("sdpa", "dense and causal", {"pattern": fv.Sliding(3)}),
        ("sdpa", "soft cap", {"score": fv.Softmax(soft_cap=2.0)}),
        ("sdpa", "sink", {"score": fv.Softmax(sink=torch.ones(4))}),
        ("sdpa", "positive scale", {"score": fv.Softmax(scale=-1.0)}),
        ("sdpa", "positive scale", {"score": fv.Softmax(scale=0)}),
        ("sdpa", "additive", {"score": fv.Alibi(torch.ones(4))}),
        ("sdpa", "lse", {"return_lse": True}),
        ("sdpa", "Dv", {"v": torch.ones(2, 8, 2, 5)}),
        ("sdpa", "Lq", {"q": Q[:, :3], "pattern": fv.Causal()}),
        ("sdpa", "empty", {"q": Q[:0], "k": K[:0], "v": K[:0]}),
        ("cpu", "meta", {"q": Q.to("meta"), "k": K.to("meta"), "v": K.to("meta")}),
    ],
)
def test_a_named_implementation_runs_or_raises(
    implementation: str, reason: str, call: dict[str, object]
) -> None:
    arguments = {"q": Q, "k": K, "v": K, "implementation": implementation} | call
    with Watch() as watch, pytest.raises(errors.RefusedError) as raised:
        fv.attend(**arguments)
    assert raised.value.implementation == implementation
    assert reason in raised.value.reason
    assert implementation in str(raised.value)
    assert not watch.operators & COMPUTING


def test_an_unknown_implementation_lists_the_known() -> None:
    with pytest.raises(errors.UnknownNameError, match=r"'fast'.*sdpa.*cpu.*reference"):
        fv.attend(Q, K, K, implementation="fast")


def test_out_of_memory_says_what_the_plan_expected() -> None:
    """PyTorch's own error (a RuntimeError, or OutOfMemoryError on CUDA), with the plan's bytes."""
    tokens = torch.ones(1, 1, 1, 1).expand(1, 2**22, 1, 1)
    with pytest.raises(RuntimeError, match=r"(?i)memory") as raised:
        fv.attend(tokens, tokens, tokens, fv.Dense(), implementation="reference")
    expected = re.search(r"'reference' expected to need ([\d,]+) bytes", str(raised.value))
    assert expected is not None
    assert int(expected[1].replace(",", "")) >= 4 * 2**44


@pytest.mark.parametrize("implementation", [None, "cpu", "reference"])
@pytest.mark.parametrize("with_sink", [False, True])
def test_a_row_that_sees_no_key(
    implementation: str | None, with_sink: bool, source: torch.Generator
) -> None:
    """Output 0, lse -inf (the sink alone where there is one), gradient 0, never NaN."""
    nothing = torch.tensor([[True, False], [False, False], [False, True]])[None, None]
    lists_with_an_empty_one = fv.Blocks(fv.BlockSelection.from_block_mask(nothing, 4, 5))
    for pattern, Lq, Lk, blind in (
        (fv.Causal(), 12, 8, range(4)),
        (fv.Sliding(3), 12, 8, range(4)),
        (fv.Sliding(2) & fv.Partition(4, 1), 12, 8, range(4)),
        (fv.Strided(9, causal=False), 8, 4, range(4)),
        (lists_with_an_empty_one, 12, 10, range(4, 8)),
        (fv.Sliding(2) & lists_with_an_empty_one, 12, 10, range(4, 8)),
    ):
        q = torch.randn(2, Lq, 4, 3, generator=source, requires_grad=True)
        k = torch.randn(2, Lk, 2, 3, generator=source, requires_grad=True)
        v = torch.randn(2, Lk, 2, 5, generator=source, requires_grad=True)
        sink = torch.randn(4, generator=source, requires_grad=True) if with_sink else None
        o, lse = fv.attend(
            q, k, v, pattern, fv.Softmax(sink=sink), return_lse=True, implementation=implementation
        )
        assert bool((o[:, blind] == 0).all()), pattern
        expected = torch.full((4,), -torch.inf) if sink is None else sink.detach()
        torch.testing.assert_close(
            lse[:, blind].detach(), expected.expand(lse[:, blind].shape), rtol=0, atol=1e-6
        )
        weights = torch.randn(lse.shape, generator=source)
        inputs = (q, k, v) if sink is None else (q, k, v, sink)
        gradients = torch.autograd.grad((o, lse), inputs, (torch.ones_like(o), weights))
        assert bool((gradients[0][:, blind] == 0).all()), pattern
        assert all(bool(g.isfinite().all()) for g in gradients), pattern
