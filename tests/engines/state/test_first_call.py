"""What a first call on a GPU does besides compiling kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

CODE = """
import sys
import torch
from foveal.engines.state import triton as edition
from foveal.engines.state.task import recorded
from foveal.rules.base import Recurrence

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

for decay, delta in (((4,), False), ((128, 4), True), ((128, 4, 64), True)):
    q, k, v = (meta(128, 4, 64, dtype=torch.bfloat16) for _ in range(3))
    gates = meta(*decay), meta(128, 4)
    linear = Recurrence(q, k, v, *gates, None, 1.0, delta, (128,))
    before = set(sys.modules)
    with recorded() as calls:
        o, final, kept = edition._forward(linear, True)
        edition._gradients(linear, o, final, kept, (True, True, False))
    assert len(calls) > 3
    new = {name for name in set(sys.modules) - before if name in ("sympy", "torch._dynamo")}
    assert not new, new
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_listing_the_kernels_imports_no_compiler_of_pytorch() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
