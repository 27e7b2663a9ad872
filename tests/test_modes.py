"""Default devices, imitated tensors, inference and exported programs: no mode of one call outlives it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import foveal as fv
from foveal._kept import kept

LINE = (1, 30, 2, 4)
IMAGE = (1, 6, 9, 2, 4)
CUTS = torch.tensor([0, 10, 30], dtype=torch.int32)
LISTS = fv.BlockSelection(torch.tensor([[0, 1], [1, 3], [0, 2], [3, -1]])[None, None], 8, 8)
PATTERNS: dict[str, tuple[fv.Pattern, tuple[int, ...], dict[str, Tensor]]] = {
    "dense": (fv.Dense(), LINE, {}),
    "window": (fv.Sliding(4, sink_tokens=2), LINE, {}),
    "stride": (fv.Strided(3), LINE, {}),
    "fixed": (fv.Fixed(4), LINE, {}),
    "scales": (fv.Scales((1, 2, 5), window=3), LINE, {}),
    "blocks": (fv.Blocks(LISTS) & fv.Causal(), LINE, {}),
    "documents": (fv.Causal(), LINE, {"cu_seqlens": CUTS}),
    "neighborhood": (fv.Neighborhood((3, 5)), IMAGE, {}),
    "dilated, wrapped": (fv.Neighborhood((3, 3), dilation=(2, 1), border="wrap"), IMAGE, {}),
    "union": (fv.Axial(0) | fv.Neighborhood((3, 3)), IMAGE, {}),
    "shifted windows": (fv.Partition(4, 1), IMAGE, {}),
    "sphere": (fv.Sphere(0.7), IMAGE, {}),
}
Call = Callable[..., Tensor]


def _attend(name: str) -> tuple[Call, tuple[tuple[int, ...], ...]]:
    pattern, shape, options = PATTERNS[name]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fv.attend(q, k, v, pattern, **options)

    return call, (shape, shape, shape)


def _scan(rule: fv.Rule) -> Call:
    def call(q: Tensor, gate: Tensor) -> Tensor:
        return fv.scan(q, q, q, rule, log_decay=gate, write_gate=gate)

    return call


CALLS: dict[str, tuple[Call, tuple[tuple[int, ...], ...]]] = {
    **{name: _attend(name) for name in PATTERNS},
    "scan": (_scan(fv.Delta()), (LINE, LINE[:-1])),
    "scan, two sequences": (
        lambda q, g: fv.scan(q, q, q, fv.Additive(), log_decay=g, cu_seqlens=CUTS),
        (LINE, LINE[:-1]),
    ),
    "convolve": (fv.convolve, ((1, 6, 9, 4), (4, 3, 5))),
    "local_mix": (
        lambda w, v: fv.local_mix(w, v, 3, border="shift"),
        ((*IMAGE[:-1], 9), IMAGE),
    ),
    "fftconv": (fv.fftconv, ((1, 30, 4), (4, 30))),
}


def _inputs(name: str, source: torch.Generator) -> list[Tensor]:
    shapes = CALLS[name][1]
    drawn = [torch.randn(shape, generator=source, device="cpu") for shape in shapes]
    if name.startswith("scan"):
        drawn[-1] = -drawn[-1].abs() / 8
    return [x.requires_grad_() for x in drawn]


def _results(name: str, inputs: list[Tensor]) -> list[Tensor]:
    o = CALLS[name][0](*inputs)
    return [o, *torch.autograd.grad(o.sin().sum(), inputs)]


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of their own for the test: what is found under a mode is found there for the first time."""
    from foveal import _plan
    from foveal._recent import Recent

    monkeypatch.setattr(_plan, "_STATIC", Recent(128))
    monkeypatch.setattr(_plan, "_LISTED", Recent(8))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("nothing_kept")
def test_the_default_device_changes_nothing(name: str, source: torch.Generator) -> None:
    inputs = _inputs(name, source)
    with torch.device("meta"):
        got = _results(name, inputs)
    for a, b in zip(got, _results(name, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("nothing_kept")
def test_the_default_device_changes_nothing_in_a_graph(source: torch.Generator) -> None:
    torch._dynamo.reset()
    inputs = _inputs("neighborhood", source)
    compiled = torch.compile(CALLS["neighborhood"][0], fullgraph=True, backend="aot_eager")
    with torch.device("meta"):
        o = compiled(*inputs)
        got = [o, *torch.autograd.grad(o.sin().sum(), inputs)]
    for a, b in zip(got, _results("neighborhood", inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PATTERNS)
def test_imitated_tensors_have_shapes_and_gradients(name: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):  # lists and cuts of documents are real
        inputs = [torch.empty(shape, requires_grad=True) for shape in CALLS[name][1]]
        got = _results(name, inputs)
    assert [x.shape for x in got] == [inputs[2].shape, *(x.shape for x in inputs)]


@pytest.mark.parametrize("name", CALLS)
def test_the_meta_device_has_shapes_and_gradients(name: str) -> None:
    inputs = [torch.empty(s, device="meta", requires_grad=True) for s in CALLS[name][1]]
    o, *gradients = _results(name, inputs)
    assert o.shape == _imitated(name)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert {x.device.type for x in (o, *gradients)} == {"meta"}


def _imitated(name: str) -> torch.Size:
    with torch.no_grad():
        return CALLS[name][0](*(torch.zeros(shape) for shape in CALLS[name][1])).shape


def test_the_meta_device_checks_a_call() -> None:
    x = torch.empty(IMAGE, device="meta")
    with pytest.raises(fv.errors.PatternError, match="window: got 7"):
        fv.attend(x, x, x, fv.Neighborhood(7))
    with pytest.raises(fv.errors.DeviceError, match="k: got cpu"):
        fv.attend(x, torch.empty(IMAGE), torch.empty(IMAGE))


def test_a_traced_call_is_one_operator(source: torch.Generator) -> None:
    inputs = [x.detach() for x in _inputs("neighborhood", source)]
    traced = make_fx(CALLS["neighborhood"][0], tracing_mode="fake")(*inputs)
    assert "torch.ops.foveal.attend" in traced.code
    assert torch.equal(traced(*inputs), CALLS["neighborhood"][0](*inputs))


@pytest.mark.parametrize(
    "name", [n for n in CALLS if n not in {"local_mix", "scan, two sequences"}]
)
@pytest.mark.usefixtures("nothing_kept")
def test_inference_before_training(name: str, source: torch.Generator) -> None:
    inputs = _inputs(name, source)
    with torch.inference_mode():
        o = CALLS[name][0](*inputs)
    assert torch.equal(_results(name, inputs)[0], o)


@pytest.mark.parametrize(
    "rule",
    [fv.Additive(), fv.Additive(normalised=True), fv.Delta(), fv.MLSTM(), fv.TwoState()],
    ids=str,
)
def test_autocast_stops_at_a_scan(rule: fv.Rule, source: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 70, 2, 8, generator=source).requires_grad_() for _ in range(3))
    gate = -torch.rand(1, 70, 2, generator=source)
    call = partial(fv.scan, q, k, v, rule, log_decay=gate, write_gate=gate, return_state=True)
    _check_without_autocast(lambda: call()[0])
    _check_without_autocast(lambda: fv.scan(q=q, k=k, v=v, rule=rule, write_gate=gate))


@pytest.mark.parametrize("name", ["local_mix", "fftconv"])
def test_autocast_stops_at_a_convolution(name: str, source: torch.Generator) -> None:
    inputs = _inputs(name, source)
    _check_without_autocast(lambda: CALLS[name][0](*inputs))


def test_autocast_stops_at_a_decode(source: torch.Generator) -> None:
    shape = fv.caches.KVShape(1, 2, 8, dtype=torch.float32)
    cache = fv.caches.Contiguous(shape, max_tokens=40)
    cache.append(*torch.randn(2, 1, 40, 2, 8, generator=source).unbind())
    q = torch.randn(1, 3, 4, 8, generator=source)
    _check_without_autocast(lambda: fv.decode(q, cache))


def _check_without_autocast(call: Callable[[], Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        within = call()
    assert torch.equal(within, call())


def test_nothing_of_a_mode_is_kept() -> None:
    calls = []

    @kept(4)
    def ones(count: int) -> Tensor:
        calls.append(count)
        return torch.ones(count)

    with FakeTensorMode():
        ones(3)
    with torch.inference_mode(), torch.device("meta"):
        first = ones(3)
    assert first.device.type == "cpu"
    assert not first.is_inference()
    assert ones(3) is first
    with FakeTensorMode():
        assert ones(3) is not first
    assert calls == [3, 3, 3]


def test_nothing_of_a_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph under capture would fill holds nothing until it is replayed."""

    @kept(4)
    def ones(count: int) -> Tensor:
        return torch.ones(count)

    before = ones(2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        inside = ones(3)
        assert ones(3) is not inside
        assert ones(2) is before
    after = ones(3)
    assert after is not inside
    assert ones(3) is after


def test_nothing_of_a_transform_is_kept(source: torch.Generator) -> None:
    @kept(4)
    def ones(count: int) -> Tensor:
        return torch.ones(count)

    def loss(x: Tensor) -> Tensor:
        return (x * ones(3)).sum()

    torch.func.vmap(torch.func.grad(loss))(torch.randn(2, 3, generator=source))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(ones(3))
    inputs = [x.detach() for x in _inputs("window", source)]
    call = CALLS["window"][0]

    def squares(*inputs: Tensor) -> Tensor:
        return call(*inputs).square().sum()

    inside = torch.func.vmap(torch.func.grad(squares))(*(x[None] for x in inputs))
    torch.testing.assert_close(inside[0], torch.func.grad(squares)(*inputs))
    leaves = [x.requires_grad_() for x in inputs]
    torch.testing.assert_close(inside[0], torch.autograd.grad(squares(*leaves), leaves)[0])


def test_an_exported_program_runs_where_foveal_is_only_imported(
    tmp_path: Path, source: torch.Generator
) -> None:
    """The process that runs it names no verb: importing foveal makes the operators known."""

    class Mixer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(2, 5, 5, generator=source))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            score = fv.Softmax(soft_cap=4.0) + fv.RelativeBias(self.table)
            return fv.attend(q, k, v, fv.Neighborhood(3), score)

    mixer = Mixer()
    inputs = tuple(torch.cat([x.detach()] * 2) for x in _inputs("neighborhood", source))
    batch = torch.export.Dim("batch")
    program = torch.export.export(mixer, inputs, dynamic_shapes=[{0: batch}] * 3)
    torch.export.save(program, tmp_path / "mixer.pt2")
    inputs = tuple(torch.cat([x, x.flip(1)]) for x in inputs)
    torch.save((inputs, mixer(*inputs).detach()), tmp_path / "case.pt")
    code = (
        "import sys, torch, foveal\n"
        "program = torch.export.load(sys.argv[1] + '/mixer.pt2').module()\n"
        "inputs, want = torch.load(sys.argv[1] + '/case.pt')\n"
        "torch.testing.assert_close(program(*inputs).detach(), want)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
