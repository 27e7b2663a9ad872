"""`local_mix` on the CPU: every implementation against its definition, and its relatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import foveal as fv
from tests.engines.convolution.problems import MIXES, mix_definition, mixed, results


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("implementation", ["reference", "torch", "taps"])
def test_agrees_with_the_definition(
    name: str, implementation: str, source: torch.Generator
) -> None:
    case = MIXES[name]
    tensors = [
        torch.randn(size, generator=source, dtype=torch.float64) for size in (case.weights, case.v)
    ]
    if implementation == "taps" and case.options.get("border") == "shift":
        with pytest.raises(fv.errors.RefusedError, match="moved inside"):
            mixed(case, implementation)(*tensors)
        return
    exact = results(mix_definition(case), tensors)
    for what, got in results(mixed(case, implementation), tensors).items():
        torch.testing.assert_close(got, exact[what], rtol=1e-10, atol=1e-10, msg=what)


@pytest.mark.parametrize("implementation", ["torch", "taps"])
def test_weights_of_places_outside_the_grid_count_nothing(
    implementation: str, source: torch.Generator
) -> None:
    v = torch.randn(1, 4, 2, 3, generator=source)
    weights = torch.randn(1, 4, 2, 11, generator=source)
    outside = (torch.arange(4)[:, None] + torch.arange(-5, 6)).clamp(-1, 4) % 5 == 4
    spoilt = weights.masked_fill(outside[None, :, None], torch.nan)
    got, wanted = (fv.local_mix(w, v, 11, implementation=implementation) for w in (spoilt, weights))
    torch.testing.assert_close(got, wanted)


def test_pieces_do_not_show(source: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MIXES["shifted image"]
    tensors = [torch.randn(size, generator=source) for size in (case.weights, case.v)]
    whole = results(mixed(case, "torch"), tensors)
    monkeypatch.setattr("foveal.engines.convolution.mix_library._GATHERED", 500)
    for what, got in results(mixed(case, "torch"), tensors).items():
        torch.testing.assert_close(got, whole[what], msg=what)


def test_softmax_weights_give_neighborhood_attention(source: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 7, 8, 2, 4, generator=source, dtype=torch.float64) for _ in range(3))
    pattern = fv.Neighborhood(window=(3, 5))
    places, _ = pattern.keys((7, 8))
    near = k.flatten(1, 2)[:, places]  # [B, L, taps, H, D]
    scores = torch.einsum("blhd,blthd->blht", q.flatten(1, 2), near) / 2
    weights = torch.softmax(scores, -1).unflatten(1, (7, 8))
    got = fv.local_mix(weights, v, (3, 5), border="shift")
    torch.testing.assert_close(got, fv.attend(q, k, v, pattern))


def test_equal_weights_are_a_convolution(source: torch.Generator) -> None:
    v = torch.randn(2, 6, 7, 2, 3, generator=source)
    filter = torch.randn(2, 4, 3, generator=source)
    weights = filter.flatten(1).expand(2, 6, 7, 2, 12)
    for causal in (False, True):
        got = fv.local_mix(weights, v, (4, 3), dilation=2, causal=causal)
        wanted = fv.convolve(v.flatten(-2), filter, dilation=2, causal=causal)
        torch.testing.assert_close(got.flatten(-2), wanted)


def test_explains_itself() -> None:
    v = torch.empty(8, 56, 56, 8, 32, device="meta", dtype=torch.bfloat16)
    weights = torch.empty(8, 56, 56, 8, 49, device="meta", dtype=torch.bfloat16)
    got = fv.explain_local_mix(weights, v, 7, device="cuda")
    assert got.implementation == ("triton",)
    assert got.flops == 2 * 8 * 56 * 56 * 8 * 49 * 32
    assert fv.explain_local_mix(weights, v, 7).implementation == ("torch",)


BAD: dict[str, tuple[type[Exception], str, Any]] = {
    "rank": (fv.errors.ShapeError, "v", lambda w, v: fv.local_mix(w[0], v[0, 0], 3)),
    "weights": (fv.errors.ShapeError, "weights", lambda w, v: fv.local_mix(w, v, 5)),
    "dtype": (fv.errors.DtypeError, "v", lambda w, v: fv.local_mix(w, v.double(), 3)),
    "window": (fv.errors.ShapeError, "window", lambda w, v: fv.local_mix(w, v, 0)),
    "too large": (
        fv.errors.ShapeError, "window", lambda w, v: fv.local_mix(w, v, 3, dilation=2, border="shift")
    ),
    "border": (fv.errors.ShapeError, "border", lambda w, v: fv.local_mix(w, v, 3, border="clip")),
    "name": (
        fv.errors.UnknownNameError, "implementation",
        lambda w, v: fv.local_mix(w, v, 3, implementation="cpu"),
    ),
    "refused": (
        fv.errors.RefusedError, "CUDA",
        lambda w, v: fv.local_mix(w, v, 3, implementation="triton"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    kind, argument, call = BAD[name]
    with pytest.raises(kind, match=argument):
        call(torch.zeros(2, 5, 5, 2, 9), torch.zeros(2, 5, 5, 2, 4))
