"""The Hopper kernels compile for sm_90 without a GPU, and put little on the stack."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.engines.tile.test_hopper_compile import INTS, LINE, box_type, compiled, resources

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.slow,
]
LONG_LINE = (128, 1, 1)
F = "*fp32"
STEPS = (F, F, "*bf16", F, F, "*i32", F, "i32", F, F, "fp32")
BEGUN = (*STEPS, "fp32")
SPACE = 227 << 10
"""Bytes of shared memory of a program."""


def kernel(name: str, dim: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A kernel, its signature and its constants, as `hopper` launches it for causal attention."""
    from foveal.engines.local_linear import hopper_given, hopper_pass, hopper_steps

    wide = name in ("steps", "output")
    columns = LONG_LINE if wide else LINE
    q, kv = box_type(LINE, 1, dim), box_type(columns, 1, dim)
    signature: dict[str, Any] = {"q_desc": q}
    constants = {"W": 2, "R": LINE, "C": columns, "AXES": 1, "HIDES": True, "SKIPS": False}
    written = {"p_o": "*bf16", "o_strides": ("i32", "i32", "i32")}
    if name == "means":
        made = hopper_pass.local_linear_means
        signature |= {"k_desc": kv, "p_lse": F, "p_mean": F, "state": BEGUN}
        constants |= {"STAGES": 4, "D": dim}
    elif name == "given":
        made = hopper_given.local_linear_given
        signature |= {"r_desc": q, "k_desc": kv, "v_desc": kv, "p_lse": F, **written}
        constants |= {"STAGES": 3, "DV": dim}
    elif name == "steps":
        made = hopper_steps.local_linear_steps
        signature |= {"d_desc": q, "k_desc": kv, "p_lse": F, "p_mean": F, "state": STEPS}
        signature |= {"most": "i32"}
        constants |= {"STAGES": 4, "D": dim}
    else:
        made = hopper_pass.local_linear_values
        signature |= {"r_desc": q, "k_desc": kv, "v_desc": kv, "p_lse": F, "p_mean": F}
        signature |= {"p_lost": F, **written}
        constants |= {"STAGES": 2, "D": dim, "DV": dim}
    marks = "p_marks" if name == "steps" else "p_bad"
    signature |= {marks: "*i32", "p_bounds": "*i32"} | dict.fromkeys(INTS, "i32")
    signature["unit"] = "fp32"
    if "EARLY" in made.arg_names:
        constants["EARLY"] = True
    return made, signature, constants


@pytest.mark.parametrize(
    ("name", "dim", "stack"),
    [
        ("means", 64, 256),
        ("steps", 64, 256),
        ("output", 64, 256),
        ("given", 64, 256),
        ("steps", 128, 1024),
        ("output", 128, 256),
        ("given", 128, 256),
    ],
)
def test_compiles(name: str, dim: int, stack: int) -> None:
    result = compiled(*kernel(name, dim))
    assert result.metadata.shared <= SPACE
    found, products, _ = resources(result)
    assert products > 0
    assert found <= stack
