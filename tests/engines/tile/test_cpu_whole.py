"""Small problems as one fused call on all pairs, and the same problems by tiles."""

import pytest
import torch

import foveal as fv
from foveal.engines.tile import cpu_whole
from foveal.testing import Sizes, check_attend, qkv
from tests.problems import PATTERNS, Grids
from tests.watch import Watch

FUSED = "_scaled_dot_product_flash_attention_for_cpu"


def ways(monkeypatch: pytest.MonkeyPatch, tiled_call: float) -> None:
    """Makes the calls of a problem by tiles cost so much."""
    monkeypatch.setattr(cpu_whole, "_TILED_CALL", tiled_call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiled_call", [-1e18, 1e18], ids=["tiles", "whole"])
@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=str)
def test_either_way_agrees_for_every_pattern(
    pattern: fv.Pattern,
    grids: Grids,
    tiled_call: float,
    dtype: torch.dtype,
    source: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways(monkeypatch, tiled_call)
    q, k, v = qkv(Sizes(*grids, batch=2, q_heads=4, kv_heads=2), source, dtype)
    check_attend(q, k, v, pattern, return_lse=False, implementation="cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_numbers_go_by_tiles(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ways(monkeypatch, 1e18)
    q, k, v = (torch.randn(1, 40, 2, 8) for _ in range(3))
    v[:, 30] = value
    o = fv.attend(q, k, v, fv.Sliding(5))
    seen = torch.zeros(40, dtype=torch.bool)
    seen[30:36] = True
    assert not o[:, seen].isfinite().any()
    assert o[:, ~seen].isfinite().all()


def method(pattern: fv.Pattern, length: int, **options: object) -> str | None:
    q = torch.empty(1, length, 4, 64, device="meta")
    return fv.explain(q, q, q, pattern, **options).method  # type: ignore[arg-type]


def test_all_pairs_of_small_problems_and_tiles_of_others() -> None:
    said = method(fv.Sliding(15), 64)
    assert said is not None
    assert "all 4,096 pairs at once" in said
    assert said in str(fv.explain(*(torch.empty(1, 64, 4, 64),) * 3, fv.Sliding(15)))
    assert method(fv.Sliding(15), 64, return_lse=True) is None
    assert method(fv.Sliding(15), 64, score=fv.Softmax(soft_cap=5.0)) is None
    assert method(fv.Sliding(127), 4096) is None
    assert method(fv.Causal(), 64) is None  # PyTorch's own
    assert method(fv.Sliding(15), 64, implementation="reference") is None


@pytest.mark.parametrize(("length", "fused"), [(64, True), (4096, False)])
def test_runs_as_explained(length: int, fused: bool) -> None:
    q = torch.randn(1, length, 1, 8)
    fv.attend(q, q, q, fv.Sliding(3))
    with Watch() as watch:
        fv.attend(q, q, q, fv.Sliding(3))
    assert (method(fv.Sliding(3), length) is not None) == fused
    assert FUSED in watch.operators
    assert watch.largest < 2**22


def test_rows_without_keys_go_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ways(monkeypatch, 1e18)
    q, k = torch.randn(1, 20, 2, 8), torch.randn(1, 6, 2, 8)
    pattern = fv.Sliding(2)
    blind = ~pattern.dense_mask(20, 6).any(-1)
    assert blind.any()
    assert fv.explain(q, k, k, pattern).method is None
    assert not fv.attend(q, k, k, pattern)[:, blind].any()


def test_no_second_derivative() -> None:
    q = torch.randn(1, 20, 2, 8, requires_grad=True)
    (dq,) = torch.autograd.grad(fv.attend(q, q, q, fv.Sliding(3)).sum(), q, create_graph=True)
    with pytest.raises(fv.errors.RefusedError, match="second derivative"):
        dq.sum().backward()


def test_what_is_kept_serves_training_after_inference() -> None:
    q = torch.randn(1, 21, 2, 8)
    with torch.inference_mode():
        fv.attend(q, q, q, fv.Sliding(4))
    leaf = q.clone().requires_grad_()
    fv.attend(leaf, leaf, leaf, fv.Sliding(4)).sum().backward()
    assert leaf.grad is not None
