"""The best blocks of every token by the softmax over compressed keys; no score of a block is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.engines.tile.launches import Launch
from foveal.engines.tile.windows import Windows

_ROWS = 64
_MOST_PLACES = 16
_MOST_WINDOWS = 64
# Probabilities that the CPU holds at once.
_AT_ONCE = 1 << 22


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
    if _has_kernel(q, windows, choice):
        return _on_gpu(q, keys, lse, windows, choice, scale)
    B, Lq, Hq, _ = q.shape
    heads, device = keys.shape[2], q.device
    found = torch.full((B, heads, Lq, choice.best), -1, dtype=torch.int32, device=device)
    bins = _bins(windows)
    step = max(1, _AT_ONCE // max(B * Hq * windows.count, 1))
    window = torch.arange(windows.count, device=device)
    grouped = q.unflatten(2, (heads, -1))
    level = lse.unflatten(2, (heads, -1))
    for at in range(0, Lq, step):
        rows = slice(at, min(at + step, Lq))
        s = torch.einsum("bthgd,bwhd->bhgtw", grouped[:, rows], keys) * scale
        p = torch.exp(s - level[:, rows].permute(0, 2, 3, 1)[..., None])
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
    from foveal.engines.tile.select_kernel import token_select

    B, Lq, Hq, D = q.shape
    heads = keys.shape[2]
    groups = Hq // heads
    pad, blocks, width = _widths(windows, choice)
    group_pad = 1 << (groups - 1).bit_length()
    tokens = max(1, _ROWS // group_pad)
    tiles = -(-Lq // tokens)
    found = torch.empty(B, heads, Lq, choice.best, dtype=torch.int32, device=q.device)
    q, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys))
    arguments = (
        q, keys, lse.transpose(1, 2).contiguous(), found, windows.first, windows.own, windows.seen,
        q.stride()[:3], keys.stride()[:3], heads, groups, Lq, tiles, scale, choice.sinks, choice.locals,
    )  # fmt: skip
    options = {
        "BEST": choice.best, "TOKENS": tokens, "G_PAD": group_pad, "WINDOWS": width, "BLOCKS": blocks,
        "STEP": windows.step, "REACH": windows.reach, "PAD": pad, "D": D,
        "D_PAD": max(16, 1 << (D - 1).bit_length()), "EXACT": q.dtype == torch.float32, "STAGES": 2,
        "num_warps": 4,
    }  # fmt: skip
    Launch(token_select, B * heads * tiles, arguments, options)()
    return found


def _widths(windows: Windows, choice: Choice) -> tuple[int, int, int]:
    """Places of a running list, blocks that are scored at once, and their windows."""
    pad = max(16, 1 << (choice.best - 1).bit_length())
    blocks = pad - -(-windows.reach // windows.step)
    span = windows.step * blocks + windows.reach
    return pad, blocks, max(16, 1 << (span - 1).bit_length())


def _has_kernel(q: Tensor, windows: Windows, choice: Choice) -> bool:
    """What the kernel was checked for on a GPU; elsewhere the scores of some tokens are laid out."""
    if not q.is_cuda or q.dtype != torch.bfloat16 or q.shape[3] > 128:
        return False
    pad, _, width = _widths(windows, choice)
    return pad <= _MOST_PLACES and width <= _MOST_WINDOWS
