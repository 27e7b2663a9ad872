"""Attention along lists of key blocks per token on a GPU: launches, and what is kept for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveal.engines.tile.launches import Launch
from foveal.engines.tile.spec import padded
from foveal.engines.tile.token_lists import Segments, TokenLists, counted_segments, segments

# Groups of at least so many query heads fill a tile with the heads of one token.
_BY_TOKEN_GROUP = 16
# Memory for the parts of listings, forward and backward; more of them are worked off in several rounds
# of heads.
_PART_BYTES = 4 << 30
_GRADIENT_BYTES = 2 << 30
_SEGMENT = 1024
# Rows that a gradient in float32 adds up one after the other: a plain computation sums in levels, too.
_FLOAT32_CHAIN = 256
# Queries of a chunk of tokens, forward and backward.
_CHUNK_BYTES = 8 << 20
_GRADIENT_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Shape:
    """Rows of a tile, warps and stages of a kernel, as measured to be best."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self, size: Sizes, dtype: torch.dtype) -> dict[str, Any]:
        rows = min(self.rows, _FLOAT32_ROWS) if dtype == torch.float32 else self.rows
        rows = max(rows, size.group_pad)
        found: dict[str, Any] = {"ROWS": rows, "STAGES": self.stages, "num_warps": self.warps}
        plain = self.registers is None or torch.version.hip is not None or dtype == torch.float32
        return found if plain else {**found, "maxnreg": self.registers}


_BY_KEY = Shape(64, 4, 3, 160)
_BY_TOKEN = Shape(16, 2, 2, 160)
_BACKWARD = Shape(32, 4, 3)
_SUM_NEAR = Shape(64, 4, 3)
_NEAR = Shape(64, 4, 2)
_FLOAT32_ROWS = 32
# Rows are the query heads of several tokens, which walk along the union of their lists.
_BY_TILE = Shape(64, 4, 3)
_REPAIR = {"STAGES": 1, "num_warps": 8}
# Slots of a list; all pairs of slots of a tile are compared.
_MOST_SLOTS = 32


@dataclass(frozen=True)
class Gated:
    """Weights of the output along the lists and of others: gates [B, Lq, Hq or 1, 3], others contiguous."""

    gates: Tensor
    others: tuple[Tensor, ...]


def unchecked(
    dtype: torch.dtype, head_dim: int, value_dim: int, groups: int, block: int
) -> str | None:
    """What of a problem the kernels were not compared with float64 for on a GPU, or None."""
    widest = 64 if dtype == torch.float32 else 128
    if max(head_dim, value_dim) > widest:
        return (
            f"for {dtype}, a head_dim of {head_dim} and a value_dim of {value_dim}, up to {widest}"
        )
    if not 16 <= block <= 128 or groups > 16:
        return f"for blocks of {block} keys and groups of {groups}, only for 16 to 128 and up to 16"
    return None


@dataclass(frozen=True)
class Sizes:
    """Compile-time sizes that the kernels share."""

    groups: int
    head_dim: int
    value_dim: int
    block: int
    causal: bool

    @property
    def group_pad(self) -> int:
        return 1 << (self.groups - 1).bit_length()


def _sizes(q: Tensor, k: Tensor, v: Tensor, lists: TokenLists) -> Sizes:
    return Sizes(
        q.shape[2] // k.shape[2], q.shape[3], v.shape[3], padded(lists.block), lists.causal
    )


def _common(size: Sizes) -> dict[str, Any]:
    return {
        "BLOCK": size.block, "CAUSAL": size.causal, "D": size.head_dim, "D_PAD": padded(size.head_dim),
        "DV": size.value_dim, "DV_PAD": padded(size.value_dim),
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float, by_key: bool | None = None
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and base-2 lse float32 [B, Hq, Lq]."""
    size = _sizes(q, k, v, lists)
    if by_key is None:
        by_key = size.groups < _BY_TOKEN_GROUP
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    if not by_key and has_tiles(q, k, v, lists):
        _forward_by_tile((q, k, v), lists, scale, size, o, lse)
        return o, lse
    if not by_key:
        _forward_by_token(q, k, v, lists, scale, size, o, lse)
        return o, lse
    for at in _rounds(q, lists, size, size.value_dim, _PART_BYTES):
        q_own, k_own, v_own = at.cut(q, k, v)
        results = at.cut_results(o, lse)
        _forward_by_key(q_own, k_own, v_own, at.lists(lists), scale, size, *results)
    return o, lse


def forward_gated(
    q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float, gated: Gated
) -> Tensor:
    """gates[..., 1] times o of `forward` plus gates 0 and 2 times the others, where it `takes_gates`."""
    o = q.new_empty(*q.shape[:3], v.shape[3])
    size = _sizes(q, k, v, lists)
    if has_tiles(q, k, v, lists):
        _forward_by_tile((q, k, v), lists, scale, size, o, None, gated)
        return o
    for at in _rounds(q, lists, size, size.value_dim, _PART_BYTES):
        q_own, k_own, v_own = at.cut(q, k, v)
        results = at.cut_output(o), None, at.cut_gated(gated)
        _forward_by_key(q_own, k_own, v_own, at.lists(lists), scale, size, *results)
    return o


def takes_gates(q: Tensor, k: Tensor, v: Tensor, lists: TokenLists) -> bool:
    """Whether a pass that leaves the output applies gates to it: not for groups walked token by token."""
    return has_tiles(q, k, v, lists) or q.shape[2] // k.shape[2] < _BY_TOKEN_GROUP


@dataclass(frozen=True)
class _Round:
    """Entries of the batch and key heads that are worked off together."""

    batch: slice
    heads: slice
    groups: int

    def cut(self, q: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
        return q[self.batch, :, self._queries], *(x[self.batch, :, self.heads] for x in keys)

    def cut_results(self, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return self.cut_output(o), lse[self.batch, self._queries]

    def cut_output(self, o: Tensor) -> Tensor:
        return o[self.batch, :, self._queries]

    def cut_gated(self, gated: Gated) -> Gated:
        heads = gated.others[0].shape[2]
        gates = gated.gates.expand(-1, -1, heads, -1)
        return Gated(self.cut_output(gates), tuple(self.cut_output(x) for x in gated.others))

    def lists(self, lists: TokenLists) -> TokenLists:
        return replace(lists, indices=lists.indices[self.batch, self.heads].contiguous())

    @property
    def _queries(self) -> slice:
        return slice(self.heads.start * self.groups, self.heads.stop * self.groups)


def _rounds(q: Tensor, lists: TokenLists, size: Sizes, dim: int, most: int) -> Iterator[_Round]:
    batches, heads, tokens, slots = lists.indices.shape
    each = tokens * slots * size.groups * dim * q.element_size()
    together = max(1, most // max(each, 1))
    if together >= heads:
        step = max(1, together // heads)
        for n in range(0, batches, step):
            yield _Round(slice(n, min(n + step, batches)), slice(0, heads), size.groups)
        return
    for n in range(batches):
        for h in range(0, heads, together):
            yield _Round(slice(n, n + 1), slice(h, min(h + together, heads)), size.groups)


def _key_work(found: Segments) -> tuple[Tensor, ...]:
    return found.order, found.cell, found.first, found.stop


def _places(lists: TokenLists, found: Segments) -> tuple[Tensor, Tensor, int, int, int]:
    return lists.starts, lists.stops, lists.blocks, found.chunks, found.cells


def _chunk(q: Tensor, size: Sizes, most: int) -> int:
    """Tokens whose queries of one key head fill `most` bytes, a part of the second-level cache."""
    return max(1, most // (size.groups * size.head_dim * q.element_size()))


def _forward_by_key(
    q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float, size: Sizes, o: Tensor,
    lse: Tensor | None, gated: Gated | None = None,
) -> None:  # fmt: skip
    B, heads, Lq, slots = lists.indices.shape
    near = _has_near(lists, size)
    found = counted_segments(lists, _SEGMENT, _chunk(q, size, _CHUNK_BYTES), near)
    listings = lists.indices.numel()
    part = q.new_empty(listings, size.groups, size.value_dim)
    level = q.new_empty(listings, size.groups, dtype=torch.float32)
    arguments: tuple[Any, ...] = (
        q, k, v, part, level, _key_work(found), _places(lists, found),
        q.stride()[:3], k.stride()[:3], v.stride()[:3], heads, size.groups, Lq, lists.shift, scale,
    )  # fmt: skip
    options = {
        **_common(size),
        "SLOTS": slots,
        "G_PAD": size.group_pad,
        **_BY_KEY.options(size, q.dtype),
    }
    from foveal.engines.tile.token_kernels import token_attend_by_key, token_attend_sum

    Launch(token_attend_by_key, len(found.cell), arguments, options)()
    if near:
        tensors = (q, k, v, part, level, lists.indices, o, lse)
        _sum_near(tensors, lists, scale, size, slots, gated)
        return
    every = B * heads * Lq * size.groups
    gates, others, strides = _gate_arguments(gated)
    arguments = (
        part, level, lists.indices, o, lse, gates, others, o.stride()[:3], strides,
        heads, size.groups, Lq, every,
    )  # fmt: skip
    options = {
        "SLOTS": slots, "ROWS": 16, "DV": size.value_dim, "DV_PAD": padded(size.value_dim),
        "num_warps": 4,
    }  # fmt: skip
    Launch(token_attend_sum, -(-every // 16), arguments, options)()


def _gate_arguments(
    gated: Gated | None,
) -> tuple[Tensor | None, tuple[Tensor, ...], tuple[int, ...]]:
    if gated is None:
        return None, (), (0, 0, 0)
    return gated.gates, gated.others, gated.gates.stride()[:3]


def _has_near(lists: TokenLists, size: Sizes) -> bool:
    """Whether what is near to a token is computed for tokens beside each other."""
    return size.causal and lists.near is not None and size.block == lists.block


def _sum_near(
    tensors: tuple[Any, ...], lists: TokenLists, scale: float, size: Sizes, slots: int,
    gated: Gated | None = None,
) -> None:  # fmt: skip
    """Sums the parts of every token, if it has slots for them, and computes what is near to it."""
    from foveal.engines.tile.token_kernels import token_attend_sum_near

    q, k, v = tensors[:3]
    o = tensors[6]
    B, heads, Lq, _ = lists.indices.shape
    assert lists.near is not None
    options = (_SUM_NEAR if slots else _NEAR).options(size, q.dtype)
    tokens = max(options.pop("ROWS") // size.group_pad, 1)
    tiles = -(-Lq // tokens)
    gates, others, strides = _gate_arguments(gated)
    arguments: tuple[Any, ...] = (
        *tensors, gates, others,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], o.stride()[:3], strides,
        heads, size.groups, Lq, k.shape[1], tiles, lists.shift, scale, *lists.near,
    )  # fmt: skip
    options |= {
        "SLOTS": slots, "TOKENS": tokens, "G_PAD": size.group_pad, "BLOCK": size.block,
        "D": size.head_dim, "D_PAD": padded(size.head_dim),
        "DV": size.value_dim, "DV_PAD": padded(size.value_dim),
    }  # fmt: skip
    Launch(token_attend_sum_near, B * heads * tiles, arguments, options)()


def has_tiles(q: Tensor, k: Tensor, v: Tensor, lists: TokenLists) -> bool:
    """Whether tokens beside each other walk along the union of their lists.

    That pays where tiles of 64 rows have matrix instructions of their own and a copy engine reads boxes
    of keys; in the interpreter it is always so.
    """
    dims = q.shape[3], v.shape[3]
    if q.shape[2] != k.shape[2] * _BY_TOKEN_GROUP or any(padded(n) != n for n in dims):
        return False
    if lists.indices.shape[3] > _MOST_SLOTS or torch.compiler.is_compiling():
        return False
    if not q.is_cuda:
        return True
    narrow = torch.version.hip is None and q.element_size() == 2 and max(dims) <= 128
    return narrow and torch.cuda.get_device_capability(q.device)[0] == 9


def _described(x: Tensor, block: int) -> Any:
    """Rows [B L, H D] of x [B, L, H, D] in boxes of a block; a copy where they do not lie like that."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    B, L, H, D = x.shape
    together = (B == 1 or x.stride(0) == L * x.stride(1)) and (H == 1 or x.stride(2) == D)
    aligned = x.stride(1) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if not (together and aligned and x.stride(1) >= H * D):
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, [B * L, H * D], [x.stride(1), 1], [block, D])


def _unions(lists: TokenLists, size: Sizes, tokens: int) -> Tensor:
    """The blocks that tokens beside each other list: int32 [tiles, 2 + tokens slots]."""
    from foveal.engines.tile.token_tile_kernels import token_unions

    indices = lists.indices.contiguous()
    B, heads, Lq, slots = indices.shape
    tiles = -(-Lq // tokens)
    unions = indices.new_empty(B * heads * tiles, 2 + tokens * slots)
    arguments = (indices, unions, lists.starts, lists.stops, Lq, tiles, lists.shift)
    pad = 1 << (slots - 1).bit_length()
    options = {
        "SLOTS": slots, "SLOTS_PAD": pad, "TOKENS": tokens, "BLOCK": size.block,
        "CAUSAL": lists.causal, "num_warps": 2 if pad <= 16 else 8,
    }  # fmt: skip
    Launch(token_unions, len(unions), arguments, options)()
    return unions


def _forward_by_tile(
    tensors: tuple[Tensor, ...], lists: TokenLists, scale: float, size: Sizes, o: Tensor,
    lse: Tensor | None, gated: Gated | None = None,
) -> None:  # fmt: skip
    """Fills o and lse; tiles with a row that is not finite are computed again."""
    from foveal.engines.tile.token_tile_kernels import token_attend_by_tile

    q, k, v = tensors
    _, heads, Lq, slots = lists.indices.shape
    options = _BY_TILE.options(size, q.dtype)
    tokens = options.pop("ROWS") // size.groups
    unions = _unions(lists, size, tokens)
    flags = torch.empty(len(unions), dtype=torch.int8, device=q.device)
    gates = None if gated is None else gated.gates
    shared, width = (1, 1) if gates is None else (q.shape[2] // gates.shape[2], gates.shape[3])
    arguments: tuple[Any, ...] = (
        q, _described(k, size.block), _described(v, size.block), o, lse, flags, unions,
        lists.starts, lists.stops, gates, () if gated is None else gated.others,
        q.stride()[:3], heads, Lq, k.shape[1], -(-Lq // tokens), lists.shift, scale, shared, width,
    )  # fmt: skip
    options |= {
        "SLOTS": slots, "TOKENS": tokens, "GROUPS": size.groups, "BLOCK": size.block,
        "D": size.head_dim, "DV": size.value_dim, "CAUSAL": lists.causal,
    }  # fmt: skip
    for repair in ({"REPAIR": False}, {"REPAIR": True, **_REPAIR}):
        Launch(token_attend_by_tile, len(unions), arguments, options | repair)()


def _forward_by_token(
    q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float, size: Sizes, o: Tensor, lse: Tensor
) -> None:  # fmt: skip
    from foveal.engines.tile.token_kernels import token_attend_by_token

    B, heads, Lq, slots = lists.indices.shape
    near = _has_near(lists, size)
    if near:
        _sum_near((q, k, v, o, lse, lists.indices, o, lse), lists, scale, size, 0)
    arguments: tuple[Any, ...] = (
        q, k, v, o, lse, lists.indices.contiguous(), (lists.starts, lists.stops),
        q.stride()[:3], k.stride()[:3], v.stride()[:3], o.stride()[:3],
        heads, size.groups, Lq, lists.shift, scale, *(lists.near or (0, 0)),
    )  # fmt: skip
    options = {
        **_common(size), "NEAR": near, "SLOTS": slots, "SLOTS_PAD": 1 << (slots - 1).bit_length(),
        **_BY_TOKEN.options(size, q.dtype),
    }  # fmt: skip
    Launch(token_attend_by_token, B * heads * Lq, arguments, options)()


def backward(
    tensors: tuple[Tensor, ...], lists: TokenLists, scale: float, do: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; tensors are q, k, v, o and base-2 lse, dlse [B, Hq, Lq] that of the natural one."""
    from foveal.engines.tile.token_kernels import token_attend_shift

    q, k, v, o, lse = tensors
    size = _sizes(q, k, v, lists)
    do = do if do.stride(-1) == 1 else do.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    shift = torch.empty_like(lse)
    rows = lse.numel()
    arguments: tuple[Any, ...] = (
        o, do, None if dlse is None else dlse.contiguous(), shift, o.stride()[:3], do.stride()[:3],
        q.shape[2], q.shape[1], rows,
    )  # fmt: skip
    options = {"ROWS": 32, "DV": size.value_dim, "DV_PAD": padded(size.value_dim), "num_warps": 4}
    Launch(token_attend_shift, -(-rows // 32), arguments, options)()
    for at in _rounds(q, lists, size, size.head_dim, _GRADIENT_BYTES):
        q_own, k_own, v_own = at.cut(q, k, v)
        do_own, lse_own = at.cut_results(do, lse)
        dq_own, dk_own, dv_own = at.cut(dq, dk, dv)
        _backward_round(
            (q_own, k_own, v_own, do_own, lse_own, shift[at.batch, at._queries]),
            at.lists(lists), scale, size, (dq_own, dk_own, dv_own),
        )  # fmt: skip
    return dq, dk, dv


def _backward_round(
    tensors: tuple[Tensor, ...],
    lists: TokenLists,
    scale: float,
    size: Sizes,
    out: tuple[Tensor, ...],
) -> None:
    from foveal.engines.tile.token_kernels import (
        token_attend_backward,
        token_attend_sum_kv,
        token_attend_sum_q,
    )

    q, k, v, do, lse, shift = tensors
    dq, dk, dv = out
    B, heads, Lq, slots = lists.indices.shape
    longest = _SEGMENT if q.dtype != torch.float32 else max(_FLOAT32_CHAIN // size.groups, 1)
    found = segments(lists, longest, _chunk(q, size, _GRADIENT_CHUNK_BYTES))
    programs = len(found.cell)
    part = q.new_empty(lists.indices.numel(), size.groups, size.head_dim)
    dk_part = q.new_empty(programs, size.block, size.head_dim, dtype=torch.float32)
    dv_part = q.new_empty(programs, size.block, size.value_dim, dtype=torch.float32)
    places = _places(lists, found)
    arguments: tuple[Any, ...] = (
        q, k, v, do, lse.contiguous(), shift.contiguous(), part, dk_part, dv_part, _key_work(found), places,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], do.stride()[:3],
        heads, size.groups, Lq, lists.shift, scale,
    )  # fmt: skip
    options = {
        **_common(size),
        "SLOTS": slots,
        "G_PAD": size.group_pad,
        **_BACKWARD.options(size, q.dtype),
    }
    Launch(token_attend_backward, programs, arguments, options)()
    every = B * heads * Lq * size.groups
    arguments = (part, lists.indices, dq, dq.stride()[:3], heads, size.groups, Lq, every)
    options = {
        "SLOTS": slots, "ROWS": 16, "D": size.head_dim, "D_PAD": padded(size.head_dim), "num_warps": 4,
    }  # fmt: skip
    Launch(token_attend_sum_q, -(-every // 16), arguments, options)()
    for own, gradient, dim in ((dk_part, dk, size.head_dim), (dv_part, dv, size.value_dim)):
        arguments = (own, found.of_cell, places, gradient, gradient.stride()[:3], heads)
        options = {"BLOCK": size.block, "D": dim, "D_PAD": padded(dim), "num_warps": 8}
        Launch(token_attend_sum_kv, B * heads * lists.blocks, arguments, options)()
