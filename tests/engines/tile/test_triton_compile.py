"""Every kernel of the Triton edition compiles for GPUs that are not here."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import foveal as fv
from foveal.engines.tile import triton as edition
from foveal.tuning import tile as tuning
from tests.engines.tile.compiled import Launch, recorded

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}


def _lists() -> fv.Pattern:
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    return fv.Blocks(fv.BlockSelection.from_block_mask(mask, 128, 128))


def _terms(kind: str) -> fv.Score:
    if kind == "bias":
        return fv.Softmax(soft_cap=9.0) + fv.Bias(torch.zeros(1, 2, 512, 512))
    return fv.Alibi(torch.ones(2)) + fv.RelativeBias(torch.zeros(2, 1023))


CASES: dict[str, tuple[fv.Pattern, tuple[int, ...], int, torch.dtype, fv.Score]] = {
    "causal 128": (fv.Causal(), (512,), 128, torch.float16, fv.Softmax()),
    "causal 256": (fv.Causal(), (512,), 256, torch.float16, fv.Softmax()),
    "grid 64": (fv.Neighborhood((9, 9)), (32, 32), 64, torch.float16, fv.Softmax()),
    "space 128": (fv.Neighborhood((5, 9, 9)), (8, 16, 16), 128, torch.float16, fv.Softmax()),
    "lists 80": (_lists() & fv.Causal(), (512,), 80, torch.float16, fv.Softmax()),
    "spans": (fv.Sliding(99, 0, sink_tokens=4), (512,), 128, torch.float16, fv.Softmax()),
    "bits, bias": (fv.Sliding(99) | fv.Strided(37), (512,), 64, torch.float16, _terms("bias")),
    "one channel": (fv.Causal(), (11, 7), 1, torch.float16, fv.Softmax()),
    "float32, table": (fv.Causal(), (512,), 64, torch.float32, _terms("table")),
}
COMBINATIONS = [
    *(("causal 128", target) for target in TARGETS if target != "sm_86"),
    ("grid 64", "gfx942"),
    ("lists 80", "sm_90"),
    pytest.param("causal 128", "sm_86", marks=pytest.mark.slow),
    *(
        pytest.param(name, "sm_90", marks=pytest.mark.slow)
        for name in CASES
        if name not in ("causal 128", "lists 80")
    ),
]


def launches(name: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What forward and backward of a case launch on a device of this class."""
    from foveal.engines.tile import forward, gradients, repair

    monkeypatch.setattr(edition, "_interpreted", lambda: True)
    monkeypatch.setattr(tuning, "architecture", lambda device: architecture)
    pattern, grid, dim, dtype, score = CASES[name]
    x = torch.zeros(1, *grid, 2, dim, dtype=dtype)
    q, k, v = (x.clone().requires_grad_() for _ in "qkv")
    for term in getattr(score, "members", (score,)):
        parameter: Any = getattr(term, "parameter", None)
        if parameter is not None:
            parameter.requires_grad_()
    kernels = {
        "tile_attend_forward": forward,
        "tile_attend_repair": repair,
        "tile_attend_backward_shift": gradients,
        "tile_attend_backward_q": gradients,
        "tile_attend_backward_kv": gradients,
        "tile_attend_repair_q": gradients,
        "tile_attend_repair_kv": gradients,
    }
    with recorded(kernels) as found:
        o = fv.attend(q, k, v, pattern, score, implementation="triton")
        o.sum().backward()
    return found


@pytest.mark.parametrize(("name", "architecture"), COMBINATIONS)
def test_every_kernel_compiles_and_fits(
    name: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    kind = TARGETS[architecture][0]
    if ("amd" if kind == "hip" else "nvidia") not in backends:
        pytest.skip(f"this Triton has no backend for {kind}")
    found = launches(name, architecture, monkeypatch)
    assert {launch.name for launch in found} == {
        "tile_attend_forward",
        "tile_attend_repair",
        "tile_attend_backward_shift",
        "tile_attend_backward_q",
        "tile_attend_backward_kv",
        "tile_attend_repair_q",
        "tile_attend_repair_kv",
    }
    for launch in found:
        compiled = launch.compile(GPUTarget(*TARGETS[architecture]))
        assert compiled.metadata.shared <= SHARED[architecture], launch.name
