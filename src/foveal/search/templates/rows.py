"""Kernels on rows whose body may be written by anybody: launcher, allocation and signature are ours.

A body is the text of `def kernel(p_x, p_w, p_o, columns, TILE)` (and functions that it calls) in Triton's
language, checked by `foveal.search.verify.static.check_body` before a process sees it.  Program i gets
pointers to row i of x [rows, columns] and of o, and to w [columns].
"""

from __future__ import annotations

import ast
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.search.compiling import Launch

SIGNATURE = ("p_x", "p_w", "p_o", "columns", "TILE")

START = """
def kernel(p_x, p_w, p_o, columns, TILE):
    i = tl.arange(0, TILE)
    inside = i < columns
    x = tl.load(p_x + i, mask=inside, other=-float("inf"))
    largest = tl.max(x, 0)
    e = tl.exp(x - largest)
    e = tl.where(inside, e, 0.0)
    y = e / tl.sum(e, 0) * tl.load(p_w + i, mask=inside, other=0.0)
    tl.store(p_o + i, y, mask=inside)
"""

_AROUND = """
import triton
import triton.language as tl

{functions}

@triton.jit
def launched(p_x, p_w, p_o, columns, x_stride, o_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kernel(p_x + row * x_stride, p_w, p_o + row * o_stride, columns, TILE)
"""


def build(
    *, text: str = START, reference: bool = False, warps: int = 4
) -> Callable[[Tensor, Tensor], Tensor]:
    """softmax(x) * w along rows: the reference, or a kernel with a body and a number of warps."""
    if reference:
        return lambda x, w: torch.softmax(x, -1) * w
    launched = _compiled(text)

    def run(x: Tensor, w: Tensor) -> Tensor:
        o = torch.empty_like(x)
        rows, columns = x.shape
        tile = 1 << max(columns - 1, 1).bit_length()
        launched[(rows,)](x, w, o, columns, x.stride(0), o.stride(0), TILE=tile, num_warps=warps)
        return o

    return run


def launches(
    inputs: Sequence[Tensor], *, architecture: str, text: str = START, warps: int = 4
) -> list[Launch]:
    """What `build` launches, on any class of devices; nothing runs."""
    x, w = inputs
    tile = 1 << max(x.shape[1] - 1, 1).bit_length()
    arguments = (x, w, torch.empty_like(x), x.shape[1], x.stride(0), x.stride(0))
    return [Launch(_compiled(text), arguments, {"TILE": tile, "num_warps": warps})]


def _compiled(text: str) -> Any:
    """The kernel around a body: Triton reads its text from a file."""
    functions = _decorated(text)
    handle, path = tempfile.mkstemp(suffix=".py", dir=os.environ.get("TMPDIR"))
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(_AROUND.format(functions=functions))
    spec = importlib.util.spec_from_file_location(f"body_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.launched


def _decorated(text: str) -> str:
    """The functions of a body as jit functions; parameters in capitals are compile-time constants."""
    tree = ast.parse(text)
    for function in tree.body:
        assert isinstance(function, ast.FunctionDef)
        function.decorator_list = [ast.parse("triton.jit", mode="eval").body]
        for argument in function.args.args:
            if argument.arg.isupper():
                argument.annotation = ast.parse("tl.constexpr", mode="eval").body
    return ast.unparse(ast.fix_missing_locations(tree))
