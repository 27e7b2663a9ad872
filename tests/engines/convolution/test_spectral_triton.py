"""The GPU edition of the long convolution: emulated against float64, compiled for GPUs, on one."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import foveal as fv
from tests.engines.convolution import interpreted
from tests.engines.convolution.problems import LONG, failures
from tests.engines.convolution.test_triton import SHARED, TARGETS, Run, interpreter, seed

__all__ = ["interpreter"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.mark.parametrize("name", LONG)
def test_agrees_with_the_definition(name: str, interpreter: Run, source: torch.Generator) -> None:
    assert interpreter(interpreted.failures_of_long, name, seed(source)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LONG)
def test_agrees_with_the_definition_on_a_gpu(name: str, source: torch.Generator) -> None:
    tensors = [x.cuda() for x in LONG[name].draw(source)]
    assert failures(LONG[name].call("triton"), LONG[name].definition, tensors, source) == []


def test_says_what_it_refuses() -> None:
    def refusal(x: tuple[int, ...], filter: tuple[int, ...], **options: Any) -> str:
        dtype = options.pop("dtype", torch.float32)
        tensors = (torch.empty(size, device="meta", dtype=dtype) for size in (x, filter))
        found = fv.explain_fftconv(*tensors, device="cuda", **options)
        return dict(found.refusals).get("triton", found.implementation[0])

    assert refusal((2, 100, 3), (3, 100)) == "triton"
    assert "float32" in refusal((2, 100, 3), (3, 100), dtype=torch.bfloat16)
    assert "65,536" in refusal((1, 2**17, 3), (3, 100))
    assert "float64" in refusal((2, 100, 3), (3, 100), dtype=torch.float64)
    assert "circular" in refusal((2, 100, 3), (3, 100), causal=False)
    assert "axes" in refusal((2, 10, 10, 3), (3, 10, 10))
    assert "empty" in refusal((0, 100, 3), (3, 100))
    assert "at most" in refusal((1, 2**20 + 1, 1), (1, 5))
    assert "32-bit" in refusal((1, 2**19, 2048), (2048, 5))


class Recorder:
    """Stands in for a kernel and keeps what it is called with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, dict[str, tuple[dict[str, Any], dict[str, Any]]]()

    def __getitem__(self, programs: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            values = dict(zip(self.kernel.arg_names, arguments, strict=False))
            options = {**{n: v for n, v in values.items() if v is None}, **options}
            self.calls[str(sorted(options.items(), key=str))] = values, options

        return launch


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from foveal.engines.convolution import launch_spectral

    recorder = Recorder(launch_spectral.convolution_fourier_forward)
    monkeypatch.setattr(launch_spectral, "convolution_fourier_forward", recorder)
    monkeypatch.setattr(launch_spectral, "_warp", lambda device: TARGETS[target][2])
    for length in (256, 3000):
        x = torch.zeros(1, length, 40)
        z = torch.zeros(1, 2, launch_spectral.points_of(length), 40)
        ends = launch_spectral.Ends(x, x, x, x)
        launch_spectral.launch_filtered(ends, z)
    for values, options in recorder.calls.values():
        signature, constants = {}, {}
        for name in recorder.kernel.arg_names:
            if name in options:
                signature[name], constants[name] = "constexpr", options[name]
            else:
                signature[name] = "*fp32" if isinstance(values[name], torch.Tensor) else "i32"
        made = triton.compile(
            GluonASTSource(fn=recorder.kernel, signature=signature, constexprs=constants),
            target=GPUTarget(*TARGETS[target]),
            options={n: v for n, v in options.items() if n not in recorder.kernel.arg_names},
        )
        assert made.metadata.shared <= SHARED[target]
