"""Backward passes read what was saved for them once: a checkpoint gives it no second time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import foveal as fv

ROOT = Path(fv.__file__).parent


def _reads(function: ast.FunctionDef) -> int:
    names = (node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute))
    return sum(name == "saved_tensors" for name in names)


def test_saved_tensors_are_read_once() -> None:
    """Those of kernels too, which run on a GPU alone."""
    found = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in ("backward", "_backward"):
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = _reads(node)
    assert max(found.values()) == 1, found


@pytest.mark.parametrize("score", [fv.Softmax(), fv.Entmax(1.5), fv.LocalLinear(0.5)], ids=str)
def test_a_checkpoint_whose_gradients_are_recorded(
    score: fv.Score, source: torch.Generator
) -> None:
    q, k, v = (
        torch.randn(1, 20, 2, 8, generator=source, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fv.attend(q, k, v, fv.Causal(), score, implementation="cpu")

    o = checkpoint(call, q, k, v, use_reentrant=False)
    found = torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=True)
    expected = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(fv.errors.RefusedError, match="second derivative"):
        torch.autograd.grad(found[0].sum(), q)
