"""Every Hopper kernel compiles for sm_90 without a GPU, into products that do not wait for each other."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

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


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    # As at run time, where a grid of one axis passes Y = Z = 1.
    absent = ["Z", "Y"][: 3 - constants["AXES"]]
    absent += [f"{axis.lower()}_pitch" for axis in absent if f"{axis.lower()}_pitch" in signature]
    constants |= dict.fromkeys(absent, 1)
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(signature)
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n.startswith("p_")}
    options = {"num_warps": 4, "enable_fp_fusion": True}
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
    ("case", "hides"), [(FORWARD[0], False), *((case, True) for case in FORWARD)]
)
def test_forward(case: tuple[Any, ...], hides: bool) -> None:
    from foveal.engines.tile.hopper_forward import tile_attend_forward

    rows, columns, axes, head_dim = case[:4]
    q, kv = box_type(rows, axes, head_dim), box_type(columns, axes, head_dim)
    signature = {"q_desc": q, "k_desc": kv, "v_desc": kv, "o_desc": q}
    signature |= {"p_lse": "*fp32", "p_bounds": "*i32"}
    signature |= dict.fromkeys(INTS, "i32") | {"scale_log2": "fp32"}
    constants = shape_constants(case) | {"HIDES": hides}
    stack, products, sass = resources(compiled(tile_attend_forward, signature, constants))
    assert stack <= (200 if case[5] == 3 and hides else 0)
    assert pipelined(sass, products)


@pytest.mark.parametrize("case", BACKWARD)
def test_backward_of_queries(case: tuple[Any, ...]) -> None:
    from foveal.engines.tile.hopper_backward import tile_attend_backward_queries

    rows, columns, axes, head_dim = case[:4]
    q, kv = box_type(rows, axes, head_dim), box_type(columns, axes, head_dim)
    signature = {"q_desc": q, "do_desc": q, "k_desc": kv, "v_desc": kv, "dq_desc": q}
    signature |= {"p_lse2": "*fp32", "p_delta": "*fp32", "p_bounds": "*i32"}
    signature |= dict.fromkeys([*INTS[:3], "y_pitch", "z_pitch", "plane", *INTS[3:]], "i32")
    signature |= {"scale_log2": "fp32", "scale": "fp32"}
    result = compiled(tile_attend_backward_queries, signature, shape_constants(case))
    stack, products, sass = resources(result)
    assert stack <= (120 if case[5] == 3 else 0)
    assert pipelined(sass, products)


@pytest.mark.parametrize("case", BACKWARD)
def test_backward_of_keys(case: tuple[Any, ...]) -> None:
    from foveal.engines.tile.hopper_backward import tile_attend_backward_keys

    rows, columns, axes, head_dim = case[:4]
    q, kv = box_type(columns, axes, head_dim), box_type(rows, axes, head_dim)
    numbers = numbers_type(columns, axes)
    signature = {"k_desc": kv, "v_desc": kv, "q_desc": q, "do_desc": q}
    signature |= {"lse_desc": numbers, "delta_desc": numbers, "dk_desc": kv, "dv_desc": kv}
    signature |= {"p_bounds": "*i32"} | dict.fromkeys(INTS, "i32")
    signature |= {"scale_log2": "fp32", "scale": "fp32"}
    stack, products, sass = resources(
        compiled(tile_attend_backward_keys, signature, shape_constants(case))
    )
    # Two accumulators, S and dP leave no room for all the numbers that describe a tile.
    assert stack <= 280
    assert pipelined(sass, products)
