"""The kernels with bulk copies compile for sm_90 without a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

GLUON = "triton.experimental.gluon.language.nvidia.hopper"


def has_gluon() -> bool:
    return (
        importlib.util.find_spec("triton") is not None
        and importlib.util.find_spec("triton.experimental.gluon") is not None
        and importlib.util.find_spec(GLUON) is not None
    )


pytestmark = [
    pytest.mark.skipif(not has_gluon(), reason="Triton has no Gluon for Hopper"),
    pytest.mark.slow,
]


def boxes(*shape: int) -> str:
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout.get_default_for(list(shape), gl.bfloat16)
    return f"tensordesc<bf16[{','.join(map(str, shape))}],{layout!r}>"


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [n for n in names if n.startswith("p_") or n.endswith("stride_h")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)


LARGEST_SHARED = 232_448
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@pytest.mark.parametrize(("head_dim", "value_dim", "decay"), [(128, 128, 1), (64, 64, 0)])
def test_additive(head_dim: int, value_dim: int, decay: int) -> None:
    from foveal.engines.state.bulk import state_additive_bulk
    from foveal.tuning.state import BULK_STAGES, CHUNK

    keys = boxes(CHUNK, head_dim)
    types = {"d_q": keys, "d_k": keys, "d_v": boxes(CHUNK, 64), "p_o": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(("p_rates", "p_initial", "p_after", "p_final"), "*fp32")
    types |= dict.fromkeys(("p_ready", "p_pieces"), "*i32")
    numbers = ("q_stride_h", "k_stride_h", "v_stride_h", "heads", "groups", "items")
    types |= dict.fromkeys(numbers, "i32")
    constants = {"DECAY": decay, "DV": value_dim, "STAGES": BULK_STAGES, "GROUPS": value_dim // 64}
    if decay == 0:
        constants["p_rates"] = None
    found = compiled(state_additive_bulk, types, constants)
    assert found.metadata.shared <= LARGEST_SHARED
    assert "wgmma" in found.asm["ptx"]


@pytest.mark.parametrize(("maps", "decay", "tile"), [(False, 2, 32), (True, 3, 64)])
def test_walk(maps: bool, decay: int, tile: int) -> None:
    from foveal.engines.state.bulk_walk import state_walk_bulk
    from foveal.tuning.state import CHUNK, WALK_STAGES

    keys = boxes(CHUNK, 1, 128)
    types = {"d_k": keys, "d_w": keys, "d_u": boxes(CHUNK, 1, tile), "d_states": boxes(128, tile)}
    types |= dict.fromkeys(("p_sums", "p_before", "p_final"), "*fp32")
    types |= {"p_u": "*bf16", "p_pieces": "*i32", "heads": "i32", "groups": "i32"}
    constants = {"MAPS": maps, "READS": False, "DECAY": decay, "DV": 128, "STAGES": WALK_STAGES}
    constants |= dict.fromkeys(("d_q", "d_pairs", "p_o"))
    types["scale"] = "fp32"
    if maps:
        constants |= {"d_states": None, "p_before": None}
    found = compiled(state_walk_bulk, types, constants)
    assert found.metadata.shared <= LARGEST_SHARED
    assert "wgmma" in found.asm["ptx"]


@pytest.mark.parametrize("decay", [2, 3])
def test_walk_that_reads(decay: int) -> None:
    from foveal.engines.state.bulk_walk import state_walk_bulk
    from foveal.tuning.state import CHUNK, READ_STAGES

    keys = boxes(CHUNK, 1, 128)
    types = dict.fromkeys(("d_k", "d_w", "d_q"), keys)
    types |= {"d_u": boxes(CHUNK, 1, 64), "d_pairs": boxes(CHUNK, 1, CHUNK)}
    types |= {"p_sums": "*fp32", "p_before": "*fp32", "p_u": "*bf16", "p_o": "*bf16"}
    types |= {"p_pieces": "*i32", "heads": "i32", "groups": "i32", "scale": "fp32"}
    constants = {"MAPS": False, "READS": True, "DECAY": decay, "DV": 128, "STAGES": READ_STAGES}
    constants |= dict.fromkeys(("d_states", "p_final"))
    found = compiled(state_walk_bulk, types, constants)
    assert found.metadata.shared <= LARGEST_SHARED
    assert "wgmma" in found.asm["ptx"]


def test_joins_in_groups() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from foveal.engines.state import join

    constants = {"DK": 128, "DV": 128, "ROWS": 128, "TILE": 16, "PRECISION": "tf32"}
    kernels = (join.state_compose_forward, join.state_groups_forward, join.state_apply_forward)
    for kernel in kernels:
        kinds = {n: "*fp32" if n.startswith("p_") else "i32" for n in kernel.arg_names}
        signature = kinds | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants)
        options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert found.metadata.shared <= LARGEST_SHARED


@pytest.mark.parametrize(("head_dim", "value_dim"), [(128, 128), (64, 64)])
@pytest.mark.parametrize("channels", [True, False])
def test_inside_chunks(head_dim: int, value_dim: int, channels: bool) -> None:
    from foveal.engines.state.bulk_channels import state_channels_bulk, state_tokens_bulk
    from foveal.tuning.state import CHUNK, LEVELS, REACH

    kernel = state_channels_bulk if channels else state_tokens_bulk
    halves = ("p_q", "p_k", "p_v", "p_pairs", "p_w", "p_u", "p_since", "p_until")
    types = dict.fromkeys(halves, "*bf16") | {"scale": "fp32"}
    types |= dict.fromkeys(("p_decay", "p_sums", "p_gate"), "*fp32")
    types |= dict.fromkeys(("p_left", "p_chunks"), "*i32")
    types |= dict.fromkeys(("heads", "groups"), "i32")
    types |= {f"{x}_stride_{y}": "i32" for x in "qkv" for y in "th"}
    constants = {"CHUNK": CHUNK, "LEVELS": LEVELS, "DK": head_dim, "DV": value_dim}
    constants |= {"REACH": REACH} if channels else {}
    found = compiled(kernel, types, constants)
    programs = 2 if channels else 3  # on a multiprocessor
    assert found.metadata.shared <= LARGEST_SHARED // programs
    assert "wgmma" in found.asm["ptx"]
