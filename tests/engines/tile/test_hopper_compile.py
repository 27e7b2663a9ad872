"""Every Hopper kernel compiles for sm_90 without a GPU, into products that do not wait for each other."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveal.engines.tile import compiling

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

INTS = ["X", "Y", "Z", "heads", "groups", "shared", "total"]
LINE = (64, 1, 1)
SQUARE = (8, 8, 1)
# Rows, columns, axes, head_dim, stages, consumers, and whether a consumer may skip boxes.  Two
# consumers have 232 registers a thread, three 160: there a few numbers of a tile go to the stack.
FORWARD = [
    (LINE, (128, 1, 1), 1, 128, 2, 2, False),
    (LINE, (128, 1, 1), 1, 64, 3, 3, False),
    (SQUARE, (4, 32, 1), 2, 128, 2, 2, True),
]
WIDE = (LINE, LINE, 1, 256, 2, 2, False)
SPILLING = ("sink, cap and bias", "bias", "alibi")
BACKWARD = [
    (LINE, LINE, 1, 128, 3, 2, False),
    (SQUARE, SQUARE, 2, 128, 3, 2, True),
    (LINE, LINE, 1, 64, 3, 3, False),
]


def box_type(sides: tuple[int, int, int], axes: int, head_dim: int) -> str:
    from triton.experimental.gluon import language as gl

    shape = [*sides[:axes], 1, head_dim] if axes == 3 else [1, *sides[:axes], 1, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
    return f"tensordesc<bf16[{','.join(map(str, shape))}],{layout!r}>"


def numbers_type(sides: tuple[int, int, int], axes: int) -> str:
    from triton.experimental.gluon import language as gl

    shape = [1, *sides[:axes]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(shape))
    return f"tensordesc<fp32[{','.join(map(str, shape))}],{layout!r}>"


def compiled(
    kernel: Any, signature: dict[str, Any], constants: dict[Any, Any], **options: Any
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    # As at run time, where a grid of one axis passes Y = Z = 1.
    absent = ["Z", "Y"][: 3 - constants.get("AXES", 3)]
    absent += [f"{axis.lower()}_pitch" for axis in absent if f"{axis.lower()}_pitch" in signature]
    constants |= dict.fromkeys(absent, 1)
    signature |= {name: "constexpr" for name in constants if isinstance(name, str)}
    names = list(signature)
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n.startswith("p_")}
    options = {"num_warps": 4, "enable_fp_fusion": True, **options}
    source = GluonASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(result: Any) -> tuple[int, int, str]:
    """Bytes of stack, number of HGMMA instructions and the disassembly."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run(
                [tool, what, file.name], capture_output=True, text=True, check=True
            ).stdout

        stack = re.search(r"STACK:(\d+)", dump("--dump-resource-usage"))
        sass = dump("--dump-sass")
    assert stack is not None
    return int(stack[1]), len(re.findall(r"\bHGMMA\b", sass)), sass


def pipelined(sass: str, products: int) -> bool:
    """Whether the compiler let products follow each other: else it waits after every instruction."""
    return len(re.findall(r"WARPGROUP\.ARRIVE", sass)) < products / 2


def shape_constants(case: tuple[Any, ...]) -> dict[str, Any]:
    rows, columns, axes, _, stages, consumers, skips = case
    return {
        "W": consumers,
        "R": rows,
        "C": columns,
        "AXES": axes,
        "STAGES": stages,
        "SKIPS": skips,
    }


@pytest.mark.parametrize(
    ("case", "hides", "lists", "score"),
    [
        (FORWARD[0], False, None, None),
        (FORWARD[0], False, None, "cut"),
        (FORWARD[0], True, None, "cut"),
        (FORWARD[2], True, None, "bias"),
        *((case, True, None, None) for case in FORWARD),
        (FORWARD[0], False, "listed", None),
        (FORWARD[0], True, "tested by intervals", "sink, cap and bias"),
        (FORWARD[0], True, None, "alibi"),
        (FORWARD[0], True, "tested by bits", None),
        (WIDE, False, None, None),
    ],
)
def test_forward(case: tuple[Any, ...], hides: bool, lists: str | None, score: str | None) -> None:
    from foveal.engines.tile.hopper_forward import tile_attend_forward

    rows, columns, axes, head_dim = case[:4]
    q, kv = box_type(rows, axes, head_dim), box_type(columns, axes, head_dim)
    biased = score is not None and "bias" in score
    signature: dict[str, Any] = {"q_desc": q, "k_desc": kv, "v_desc": kv, "o_desc": q}
    signature["bias_desc"] = numbers_type(columns, axes) if biased else "constexpr"
    signature |= {"p_lse": "*fp32", "p_spoilt": "*i8", "p_flags": "*i8", "p_bounds": "*i32"}
    signature["lists"] = ("*i32", *("i32",) * 5) if lists else ()
    if lists == "tested by bits":
        signature["lists"] += ("*i32", "*i32", "i32")
    capped = score == "sink, cap and bias"
    signature["scoring"] = ("*bf16" if capped else "constexpr", "fp32")
    signature["biasing"] = ("i32", "i32") if biased else ()
    signature["terms"] = (
        ("fp32", "*fp32", "*i32", "*i32", *("i32",) * 3) if score == "alibi" else ()
    )
    signature |= dict.fromkeys(INTS, "i32") | {"scale_log2": "fp32"}
    signature["parts"] = ("*fp32", "*fp32") if score == "cut" else ()
    signature["split"] = ("i32",) * 3 if score == "cut" else ()
    constants = shape_constants(case)
    constants |= {"HIDES": hides, "CAPPED": capped}
    if not capped:
        constants[list(signature).index("scoring"), 0] = None
    if not biased:
        constants["bias_desc"] = None
    if not hides or score == "cut":
        constants |= dict.fromkeys(["p_spoilt", "p_flags"])
    stack, products, sass = resources(compiled(tile_attend_forward, signature, constants))
    spills = (case[5] == 3 and hides) or score in SPILLING or (score == "cut" and hides)
    assert stack <= (200 if spills else 0)
    assert pipelined(sass, products)


@pytest.mark.parametrize(
    ("axes", "lists"), [(1, ()), (1, ("*i32", *("i32",) * 5, "*i32", "*i32", "i32")), (3, ())]
)
def test_repair(axes: int, lists: tuple[str, ...]) -> None:
    from foveal.engines.tile.hopper_repair import tile_attend_repair

    signature: dict[str, Any] = {"p_flags": "*i8", "boxes": "i32"}
    signature |= dict.fromkeys(["p_q", "p_k", "p_v", "p_o"], "*bf16")
    for name in "qkvo":
        signature[f"{name}_strides"] = ("i32",) * (axes + 2 if axes < 3 else 4)
    signature |= {"p_lse": "*fp32", "p_spoilt": "*i8", "p_bounds": "*i32", "lists": lists}
    signature |= {"squash": "fp32", "terms": (), "key_grid": ("i32",) * (axes + 1)}
    signature |= dict.fromkeys(INTS[:-1], "i32") | {"scale_log2": "fp32"}
    columns = (128, 1, 1) if axes == 1 else (4, 4, 8)
    constants = {"W": 2, "R": LINE if axes == 1 else (4, 4, 4), "C": columns, "AXES": axes}
    constants |= {"CAPPED": False, "HEAD_DIM": 96, "VALUE_DIM": 64, "D": 128, "DV": 64, "MANY": 512}
    assert resources(compiled(tile_attend_repair, signature, constants))[0] == 0


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("case", BACKWARD)
def test_backward_of_queries(case: tuple[Any, ...], hides: bool) -> None:
    from foveal.engines.tile.hopper_backward_separate import tile_attend_backward_queries

    rows, columns, axes, head_dim = case[:4]
    q, kv = box_type(rows, axes, head_dim), box_type(columns, axes, head_dim)
    signature = {"q_desc": q, "do_desc": q, "k_desc": kv, "v_desc": kv, "dq_desc": q}
    signature |= {"p_lse2": "*fp32", "p_delta": "*fp32", "p_bounds": "*i32", "p_spoilt": "*i8"}
    signature |= dict.fromkeys([*INTS[:3], "y_pitch", "z_pitch", "plane", *INTS[3:]], "i32")
    signature |= {"scale_log2": "fp32", "scale": "fp32"}
    constants = shape_constants(case) | {"HIDES": hides}
    stack, products, sass = resources(compiled(tile_attend_backward_queries, signature, constants))
    assert stack <= (120 if case[5] == 3 else 0)
    assert pipelined(sass, products)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("case", BACKWARD)
def test_backward_of_keys(case: tuple[Any, ...], hides: bool) -> None:
    from foveal.engines.tile.hopper_backward_separate import tile_attend_backward_keys

    rows, columns, axes, head_dim = case[:4]
    q, kv = box_type(columns, axes, head_dim), box_type(rows, axes, head_dim)
    numbers = numbers_type(columns, axes)
    signature = {"k_desc": kv, "v_desc": kv, "q_desc": q, "do_desc": q}
    signature |= {"lse_desc": numbers, "delta_desc": numbers, "dk_desc": kv, "dv_desc": kv}
    signature |= {"p_bounds": "*i32", "p_spoilt": "*i8"} | dict.fromkeys(INTS, "i32")
    signature |= {"scale_log2": "fp32", "scale": "fp32"}
    constants = shape_constants(case) | {"HIDES": hides}
    stack, products, sass = resources(compiled(tile_attend_backward_keys, signature, constants))
    # Two accumulators, S and dP leave no room for all the numbers that describe a tile.
    assert stack <= 280
    assert pipelined(sass, products)


@pytest.mark.parametrize(
    ("sides", "axes", "head_dim", "hides", "intervals", "biased"),
    [
        (LINE, 1, 128, False, 0, False),
        (LINE, 1, 64, False, 0, False),
        (LINE, 1, 128, True, 0, False),
        (LINE, 1, 128, True, 1, True),
        (LINE, 1, 128, True, 2, False),
        (SQUARE, 2, 128, True, 0, False),
        (LINE, 1, 64, True, 0, True),
    ],
)
def test_backward_in_one_kernel(
    sides: tuple[int, int, int],
    axes: int,
    head_dim: int,
    hides: bool,
    intervals: int,
    biased: bool,
) -> None:
    """Along lists where their tested tiles hide one or two intervals, else along boxes."""
    from triton.experimental.gluon import language as gl

    from foveal.engines.tile.hopper_backward_joint import tile_attend_backward_joint

    apart = head_dim <= 64
    box, numbers = box_type(sides, axes, head_dim), numbers_type(sides, axes)
    shape = [1, *sides[:axes], head_dim if apart else head_dim // 2]
    layout = gl.NVMMASharedLayout.get_default_for(shape, gl.float32)
    signature: dict[str, Any] = dict.fromkeys(["k_desc", "v_desc", "q_desc", "do_desc"], box)
    signature |= {"lse_desc": numbers, "delta_desc": numbers, "dk_desc": box, "dv_desc": box}
    signature["dq_desc"] = f"tensordesc<fp32[{','.join(map(str, shape))}],{layout!r}>"
    signature |= {"p_bounds": "*i32", "p_spoilt": "*i8"}
    signature["lists"] = ("*i32", *("i32",) * 5, *("*i32",) * (intervals - 1)) if intervals else ()
    signature |= dict.fromkeys(INTS, "i32") | {"scale_log2": "fp32", "scale": "fp32"}
    # Of items that are cut no pair is hidden.
    signature["parts"] = () if hides else ("*fp32", "*fp32")
    signature["split"] = () if hides else ("i32",) * 3
    signature["biases"] = ("*fp32", *("i32",) * 3) if biased else ()
    constants = {"W": 2, "R": sides, "C": sides, "AXES": axes, "HIDES": hides}
    constants["STAGES"] = 2 if apart else 3
    result = compiled(tile_attend_backward_joint, signature, constants | {"APART": apart})
    stack, products, sass = resources(result)
    # Triton 3.9 spills 304 bytes of the kernel with lists and biases, 3.6 fewer.
    assert stack <= (320 if biased else 280)
    assert pipelined(sass, products)
    assert len(re.findall(r"UTMAREDG", sass)) > 0


@pytest.mark.parametrize("kernel", ["tile_attend_merge", "tile_attend_backward_merge"])
def test_merge(kernel: str) -> None:
    from foveal.engines.tile import hopper_merge

    outs = ["p_o", "p_lse"] if kernel == "tile_attend_merge" else ["p_dk", "p_dv"]
    signature: dict[str, Any] = dict.fromkeys(outs, "*bf16")
    signature |= {"p_lse": "*fp32"} if "p_lse" in signature else {}
    signature |= {"parts": ("*fp32", "*fp32"), "split": ("i32",) * 3}
    signature |= dict.fromkeys(["X", "heads", "shared", "total"], "i32")
    constants = {"W": 2, "R": LINE, "DIM": 96, "PAD": 128, "ROWS": 16}
    assert resources(compiled(getattr(hopper_merge, kernel), signature, constants))[0] == 0


LONG: dict[str, Callable[[], None]] = {
    "tile_attend_forward": lambda: test_forward(FORWARD[0], False, None, None),
    "tile_attend_backward_queries": lambda: test_backward_of_queries(BACKWARD[0], False),
    "tile_attend_backward_keys": lambda: test_backward_of_keys(BACKWARD[0], False),
    "tile_attend_backward_joint": lambda: test_backward_in_one_kernel(
        LINE, 1, 128, False, 0, False
    ),
}


def test_every_long_kernel_is_known_here() -> None:
    assert LONG.keys() == compiling.LONGEST


@pytest.mark.parametrize("name", sorted(LONG))
def test_long_kernels_say_that_they_are_traced(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    event = threading.Event()
    monkeypatch.setattr(compiling._current, "event", event, raising=False)
    LONG[name]()
    assert event.is_set()
