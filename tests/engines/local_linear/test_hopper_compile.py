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
WORDS = ("p_marks", "p_rows", "p_counts", "p_bounds")
STEPS = (F, F, "*bf16", F, "*i32", F, "i32", F, F, "fp32")
BEGUN = (*STEPS, "fp32")
SPACE = 227 << 10
"""Bytes of shared memory of a program."""


def kernel(name: str, dim: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A kernel, its signature and its constants, as `hopper` launches it for causal attention."""
    from foveal.engines.local_linear import hopper_given, hopper_pass

    if name == "steps":
        return steps(dim)
    q, kv = box_type(LINE, 1, dim), box_type(LONG_LINE if name == "output" else LINE, 1, dim)
    signature: dict[str, Any] = {"q_desc": q}
    columns = LONG_LINE if name == "output" else LINE
    constants = {"W": 2, "R": LINE, "C": columns, "AXES": 1, "HIDES": True, "SKIPS": False}
    written = {"p_o": "*bf16", "o_strides": ("i32", "i32", "i32")}
    if name == "means":
        made = hopper_pass.local_linear_means
        signature |= {"k_desc": kv, "p_lse": F, "p_mean": F, "p_spread": F, "state": BEGUN}
        constants |= {"STAGES": 4, "D": dim, "W": 2 if dim > 64 else 1}
    elif name == "given":
        made = hopper_given.local_linear_given
        signature |= {"r_desc": q, "k_desc": kv, "v_desc": kv, "p_lse": F, **written}
        constants |= {"STAGES": 3, "DV": dim}
    else:
        made = hopper_pass.local_linear_values
        signature |= {"r_desc": q, "k_desc": kv, "v_desc": kv, "p_lse": F, "p_mean": F}
        signature |= {"p_lost": F, **written}
        constants |= {"STAGES": 2, "D": dim, "DV": dim}
    signature |= {"p_bad": "*i32", "p_bounds": "*i32"} | dict.fromkeys(INTS, "i32")
    signature["unit"] = "fp32"
    if "EARLY" in made.arg_names:
        constants["EARLY"] = True
    return made, signature, constants


def steps(dim: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel of the steps, as `kernel` gives others."""
    from foveal.engines.local_linear.hopper_steps import local_linear_steps

    signature: dict[str, Any] = {"k_desc": box_type(LINE, 1, dim), "p_q": "*bf16"}
    signature |= {
        "q_strides": ("i32", "i32", "i32"),
        "p_lse": F,
        "p_mean": F,
        "p_spread": F,
        "state": STEPS,
    }
    signature |= {**dict.fromkeys(WORDS, "*i32")}
    sizes = ("X", "Y", "Z", "heads", "groups", "shared", "tiles")
    signature |= dict.fromkeys(sizes, "i32") | {"unit": "fp32", "most": "i32"}
    constants = {"M": 64, "C": LINE, "AXES": 1, "STAGES": 4, "HIDES": True}
    return local_linear_steps, signature, constants | {"D": dim, "PAD": dim, "EARLY": True}


@pytest.mark.parametrize(
    ("name", "dim", "stack"),
    [
        ("means", 64, 256),
        ("steps", 64, 256),
        ("output", 64, 256),
        ("given", 64, 256),
        ("means", 128, 768),
        ("steps", 128, 512),
        ("output", 128, 256),
        ("given", 128, 256),
    ],
)
def test_compiles(name: str, dim: int, stack: int) -> None:
    # Two programs of a single consumer share a processor.
    shares = name == "steps" or (name, dim) == ("means", 64)
    result = compiled(*kernel(name, dim), **({"maxnreg": 128} if shares else {}))
    assert result.metadata.shared <= SPACE // (1 + shares) - (1 << 10)
    found, products, _ = resources(result)
    assert products > 0
    assert found <= stack
