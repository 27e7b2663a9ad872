"""The best blocks of every token by the softmax over compressed keys; no score of a block is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.engines.common.current import on
from foveal.engines.tile.launches import Launch
from foveal.engines.tile.windows import Windows

# Queries of a tile and its compressed keys.
_ROWS = 64
_WINDOWS = 64
_WARPS = 4
_STAGES = 2
# Scores that are ranked together.
_FEW = 32
# Scores of blocks that are in memory at once.
_SCORES = 1 << 25
# Probabilities that the CPU holds at once.
_AT_ONCE = 1 << 22
_SMALLEST = 16


@dataclass(frozen=True)
class Choice:
    """How many blocks a token lists, of them always the first `sinks` and the last `locals`."""

    best: int
    sinks: int
    locals: int


def select(
    q: Tensor, keys: Tensor, lse: Tensor, windows: Windows, choice: Choice, scale: float
) -> Tensor:
    """Ascending blocks of each token and key head, -1 at the end.  int32 [B, Hkv, Lq, best]

    q [B, Lq, Hq, D], compressed keys [B, windows, Hkv, D], natural lse [B, Lq, Hq] of their softmax.
    A block's score is the sum of the probabilities of the windows that overlap it, each as often as its
    strides do, over the query heads that share the key head; ties go to the lower block.
    """
    q, keys, lse = q.detach(), keys.detach(), lse.detach()
    if _has_kernel(q):
        with on(q.device):
            return _on_gpu(q, keys, lse, windows, choice, scale)
    B, Lq, Hq, _ = q.shape
    heads, device = keys.shape[2], q.device
    found = torch.full((B, heads, Lq, choice.best), -1, dtype=torch.int32, device=device)
    bins = _bins(windows)
    step = max(1, _AT_ONCE // max(B * Hq * windows.count, 1))
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped, keys = q.to(wide).unflatten(2, (heads, -1)), keys.to(wide)
    level = lse.unflatten(2, (heads, -1))
    for at in range(0, Lq, step):
        rows = slice(at, min(at + step, Lq))
        s = torch.einsum("bthgd,bwhd->bhgtw", grouped[:, rows], keys) * scale
        p = torch.exp(s - level[:, rows].permute(0, 2, 3, 1)[..., None])
        window = torch.arange(windows.count, device=device)
        first = windows.first[rows, None] * windows.step
        visible = (window >= first) & (window < windows.seen[rows, None])
        p = torch.where(visible, p, 0.0).sum(2)  # [B, heads, tokens, windows]
        found[:, :, rows] = best_blocks(p @ bins.to(p.dtype), windows, choice, rows)
    return found


def best_blocks(score: Tensor, windows: Windows, choice: Choice, rows: slice) -> Tensor:
    """Lists of the best blocks given scores [B, heads, tokens, blocks]."""
    block = torch.arange(score.shape[-1], device=score.device)
    first, own = windows.first[rows, None], windows.own[rows, None]
    forced = (block - first < choice.sinks) | (block > own - choice.locals)
    score = score.masked_fill(forced, torch.inf)
    score = score.masked_fill((block < first) | (block > own), -torch.inf)
    order = torch.sort(score, dim=-1, descending=True, stable=True)
    count = min(choice.best, score.shape[-1])
    chosen = order.indices[..., :count].masked_fill(
        order.values[..., :count] == -torch.inf, score.shape[-1]
    )
    chosen = chosen.sort(-1).values
    chosen = torch.where(chosen == score.shape[-1], -1, chosen).to(torch.int32)
    return torch.nn.functional.pad(chosen, (0, choice.best - count), value=-1)


def _bins(windows: Windows) -> Tensor:
    """How often each window counts to each block.  [windows, blocks]"""
    blocks, device = len(windows.starts), windows.starts.device
    window = torch.arange(windows.count, device=device)[:, None]
    ahead = window - windows.step * torch.arange(blocks, device=device)
    ahead = ahead + windows.reach
    step, reach = windows.step, windows.reach
    most = min(step, reach + 1)
    return torch.minimum(ahead + 1, step + reach - ahead).clamp(0, most).double()


def _on_gpu(
    q: Tensor, keys: Tensor, lse: Tensor, windows: Windows, choice: Choice, scale: float
) -> Tensor:
    from foveal.engines.tile.select_kernel import token_best, token_scores

    B, Lq, Hq, D = q.shape
    heads = keys.shape[2]
    groups = Hq // heads
    step, reach = windows.step, windows.reach
    group_pad, width = _power(groups), len(windows.starts)
    pad = max(_SMALLEST, _WINDOWS // step)
    rows = _SMALLEST if q.dtype == torch.float32 else _ROWS
    tokens = max(rows // group_pad, _SMALLEST // group_pad, 1)
    found = torch.empty(B, heads, Lq, choice.best, dtype=torch.int32, device=q.device)
    q, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys))
    lse = lse.transpose(1, 2).contiguous()
    table = windows.first, windows.own
    options = {
        "TOKENS": tokens, "G_PAD": group_pad, "WINDOWS": _power(step * pad),
        "BLOCKS": pad - -(-reach // step), "STEP": step, "REACH": reach, "PAD": pad,
        "D": D, "D_PAD": max(_SMALLEST, _power(D)),
        "EXACT": q.dtype == torch.float32, "STAGES": _STAGES, "num_warps": _WARPS,
    }  # fmt: skip
    for begin, end in _chunks(windows, B * heads, Lq):
        last = width if windows.packed else _blocks_until(windows, end)
        bits = torch.empty(B * heads, end - begin, last, dtype=torch.int32, device=q.device)
        tiles = -(-(end - begin) // tokens)
        arguments: tuple[Any, ...] = (
            q, keys, lse, bits, *table, windows.seen, q.stride()[:3], keys.stride()[:3],
            heads, groups, Lq, begin, end, tiles, last, scale, choice.sinks, choice.locals,
        )  # fmt: skip
        Launch(token_scores, B * heads * tiles, arguments, options)()
        programs = B * heads * (end - begin)
        few = torch.empty(programs, _FEW, dtype=torch.int32, device=q.device)
        arguments = (bits, few, found, *table, Lq, begin, end, last)
        sizes = {"BEST": choice.best, "BEST_PAD": _power(choice.best), "FEW": _FEW, "num_warps": 1}
        Launch(token_best, programs, arguments, sizes)()
    return found


def _chunks(windows: Windows, lines: int, Lq: int) -> Iterator[tuple[int, int]]:
    """Tokens whose scores are in memory together: at most _SCORES of them, and few different widths."""
    begin = 0
    while begin < Lq:
        if windows.packed:
            last, most = len(windows.starts), Lq
        else:
            reached = _blocks_until(windows, begin + 1)
            last = max(_power(reached + 1), 256)
            most = last * windows.block - windows.shift
        end = min(Lq, max(most, begin + 1), begin + max(_SCORES // (lines * last), 1))
        yield begin, end
        begin = end


def _blocks_until(windows: Windows, end: int) -> int:
    """Blocks that tokens before `end` of a sequence may see."""
    return (end - 1 + windows.shift) // windows.block + 1


def _power(size: int) -> int:
    """The power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _has_kernel(q: Tensor) -> bool:
    """What the kernels were compared with float64 for on a GPU."""
    return q.is_cuda and q.dtype != torch.float64 and q.shape[3] <= 128
