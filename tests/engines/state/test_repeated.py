"""What a scan of the delta rule without gradients launches: by an earlier call of its kind, by device."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

SCRIPT = """
from unittest import mock

import torch

import foveal as fv
from foveal.engines.state import task
from foveal.engines.tile import replay
from tests.engines.absent import DEVICES, absent

launched, repeated = [], []


class Compiled:
    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        return lambda *arguments: repeated.append((self.name, grid, len(arguments)))


def run(kernel, *arguments, grid=None, warmup=None, **options):
    launched.append((kernel.__name__, (*grid, 1, 1)[:3], len(kernel.arg_names)))
    return Compiled(kernel.__name__)


def call(length, channels, **options):
    x = {n: torch.empty(1, length, 2, 128, dtype=torch.bfloat16, device="cuda") for n in "qkv"}
    shape = (1, length, 2, 128) if channels else (1, length, 2)
    gates = {"log_decay": torch.empty(shape, device="cuda")}
    gates["write_gate"] = torch.empty(1, length, 2, device="cuda")
    launched.clear()
    repeated.clear()
    o, state = fv.scan(**x, **gates, rule=fv.Delta(), return_state=True, **options)
    return tuple(o.shape), o.dtype, tuple(state.shape), state.dtype


from triton.runtime.jit import JITFunction

with absent(DEVICES["sm_90"]), torch.no_grad():
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(replay, "_ATTEMPTS", 4),
        mock.patch.object(replay, "compile_side_by_side", lambda *_: None),
    ):
        for channels in (True, False):
            results = [call(40_000, channels)]
            first = list(launched)
            assert first and not repeated
            for _ in range(3):
                results.append(call(40_000, channels))
            assert not launched, launched
            assert repeated == first, (repeated, first)
            assert len(set(results)) == 1, results
            # Another length, scale or way to cut is another kind.
            call(40_001, channels)
            assert launched and not repeated
            call(40_000, channels, scale=0.5)
            assert launched and not repeated
            piece_of, task.piece_of = task.piece_of, lambda *_: 1 << 20
            call(40_000, channels)
            assert launched and not repeated and len(launched) < len(first)
            task.piece_of = piece_of
print("done")
"""


OTHERS = """
import itertools

import torch

import foveal as fv
from foveal.engines.state import task
from tests.engines.absent import DEVICES, absent


def names(dtype, channels):
    x = {n: torch.empty(1, 300, 2, 128, dtype=dtype, device="cuda") for n in "qkv"}
    shape = (1, 300, 2, 128) if channels else (1, 300, 2)
    fv.scan(**x, log_decay=torch.empty(shape, device="cuda"), rule=fv.Delta(), implementation="triton")
    found = [call.kernel.__name__ for call in calls]
    each = {call.options["EACH"] for call in calls if "EACH" in call.options}
    calls.clear()
    return found, each


dtypes = (torch.bfloat16, torch.float16, torch.float32)
for device, dtype, channels in itertools.product(DEVICES, dtypes, (True, False)):
    task.has_bulk_copies.cache_clear()
    with absent(DEVICES[device]) as calls, torch.no_grad():
        found, each = names(dtype, channels)
    own = "state_channels_bulk" if channels else "state_tokens_bulk"
    sums = "state_sums_forward" in found
    # float16 has no room for the factors of channels.
    room = dtype == torch.bfloat16 or (dtype == torch.float16 and not channels)
    if device == "sm_90" and room:
        assert own in found and each == {4} and sums != channels, (device, dtype, found, each)
    else:
        assert own not in found and each == {1} and sums, (device, dtype, found, each)
print("done")
"""


@pytest.mark.parametrize("script", [SCRIPT, OTHERS], ids=["repeated", "devices"])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_launches(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
