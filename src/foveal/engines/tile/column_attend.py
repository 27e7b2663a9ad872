"""Attention along runs of keys and single keys on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.engines.tile.spec import padded
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.combine import Intersection
from foveal.patterns.dense import Causal
from foveal.patterns.selections import Chosen, ColumnSelection, SpanSelection, TokenSelection

KeyLists = TokenSelection | SpanSelection | ColumnSelection

_ROWS = 128
_BLOCK = 64
# Scores that the backward holds at once.
_PAIRS = 1 << 27


def listed_columns(pattern: Pattern) -> tuple[KeyLists, bool] | None:
    """The lists of a pattern of keys, runs or columns, and whether Causal() is joined to it by `&`."""
    members = pattern.flattened() if isinstance(pattern, Intersection) else (pattern,)
    chosen = [p for p in members if isinstance(p, Chosen)]
    if len(chosen) != 1 or any(p != Causal() for p in members if p is not chosen[0]):
        return None
    return chosen[0].selection, len(members) > 1


def runs_and_columns(selection: KeyLists, Lk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Starts and stops of disjoint runs, and single keys: int32 [B or 1, lists, tiles, n] each."""
    first = selection.lists[0]
    none = first.new_full((*first.shape[:3], 1), -1)
    if isinstance(selection, TokenSelection):
        starts = stops = none
        columns = selection.indices
    elif isinstance(selection, SpanSelection):
        starts, stops = _disjoint(selection.starts, selection.stops, Lk)
        columns = none
    else:
        starts, columns = selection.starts, selection.columns
        # Unused entries say -1: there the next block is as far away as can be.
        after = torch.nn.functional.pad(starts[..., 1:], (0, 1), value=-1)
        after = torch.where(after < 0, Lk, after)
        stops = (starts + selection.kv_block).minimum(after).clamp(max=Lk)
        if starts.shape[3] and columns.shape[3]:
            place = torch.searchsorted(
                torch.where(starts < 0, Lk, starts).contiguous(), columns.contiguous(), right=True
            )
            before = stops.gather(-1, (place - 1).clamp(min=0))
            covered = (place > 0) & (columns < before) & (columns >= 0)
            columns = _packed(torch.where(covered, -1, columns), Lk)
    starts, stops, columns = (x if x.shape[3] else none for x in (starts, stops, columns))
    small = (x.to(torch.int32) for x in (starts, stops, columns))
    found: tuple[Tensor, Tensor, Tensor] = tuple(small)  # type: ignore[assignment]
    return found


def _packed(x: Tensor, Lk: int) -> Tensor:
    """Ascending entries with those that are -1 at the end."""
    ordered = torch.where(x < 0, Lk, x).sort(-1).values
    return torch.where(ordered == Lk, -1, ordered)


def _disjoint(starts: Tensor, stops: Tensor, Lk: int) -> tuple[Tensor, Tensor]:
    """The same keys by runs that ascend and do not overlap; -1 where a run holds none."""
    used = stops > starts
    order = torch.where(used, starts.clamp(min=0), Lk).sort(-1)
    ends = torch.where(used, stops.clamp(max=Lk), 0).gather(-1, order.indices)
    reached = torch.nn.functional.pad(ends.cummax(-1).values[..., :-1], (1, 0))
    first = order.values.maximum(reached)
    kept = ends > first
    back = torch.where(kept, first, Lk).sort(-1)
    starts = torch.where(back.values == Lk, -1, back.values)
    return starts, ends.gather(-1, back.indices)


def forward(
    q: Tensor, k: Tensor, v: Tensor, selection: KeyLists, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and base-2 lse float32 [B, Hq, Lq]."""
    from foveal.engines.tile.column_kernel import column_attend_forward
    from foveal.engines.tile.launches import Launch

    B, Lq, heads, dim = q.shape
    groups = heads // k.shape[2]
    starts, stops, columns = (
        x.expand(B, -1, -1, -1).contiguous() for x in runs_and_columns(selection, k.shape[1])
    )
    lists, tiles = starts.shape[1:3]
    size = selection.queries_per_list
    tokens = _power(size)
    together = 1 if lists > k.shape[2] else min(_power(groups), max(1, _ROWS // tokens))
    parts = -(-groups // together)
    # Matrix units take 16 rows or more.
    tokens = max(tokens, 16 // together)
    o = q.new_empty(B, Lq, heads, v.shape[3])
    lse = q.new_empty(B, heads, Lq, dtype=torch.float32)
    wide = q.dtype == torch.float32
    # A compute unit of AMD has 64 KiB for the keys and values of a block.
    narrow = wide or (torch.version.hip is not None and max(dim, v.shape[3]) > 128)
    arguments = (
        q, k, v, o, lse, starts, stops, columns,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], o.stride()[:3],
        heads, groups, parts, lists, Lq, tiles, size, starts.shape[3], columns.shape[3],
        k.shape[1] - Lq, scale,
    )  # fmt: skip
    options = {
        "TOKENS": tokens, "HEADS": together, "BLOCK": 32 if narrow else _BLOCK,
        "D": dim, "D_PAD": padded(dim), "DV": v.shape[3], "DV_PAD": padded(v.shape[3]), "CAUSAL": causal,
        "STAGES": 1 if wide else 2, "num_warps": 4 if tokens * together <= 64 else 8,
    }  # fmt: skip
    Launch(column_attend_forward, B * k.shape[2] * parts * tiles, arguments, options)()
    return o, lse


def backward(
    tensors: tuple[Tensor, ...],
    pattern: Pattern,
    extent: Extent,
    scale: float,
    do: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; tensors are q, k, v, o and base-2 lse, dlse [B, Hq, Lq] that of the natural one.

    Some queries at a time meet all keys: no pass over lists from the side of the keys.
    """
    q, k, v, o, lse = tensors
    B, Lq, heads, _ = q.shape
    groups, device = heads // k.shape[2], q.device
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    keys, values = (x.float().repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    key = torch.arange(k.shape[1], device=device)
    step = max(1, _PAIRS // max(B * heads * k.shape[1], 1))
    for first in range(0, Lq, step):
        own = slice(first, min(first + step, Lq))
        query = torch.arange(own.start, own.stop, device=device)
        seen = pattern.allows((query + extent.Lk - Lq)[:, None], key[None], extent)
        seen = seen.expand(*(1,) * (4 - seen.dim()), *seen.shape).to(device)
        seen = seen.repeat_interleave(heads // seen.shape[1], 1)
        q_own, o_own, do_own = (x[:, own].float().transpose(1, 2) for x in (q, o, do))
        level = lse[:, :, own, None]
        s = q_own @ keys.mT * (scale * math.log2(math.e))
        p = torch.where(
            seen & (level > -torch.inf), torch.exp2(s - level.nan_to_num(neginf=0.0)), 0.0
        )
        shift = (o_own * do_own).sum(-1, keepdim=True)
        if dlse is not None:
            shift = shift - dlse[:, :, own, None]
        ds = torch.where(seen, p * (do_own @ values.mT - shift), 0.0) * scale
        dq[:, own] = (ds @ keys).transpose(1, 2)
        dk += (ds.mT @ q_own).unflatten(1, (-1, groups)).sum(2).transpose(1, 2)
        dv += (p.mT @ do_own).unflatten(1, (-1, groups)).sum(2).transpose(1, 2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _power(size: int) -> int:
    """The power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()
