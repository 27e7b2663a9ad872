"""What a process with Triton's interpreter runs: lists of blocks per token, and their choice."""

from __future__ import annotations

import torch
from torch import Tensor

import foveal as fv
from foveal.engines.tile import cpu_tokens, select, token_attend
from foveal.engines.tile.token_lists import TokenLists, block_spans
from foveal.engines.tile.windows import windows
from foveal.selectors import VerticalSlash

LN2 = 0.6931471805599453
Sizes = tuple[int, int, int, int, int, int, int, int, bool]


def problem(sizes: Sizes, seed: int) -> tuple[list[Tensor], TokenLists]:
    """q, k, v, do, dlse in float32 and lists in which some tokens list nothing."""
    batch, Lq, Lk, heads, kv_heads, dim, value_dim, block, causal = sizes
    source = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, Lq, heads, dim), (batch, Lk, kv_heads, dim), (batch, Lk, kv_heads, value_dim),
        (batch, Lq, heads, value_dim), (batch, heads, Lq),
    )  # fmt: skip
    tensors = [torch.randn(shape, generator=source) for shape in shapes]
    starts, stops = block_spans(Lk, block, torch.device("cpu"))
    drawn = torch.rand(batch, kv_heads, Lq, len(starts), generator=source) < 0.4
    own = (torch.arange(Lq) + Lk - Lq) // block
    if causal:
        drawn &= torch.arange(len(starts)) <= own[:, None]
    place = torch.where(drawn, torch.arange(len(starts)), len(starts)).sort(-1).values
    indices = torch.where(place == len(starts), -1, place).to(torch.int32)
    return tensors, TokenLists(indices, starts, stops, block, causal, Lk - Lq)


def errors(sizes: Sizes, seed: int, small: bool) -> list[float]:
    """Largest differences from float64 of o, lse, dq, dk, dv, by key and by token."""
    if small:  # several rounds and segments
        token_attend._PART_BYTES, token_attend._SEGMENT = 400, 3
    (q, k, v, do, dlse), lists = problem(sizes, seed)
    scale = sizes[5] ** -0.5
    exact = cpu_tokens.forward(q.double(), k.double(), v.double(), lists, scale)
    dlse = dlse.masked_fill(exact[1] == -torch.inf, 0.0)
    wide = (*(x.double() for x in (q, k, v)), *exact)
    right = (*exact, *cpu_tokens.backward(wide, lists, scale, do.double(), dlse.double()))
    found: list[float] = []
    for by_key in (True, False):
        o, lse = token_attend.forward(q, k, v, lists, scale, by_key)
        gradients = token_attend.backward((q, k, v, o, lse), lists, scale, do, dlse)
        for a, b in zip((o, lse * LN2, *gradients), right, strict=True):
            same = torch.where(a == b, 0.0, a - b)  # both -inf
            found.append(float(same.abs().max()))
    return found


def column_errors(length: int, options: tuple[int, ...], seed: int) -> list[float]:
    """Largest differences of o and lse from float64 along unaligned blocks and columns."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, h, 16, generator=source) for h in (4, 2, 2))
    pattern = fv.Chosen(VerticalSlash(*options).select(q, k)) & fv.Causal()
    found = fv.attend(q, k, v, pattern, return_lse=True, implementation="triton")
    wide_q, wide_k, wide_v = (x.double() for x in (q, k, v))
    exact = fv.attend(wide_q, wide_k, wide_v, pattern, return_lse=True, implementation="reference")
    return [float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)]


def lists_differ(
    Lq: int, Lk: int, heads: int, kv_heads: int, sizes: tuple[int, ...], seed: int
) -> int:
    """Lists of the kernel that are not those of the CPU edition, in float32."""
    length, stride, block, best, cut = sizes
    source = torch.Generator().manual_seed(seed)
    cuts = torch.tensor([0, cut, cut, Lk]) if cut else None
    table = windows(Lq, Lk, length, stride, block, torch.device("cpu"), cuts)
    q = torch.randn(2, Lq, heads, 16, generator=source)
    keys = torch.randn(2, table.count, kv_heads, 16, generator=source)
    window = torch.arange(table.count)
    hidden = (window < table.first[:, None] * table.step) | (window >= table.seen[:, None])
    s = torch.einsum("bthd,bwhd->bthw", q, keys.repeat_interleave(heads // kv_heads, 2)) / 4
    lse = torch.logsumexp(s.masked_fill(hidden[:, None], -torch.inf), -1)
    choice = select.Choice(best, 1, 2)
    ours = select._on_gpu(q, keys, lse, table, choice, 0.25)
    return int((ours != select.select(q, keys, lse, table, choice, 0.25)).any(-1).sum())
