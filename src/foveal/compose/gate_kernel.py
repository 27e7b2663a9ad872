# mypy: ignore-errors
"""Outputs under their gates on a GPU: one pass over them forward and one backward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.engines.common.once import once_differentiable

_ROWS = 32


@triton.jit
def _places(rows, DIM: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a program, which of them there are, and their places with a mask."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, PAD)
    return row, inside, row[:, None] * DIM + column, inside[:, None] & (column < DIM)[None, :]


@triton.jit
def compose_gate_forward(
    p_gates, outputs, p_o, rows, shared, width,
    DIM: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """o = sum_n g_n x_n of rows (batch, token, head); gates [rows / shared, width]; contiguous."""
    row, inside, at, mask = _places(rows, DIM, PAD, ROWS)
    o = tl.zeros([ROWS, PAD], tl.float32)
    for n in tl.static_range(len(outputs)):
        gate = tl.load(p_gates + row // shared * width + n, mask=inside, other=0.0)
        x = tl.load(outputs[n] + at, mask=mask, other=0.0)
        o += gate.to(tl.float32)[:, None] * x.to(tl.float32)
    tl.store(p_o + at, o.to(p_o.dtype.element_ty), mask=mask)


@triton.jit
def compose_gate_backward(
    p_gates, outputs, p_do, p_d_gates, d_outputs, rows, shared, width,
    DIM: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the outputs, and of the gates per row, float32 [rows, width]."""
    row, inside, at, mask = _places(rows, DIM, PAD, ROWS)
    do = tl.load(p_do + at, mask=mask, other=0.0).to(tl.float32)
    for n in tl.static_range(len(outputs)):
        gate = tl.load(p_gates + row // shared * width + n, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(outputs[n] + at, mask=mask, other=0.0).to(tl.float32)
        own = (do * gate[:, None]).to(d_outputs[n].dtype.element_ty)
        tl.store(d_outputs[n] + at, own, mask=mask)
        tl.store(p_d_gates + row * width + n, tl.sum(do * x, 1), mask=inside)


class GatedSum(torch.autograd.Function):
    """sum_n gates[..., n] outputs[n] of gates [B, L, H or 1, at least n] and outputs [B, L, H, D]."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, *outputs: Tensor) -> Tensor:
        gates, *outputs = (x.contiguous() for x in (gates, *outputs))
        ctx.save_for_backward(gates, *outputs)
        o = torch.empty_like(outputs[0])
        _launch(compose_gate_forward, outputs[0], gates, (gates, tuple(outputs), o))
        return o

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, ...]:
        gates, *outputs = ctx.saved_tensors
        found = tuple(torch.empty_like(x) for x in outputs)
        shape = (*outputs[0].shape[:3], gates.shape[3])
        d_gates = torch.zeros(shape, dtype=torch.float32, device=gates.device)
        tensors = gates, tuple(outputs), do.contiguous(), d_gates, found
        _launch(compose_gate_backward, outputs[0], gates, tensors)
        return d_gates.sum_to_size(gates.shape).to(gates.dtype), *found


def _launch(kernel: Any, x: Tensor, gates: Tensor, tensors: tuple[Any, ...]) -> None:
    rows, dim = x.shape[:3].numel(), x.shape[3]
    if rows and dim:
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            kernel[(-(-rows // _ROWS),)](
                *tensors, rows, x.shape[2] // gates.shape[2], gates.shape[3],
                DIM=dim, PAD=1 << (dim - 1).bit_length(), ROWS=_ROWS,
            )  # fmt: skip
