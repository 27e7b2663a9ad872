"""Adapters of peers that are not installed here: what they are told, by stand-ins for the packages."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from foveal.bench.baselines import baselines
from foveal.bench.baselines.flex import mask_function
from foveal.bench.cases import Case
from foveal.bench.masks import MASKS, masks_suite
from foveal.patterns import Causal, Dense, Neighborhood, Partition, Sliding
from foveal.patterns.documents import Packed
from foveal.scores import Softmax

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = {"q_heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 8, "dtype": torch.bfloat16}
DOCUMENTS = Packed(Causal(), (20, 0, 44))


def _case(pattern: Any, **more: Any) -> Case:
    return Case("x", pattern, (64,), **SMALL | more)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (Dense(), ((64,), False, (-1, -1))),
        (Causal(), ((64,), True, (-1, 0))),
        (Sliding(9), ((64,), True, (9, 0))),
        (Sliding(9, 4), ((64,), False, (9, 4))),
        (DOCUMENTS, ((20, 44), True, (-1, 0))),
        (Packed(Sliding(7), (30, 34)), ((30, 34), True, (7, 0))),
    ],
    ids=repr,
)
def test_flash_attention_is_told_documents_windows_and_causality(
    pattern: Any, told: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[str, Any] = {}

    def stand_in(q, k, v, q_ends, k_ends, q_most, k_most, **options):
        heard.update(options, ends=q_ends.tolist(), most=q_most, shape=list(q.shape))
        return q

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    case = _case(pattern)
    peer = baselines(["flash_attn"])[0]
    assert peer.refuses(case, CUDA) is None
    prepared = peer.prepare(case, case.inputs(CPU))
    out = prepared.tokens(prepared.attend(*prepared.inputs))
    lengths, causal, window = told
    assert out.shape == (1, 64, 4, 8)
    assert heard["shape"] == [64, 4, 8]
    assert heard["ends"] == torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert heard["most"] == max(lengths)
    assert (heard["causal"], heard["window_size"]) == (causal, window)


def test_flashinfer_is_planned_once_and_has_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []

    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str) -> None:
            assert layout == "NHD"

        def plan(self, *arguments: Any, **options: Any) -> None:
            plans.append((arguments, options))

        def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return q

    package = SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    peer, case = baselines(["flashinfer"])[0], _case(DOCUMENTS)
    prepared = peer.prepare(case, case.inputs(CPU))
    prepared.attend(*prepared.inputs)
    prepared.attend(*prepared.inputs)
    ((arguments, options),) = plans
    assert arguments[0].tolist() == [0, 20, 64]
    assert arguments[2:] == (4, 2, 8)
    assert options["causal"]
    assert options["window_left"] == -1
    assert peer.refuses_backward(case, CUDA)
    assert peer.refuses(_case(Sliding(5, 5)), CUDA) == "its windows are causal"


@pytest.mark.parametrize(
    ("known", "groups"), [(("window_size", "enable_gqa"), 2), (("is_causal",), 1)]
)
def test_varlen_of_each_pytorch_is_told_what_it_knows(
    known: tuple[str, ...], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[str, Any] = {}

    def call(q, k, v, q_ends, k_ends, q_most, k_most, **options):
        heard.update(options, heads=k.shape[1])
        return q

    peer = baselines(["varlen"])[0]
    monkeypatch.setattr(type(peer), "_parameters", lambda self: known)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=call))
    case = _case(DOCUMENTS)
    assert peer.refuses(case, CUDA) is None
    prepared = peer.prepare(case, case.inputs(CPU))
    prepared.attend(*prepared.inputs)
    assert heard["heads"] == 4 // groups
    assert heard.get("enable_gqa", True) is True
    assert heard.get("is_causal", True) is True
    assert heard.get("window_size", (-1, 0)) == (-1, 0)
    windowed = peer.refuses(_case(Sliding(5)), CUDA)
    assert (windowed is None) == ("window_size" in known)


@pytest.mark.parametrize("name", ["cudnn", "flash2", "varlen", "flash_attn", "flashinfer"])
def test_kernels_of_a_gpu_refuse_what_they_cannot_say(name: str) -> None:
    peer = baselines([name])[0]
    reasons = [
        peer.refuses(_case(Causal()), CPU),
        peer.refuses(_case(Causal(), dtype=torch.float32), CUDA),
        peer.refuses(_case(Partition(8)), CUDA),
        peer.refuses(_case(Dense(), score=Softmax(soft_cap=3.0)), CUDA),
        peer.refuses(Case("x", Neighborhood(3), (8, 8), **SMALL), CUDA),
    ]
    assert all(reason and len(reason.split()) > 2 for reason in reasons)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.name)
def test_mask_functions_for_flex_are_the_patterns(mask) -> None:
    case = next(c for c in masks_suite(CPU, (192,)).cases if c.column == mask.name)
    function = mask_function(case.pattern, case.extent, case.q_heads, CPU)
    index = torch.arange(192)
    for head in (0, case.q_heads - 1):
        seen = function(torch.tensor(0), torch.tensor(head), index[:, None], index[None])
        wanted = case.pattern.dense_mask(192, 192)
        assert torch.equal(seen.expand(192, 192), wanted.reshape(-1, 192, 192)[0])
