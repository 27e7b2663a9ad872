# mypy: ignore-errors
"""`merge` of two branches on a GPU, in one pass over them forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.engines.common.once import once_differentiable

_ELEMENTS = 4096


@triton.jit
def _weights(p_l1, p_l2, row, inside):
    """Shares of the two branches in a row, and the log of what they sum to."""
    l1 = tl.load(p_l1 + row, mask=inside, other=float("-inf"))
    l2 = tl.load(p_l2 + row, mask=inside, other=float("-inf"))
    top = tl.maximum(l1, l2)
    safe = tl.where(top == float("-inf"), 0.0, top)
    e1 = tl.exp(l1 - safe)
    e2 = tl.exp(l2 - safe)
    total = e1 + e2
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), tl.log(divisor) + safe)
    return e1 / divisor, e2 / divisor, lse


@triton.jit
def compose_merge_forward(
    p_o1, p_l1, p_o2, p_l2, p_o, p_l, rows,
    DIM: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """o [rows, DIM] and lse [rows] of two of each; all contiguous, lses float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    w1, w2, lse = _weights(p_l1, p_l2, row, inside)
    column = tl.arange(0, PAD)
    at = row.to(tl.int64)[:, None] * DIM + column[None, :]
    mask = inside[:, None] & (column < DIM)[None, :]
    o1 = tl.load(p_o1 + at, mask=mask, other=0.0).to(tl.float32)
    o2 = tl.load(p_o2 + at, mask=mask, other=0.0).to(tl.float32)
    o = w1[:, None] * o1 + w2[:, None] * o2
    tl.store(p_o + at, o, mask=mask)
    tl.store(p_l + row, lse, mask=inside)


@triton.jit
def compose_merge_backward(
    p_o1, p_l1, p_o2, p_l2, p_do, p_dl, p_do1, p_dl1, p_do2, p_dl2, rows,
    DIM: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """do_n = w_n do,  dlse_n = w_n (do . (o_n - o) + dlse)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    w1, w2, _ = _weights(p_l1, p_l2, row, inside)
    column = tl.arange(0, PAD)
    at = row.to(tl.int64)[:, None] * DIM + column[None, :]
    mask = inside[:, None] & (column < DIM)[None, :]
    o1 = tl.load(p_o1 + at, mask=mask, other=0.0).to(tl.float32)
    o2 = tl.load(p_o2 + at, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(p_do + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_do1 + at, w1[:, None] * do, mask=mask)
    tl.store(p_do2 + at, w2[:, None] * do, mask=mask)
    # o_1 - o = w_2 (o_1 - o_2): without the cancellation of the larger branch against itself.
    apart = tl.sum(do * (o1 - o2), 1)
    dl = tl.load(p_dl + row, mask=inside, other=0.0)
    tl.store(p_dl1 + row, w1 * (w2 * apart + dl), mask=inside)
    tl.store(p_dl2 + row, w2 * (dl - w1 * apart), mask=inside)


class MergedPair(torch.autograd.Function):
    """(o, lse) of (o1, lse1, o2, lse2): outputs of one dtype and shape, lses float32."""

    @staticmethod
    def forward(
        ctx: Any, o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor
    ) -> tuple[Tensor, Tensor]:
        o1, lse1, o2, lse2 = (x.contiguous() for x in (o1, lse1, o2, lse2))
        o, lse = torch.empty_like(o1), torch.empty_like(lse1)
        _launch(compose_merge_forward, o1, lse1, o2, lse2, o, lse)
        ctx.save_for_backward(o1, lse1, o2, lse2)
        return o, lse

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
        given = ctx.saved_tensors
        found = tuple(torch.empty_like(x) for x in given)
        do1, dlse1, do2, dlse2 = found
        _launch(
            compose_merge_backward,
            *given,
            do.contiguous(),
            dlse.contiguous(),
            do1,
            dlse1,
            do2,
            dlse2,
        )
        return found


def _launch(kernel: Any, o: Tensor, *tensors: Tensor) -> None:
    dim = o.shape[-1]
    pad = triton.next_power_of_2(dim)
    rows = o.numel() // dim if dim else 0
    at_once = max(1, _ELEMENTS // pad)
    if rows:
        with torch.cuda.device(o.device) if o.is_cuda else torch.no_grad():
            kernel[(triton.cdiv(rows, at_once),)](
                o, *tensors, rows, DIM=dim, PAD=pad, ROWS=at_once, num_warps=4
            )
