"""What a process with Triton's interpreter runs: the GPU editions of the convolution engine on the CPU."""

from __future__ import annotations

import torch

from foveal.engines.convolution import triton as edition
from tests.engines.convolution.emulated import Emulated
from tests.engines.convolution.problems import (
    LONG,
    MIXES,
    ROWS,
    SHAPES,
    Shape,
    convolved,
    defined,
    draw,
    failures,
    mix_definition,
    mixed,
)

WIDE = Shape((1, 2, 70, 2), (2, 3, 19))
DIRECT = (
    "square", "even and dilated", "causal sequence", "volume", "larger than the grid",
    "padding of two kinds", "a filter for each sample", "a sequence filter for each sample",
    "one pixel", "no samples",
)  # fmt: skip
BANDED = ("square", "volume", "larger than the grid", "padding of two kinds", "one pixel", "wide")


def ready() -> bool:
    """Whether the interpreter runs here."""
    return edition.interpreted()


def failures_of(name: str, implementation: str, first: bool, seed: int) -> list[str]:
    """What is worse than float32 allows: the output and all gradients."""
    shape = WIDE if name == "wide" else SHAPES[name]
    shape = shape.first() if first else shape
    source = torch.Generator().manual_seed(seed)
    tensors = draw(shape, source, torch.float32)
    return failures(convolved(shape, implementation), defined(shape), tensors, source)


def failures_of_strips(name: str, first: bool, seed: int) -> list[str]:
    case, source = ROWS[name], torch.Generator().manual_seed(seed)
    tensors = case.draw(source, torch.float32)
    return failures(case.call("triton", first), case.definition, tensors, source)


def failures_of_mix(name: str, seed: int) -> list[str]:
    case, source = MIXES[name], torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=source) for size in (case.weights, case.v)]
    return failures(mixed(case, "triton"), mix_definition(case), tensors, source)


def failures_of_long(name: str, room: int, early: bool, seed: int) -> list[str]:
    """The kernel is in Gluon, which the interpreter does not know: it is emulated.

    room: bytes of shared memory of a GPU that copies to it; early: whether its kernels start early.
    """
    from foveal.engines.convolution import launch_spectral

    kernel = launch_spectral.convolution_fourier_forward
    if not isinstance(kernel, Emulated):
        launch_spectral.convolution_fourier_forward = Emulated(kernel)
    launch_spectral._copy_room = lambda device: room
    launch_spectral.starts_early = lambda device: early
    problem, source = LONG[name], torch.Generator().manual_seed(seed)
    tensors = problem.draw(source)
    return failures(problem.call("triton"), problem.definition, tensors, source)
