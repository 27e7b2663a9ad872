"""Edits keep what a program computes, to the exactness that they claim; one of each kind is checked."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest
import torch

from foveal.search.operators.rewrites import BITWISE, REWRITES, in_rows, stored

PROGRAM = """
import torch

def candidate(x, w, b):
    m = x.amax(-1, keepdim=True)
    y = torch.exp(x - m) / torch.exp(x - m).sum(-1, keepdim=True)
    z = x.contiguous() @ w + b
    s = (x ** 2).sum(-1, keepdim=True) / torch.sqrt(x.abs() + 1.0)
    t = torch.exp(x) * 0.5
    a = torch.softmax(x @ w.transpose(-2, -1) * 0.3, -1) @ w
    total = torch.zeros_like(x)
    for i in range(3):
        for j in range(2):
            total = total + x * (i + 1) * (j + 2)
    return y + z + s + t + a + total
"""


def run(tree: ast.Module) -> torch.Tensor:
    names: dict[str, Any] = {}
    exec(compile(tree, "<edited>", "exec"), names)
    source = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(6, 6, generator=source, dtype=torch.float64) for _ in "xwb")
    found: torch.Tensor = names["candidate"](x, w, b)
    return found


TREE = ast.parse(PROGRAM)


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.name)
def test_an_edit_keeps_the_result(rewrite: Any) -> None:
    expected = run(TREE)
    places = rewrite.places(TREE)
    assert places
    for place in range(places):
        edited = rewrite.apply(TREE, place)
        assert ast.unparse(edited) != ast.unparse(TREE)
        got = run(ast.parse(ast.unparse(edited)))
        if rewrite.exactness == BITWISE:
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def function(text: str) -> ast.FunctionDef:
    (found,) = ast.parse(text).body
    assert isinstance(found, ast.FunctionDef)
    return found


def test_what_is_computed_twice_is_kept() -> None:
    found = stored(function("def f(x):\n    return x.exp() / x.exp().sum()"))
    assert found is not None
    assert ast.unparse(found).count("exp") == 1
    assert stored(function("def f(x):\n    return x.exp()")) is None
    assert (
        stored(function("def f(x):\n    y = x\n    a = y.exp()\n    y = a\n    return y.exp()"))
        is None
    )


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_rows_at_a_time_give_the_same_rows(rows: int) -> None:
    text = "import torch\n\ndef candidate(x, w):\n    return torch.softmax(x, -1) * w\n"
    split = in_rows(ast.parse(text), "candidate", rows)
    assert split is not None
    names: dict[str, Callable[..., torch.Tensor]] = {}
    exec(compile(split, "<edited>", "exec"), names)
    x, w = torch.randn(7, 5), torch.randn(5)
    torch.testing.assert_close(names["candidate"](x, w), torch.softmax(x, -1) * w)
    assert in_rows(split, "candidate", rows) is None
