# mypy: ignore-errors
"""The pages of listed blocks on a GPU, in one launch."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.caches.view import View
from foveal.engines.tile.replay import launch

_CHUNK = 512


@triton.jit(do_not_specialize=["pieces", "pages"])
def compose_listed_pages(
    p_blocks, block_steps, p_table, table_steps, p_lengths, length_steps, p_entries, p_found,
    pieces, pages, steps,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, SIZE: tl.constexpr, OWN_HEAD: tl.constexpr,
    LISTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Entries [B, LISTS, pieces] in pieces of SIZE tokens, and how many tokens each list holds.

    A block of BLOCK tokens is BLOCK / SIZE pieces; OWN_HEAD adds the place of a list's head to its entries.
    """
    b = tl.program_id(0) // LISTS
    h = tl.program_id(0) % LISTS
    p_own = p_blocks + b.to(tl.int64) * block_steps[0] + h * block_steps[1]
    p_row = p_table + b.to(tl.int64) * table_steps[0] + h * table_steps[1]
    length = tl.load(p_lengths + b * length_steps[0] + h * length_steps[1])
    PIECES: tl.constexpr = BLOCK // SIZE
    found = tl.zeros([CHUNK], tl.int32)
    for start in range(0, pieces, CHUNK):
        n = start + tl.arange(0, CHUNK)
        block = tl.load(p_own + n // PIECES * block_steps[2], mask=n < pieces, other=-1)
        used = block >= 0
        first = block.to(tl.int64) * BLOCK + n % PIECES * SIZE
        page = tl.minimum(first // PAGE, pages - 1)
        held = tl.load(p_row + page * table_steps[2], mask=used & (page >= 0), other=0)
        slot = held.to(tl.int64) * steps[0] + first % PAGE
        if OWN_HEAD:
            slot += h.to(tl.int64) * steps[1]
        entry = tl.where(used, slot // SIZE, 0).to(tl.int32)
        tl.store(p_entries + tl.program_id(0).to(tl.int64) * pieces + n, entry, mask=n < pieces)
        inside = tl.minimum(tl.maximum(length - first, 0), SIZE).to(tl.int32)
        found += tl.where(used, inside, 0)
    tl.store(p_found + tl.program_id(0), tl.sum(found, 0))


def listed_pages(view: View, indices: Tensor, block: int, size: int) -> tuple[Tensor, Tensor]:
    """The table [B, lists, pieces] and the lengths [B, lists] of blocks [B or 1, 1 or Hkv, n] of a view."""
    table, lengths = view.page_table, view.lengths
    lists = max(indices.shape[1], table.shape[1], lengths.shape[1])
    pieces = indices.shape[2] * (block // size)
    entries = torch.empty(view.batch, lists, pieces, dtype=torch.int32, device=table.device)
    found = torch.empty(view.batch, lists, dtype=torch.int32, device=table.device)
    with torch.cuda.device(table.device) if table.is_cuda else contextlib.nullcontext():
        launch(
            compose_listed_pages,
            (view.batch * lists,),
            *(indices, _steps(indices), table, _steps(table), lengths, _steps(lengths)),
            *(entries, found, pieces, table.shape[2], view.steps[:2]),
            BLOCK=block,
            PAGE=view.page_size,
            SIZE=size,
            OWN_HEAD=lists > 1 and table.shape[1] == 1,
            LISTS=lists,
            CHUNK=_CHUNK,
            num_warps=4,
        )
    return entries, found


def _steps(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 along axes of one."""
    return tuple(0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))
