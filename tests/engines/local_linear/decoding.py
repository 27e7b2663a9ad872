"""Steps of a decode on a GPU that is not here, for a process with an absent one."""

from __future__ import annotations

import torch

import foveal as fv
from tests.engines.absent import DEVICES, absent, failures

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = ((128, 128, BF16), (64, 64, F16), (128, 128, F32), (80, 48, F16), (32, 32, BF16))
"""Head size, value size, dtype."""


def outcome(device: str) -> tuple[set[str], list[str]]:
    """Kernels that steps launch, and what is wrong with them on a device."""
    with absent(DEVICES[device]) as found:
        for dim, value_dim, dtype in CASES:
            shapes = (1, 1, 8, dim), (1, 4096, 4, dim), (1, 4096, 4, value_dim)
            q, k, v = (torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)
            for score in (fv.LocalLinear(10.0), fv.Parallax(q)):
                fv.attend(q, k, v, fv.Causal(), score, implementation="triton")
    return {call.name for call in found}, failures(found, DEVICES[device])[1]
