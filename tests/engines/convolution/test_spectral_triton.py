"""The GPU edition of the long convolution: emulated against float64, compiled for GPUs, on one."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from tests.engines.convolution import interpreted
from tests.engines.convolution.problems import LONG, Long, failures
from tests.engines.convolution.test_triton import SHARED, TARGETS, Run, interpreter, seed

__all__ = ["interpreter"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
EARLY = ("sm_90", "sm_100")
LARGE: dict[str, Long] = {
    "947 tokens, 200 channels": Long((3, 947, 200), (200, 947)),
    "1,024 tokens": Long((2, 1024, 64), (64, 1024), skip=False),
    "1,024 tokens, a filter for each sample": Long((2, 1024, 64), (2, 64, 1024), skip=False),
    "600 tokens, 42 channels": Long((2, 600, 42), (42, 600)),
}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def room(target: str) -> int:
    """Bytes of shared memory of a program where it copies to it."""
    return SHARED[target] if TARGETS[target][0] == "cuda" else 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", LONG)
def test_agrees_with_the_definition(
    name: str, target: str, interpreter: Run, source: torch.Generator
) -> None:
    settings = room(target), target in EARLY
    assert interpreter(interpreted.failures_of_long, name, *settings, seed(source)) == []


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", [*LONG, *LARGE])
def test_agrees_with_the_definition_on_a_gpu(name: str, source: torch.Generator) -> None:
    problem = (LONG | LARGE)[name]
    tensors = [x.cuda() for x in problem.draw(source)]
    assert failures(problem.call("triton"), problem.definition, tensors, source) == []


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("by_taps", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_fresh_operands_one_behind_the_other(
    name: str, by_taps: bool, source: torch.Generator
) -> None:
    """An early launch reads all of what is written right in front; `by_taps`, no filter is copied."""
    call = LARGE[name].call("triton")
    rounds = [[x.cuda() for x in LARGE[name].draw(source)] for _ in range(3)]
    own = [torch.full_like(x, torch.nan) for x in rounds[0]]
    if by_taps:
        own[1] = own[1].mT.contiguous().mT

    def run(operands: list[Tensor], late: bool) -> Tensor:
        for mine, x in zip(own, operands, strict=True):
            mine.fill_(torch.nan)
            if late:
                torch.cuda._sleep(100_000)
            mine.copy_(x)
        if not late:
            torch.cuda.synchronize()
        return call(*own)

    expected = [run(operands, late=False) for operands in rounds]
    torch.cuda.synchronize()
    for _ in range(3):
        found = [run(operands, late=True) for operands in rounds]
        found += [call(*own) for _ in range(3)]
        for y, wanted in zip(found, [*expected, *expected[-1:] * 3], strict=True):
            assert torch.equal(y, wanted)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", LARGE)
def test_graphs_replay(name: str, source: torch.Generator) -> None:
    call = LARGE[name].call("triton")
    leaves = [x.cuda().requires_grad_() for x in LARGE[name].draw(source)]
    dy = torch.randn(LARGE[name].x, generator=source).cuda()

    def step() -> tuple[Tensor, ...]:
        y = call(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for _ in range(3):
        with torch.no_grad():
            for leaf, x in zip(leaves, LARGE[name].draw(source), strict=True):
                leaf.copy_(x)
        graph.replay()
        found = [x.clone() for x in held]
        assert all(torch.equal(x, y) for x, y in zip(found, step(), strict=True))


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
        self.kernel = kernel
        self.launches: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def __getitem__(self, programs: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            values = dict(zip(self.kernel.arg_names, arguments, strict=False))
            options = {**{n: v for n, v in values.items() if v is None}, **options}
            self.launches.append((values, options))

        return launch

    def convolve(
        self, x: tuple[int, int, int], filters: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        """The launches of a gated convolution forward, and of its gradient for x."""
        from foveal.engines.convolution import launch_spectral

        u = torch.zeros(x, dtype=dtype)
        ends = launch_spectral.Ends(u, u, u, u)
        taps = torch.zeros(filters, x[2], x[1], dtype=dtype)
        spectrum = launch_spectral.launch_convolution(ends, taps)
        launch_spectral.launch_filtered(ends, spectrum, conjugate=True)

    def compile(self, target: str, number: int, aligned: bool) -> Any:
        """What Triton makes of a launch."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.experimental.gluon._runtime import GluonASTSource

        values, options = self.launches[number]
        signature, constants, hints = {}, {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            if name in options:
                signature[name], constants[name] = "constexpr", options[name]
            elif isinstance(values[name], torch.Tensor):
                signature[name] = "*fp32"
                hints[(place,)] = [["tt.divisibility", 16]] if aligned else []
            else:
                signature[name] = "i32"
        return triton.compile(
            GluonASTSource(self.kernel, signature, constants, hints),
            target=GPUTarget(*TARGETS[target]),
            options={n: v for n, v in options.items() if n not in self.kernel.arg_names},
        )


@pytest.fixture
def recorder(target: str, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """For what a GPU of the target would be given."""
    from foveal.engines.convolution import launch_spectral

    found = Recorder(launch_spectral.convolution_fourier_forward)
    for name, value in (
        ("convolution_fourier_forward", found),
        ("swapped", lambda x: x.mT.contiguous()),
        ("_warp", lambda device: TARGETS[target][2]),
        ("_copy_room", lambda device: room(target)),
        ("_room", lambda device: SHARED[target]),
        ("starts_early", lambda device: target in EARLY),
    ):
        monkeypatch.setattr(launch_spectral, name, value)
    return found


FILTER, ITS_FOLLOWER, BOTH = "may follow", "follows", "follows, copies"
ROUTES: list[tuple[str, tuple[int, int, int], list[str]]] = [
    ("sm_90", (2, 1024, 40), [FILTER, BOTH, "copies"]),
    ("sm_100", (2, 947, 200), [FILTER, BOTH, "copies"]),
    ("sm_90", (2, 1, 4), [FILTER, BOTH, "copies"]),
    ("sm_90", (2, 1024, 42), [FILTER, ITS_FOLLOWER, ""]),
    ("sm_90", (2, 1025, 40), [""] * 8),
    ("sm_80", (2, 1024, 40), [""] * 3),
    ("sm_80", (2, 512, 40), ["", "copies", "copies"]),
    ("gfx942", (2, 512, 40), [""] * 3),
]


@pytest.mark.parametrize(("target", "x", "wanted"), ROUTES)
def test_what_starts_early_and_what_is_copied(
    x: tuple[int, int, int], wanted: list[str], recorder: Recorder
) -> None:
    recorder.convolve(x)
    found = []
    for _, options in recorder.launches:
        follows = options.get("launch_pdl", False)
        assert options["EARLY"] or not follows
        said = {"may follow": options["EARLY"] and not follows, "follows": follows}
        said["copies"] = options["COPIED"]
        found.append(", ".join(name for name, there in said.items() if there))
    assert found == wanted


@pytest.mark.parametrize("target", ["sm_90"])
def test_half_precision_is_not_copied(recorder: Recorder) -> None:
    recorder.convolve((2, 1024, 40), dtype=torch.bfloat16)
    assert not any(options["COPIED"] for _, options in recorder.launches)


@pytest.mark.parametrize(
    ("target", "filters", "warps"), [("sm_90", 1, 8), ("sm_90", 2, 16), ("sm_80", 1, 16)]
)
def test_one_filter_has_more_programs_where_the_next_launch_waits(
    filters: int, warps: int, recorder: Recorder
) -> None:
    recorder.convolve((2, 1024, 40), filters)
    assert [options["num_warps"] for _, options in recorder.launches] == [warps, 16, 16]


@pytest.mark.parametrize(
    ("capability", "hip", "copied", "early"),
    [
        ((7, 5), None, 0, False),
        ((8, 0), None, 163 << 10, False),
        ((9, 0), None, 163 << 10, True),
        ((9, 4), "6.4", 0, False),
    ],
)
def test_what_a_device_can(
    capability: tuple[int, int],
    hip: str | None,
    copied: int,
    early: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from foveal.engines.common.early import starts_early
    from foveal.engines.convolution import launch_spectral

    said = SimpleNamespace(shared_memory_per_block_optin=163 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(launch_spectral, "_room", launch_spectral._room.__wrapped__)
    device = torch.device("cuda", 0)
    assert launch_spectral._copy_room.__wrapped__(device) == copied
    assert starts_early.__wrapped__(device) == early


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles(target: str, recorder: Recorder) -> None:
    for length in (5, 256, 1000, 3000):
        recorder.convolve((1, length, 40))
    seen = set()
    for number, (_, options) in enumerate(recorder.launches):
        for aligned in (True, False) if options["COPIED"] else (True,):
            case = str(sorted(options.items(), key=str)), aligned
            if case in seen:
                continue
            seen.add(case)
            made = recorder.compile(target, number, aligned)
            assert made.metadata.shared <= SHARED[target]
            if options["COPIED"]:
                copies = made.asm["ptx"].count("cp.async.cg" if aligned else "cp.async.ca")
                assert copies > 0
            if options["EARLY"]:
                own = "wait" if options.get("launch_pdl") else "launch_dependents"
                assert made.asm["ptx"].count("griddepcontrol") == 1
                assert f"griddepcontrol.{own}" in made.asm["ptx"]
