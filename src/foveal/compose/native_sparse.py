"""Native sparse attention: compressed keys, blocks chosen by them, and a window, joined by gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from foveal._attend import attend
from foveal._errors import OptionError, SelectionError, ShapeError
from foveal._judged import judged, need_dtype, need_shape
from foveal._kept import kept
from foveal.engines.tile.listed_tokens import attend_gated, attend_lists, takes_gates
from foveal.engines.tile.select import Choice, select
from foveal.engines.tile.windows import Windows, windows
from foveal.patterns.base import Pattern
from foveal.patterns.blocks import Blocks, BlockSelection
from foveal.patterns.dense import Causal
from foveal.patterns.rows import Rows
from foveal.patterns.sliding import Sliding
from foveal.scores.softmax import Softmax

Compression = Callable[[Tensor, Windows], Tensor]
"""compress(x [B, L, H, D], windows) -> [B, windows, H, D]."""


_SIZES = ("length", "stride", "block", "best", "local_blocks", "sink_blocks", "window")


@dataclass(frozen=True)
class SparseBranches:
    """Sizes of the three branches, in tokens except where blocks are named.

    Compressed keys are made of `length` tokens every `stride`; a list holds `best` blocks of `block`
    tokens, the first `sink_blocks` and the last `local_blocks` among them always; the window holds
    `window` tokens, the query's own included, and is left out with its gate where it is 0.
    granularity "token": one list per token and key head; "tile": one per `block` tokens, chosen by the
    mean of their queries.
    Limits: stride divides length and block; sink_blocks + local_blocks <= best.
    """

    length: int = 32
    stride: int = 16
    block: int = 64
    best: int = 16
    sink_blocks: int = 1
    local_blocks: int = 2
    window: int = 512
    granularity: Literal["token", "tile"] = "token"

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise SelectionError(name, value, "a whole number is needed")
        if self.window < 0:
            raise SelectionError("window", self.window, "at least 0 is needed")
        for name in _SIZES[:5]:
            if getattr(self, name) < 1:
                raise SelectionError(name, getattr(self, name), "at least 1 is needed")
        for name in ("length", "block"):
            if getattr(self, name) % self.stride:
                needed = f"a multiple of the stride, {self.stride}, is needed"
                raise SelectionError(name, getattr(self, name), needed)
        if self.sink_blocks < 0 or self.sink_blocks + self.local_blocks > self.best:
            raise SelectionError(
                "best", self.best, "at least sink_blocks + local_blocks are needed"
            )
        if self.granularity not in ("token", "tile"):
            raise SelectionError("granularity", self.granularity, '"token" or "tile" is needed')

    def windows(self, q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> Windows:
        return windows(
            q.shape[1], k.shape[1], self.length, self.stride, self.block, q.device, cu_seqlens
        )

    @property
    def near(self) -> tuple[int, int]:
        """Blocks at the start and up to its own that every token lists."""
        return self.sink_blocks, self.local_blocks

    @property
    def choice(self) -> Choice:
        return Choice(self.best, self.sink_blocks, self.local_blocks)


def compress_mean(x: Tensor, windows: Windows) -> Tensor:
    """The mean of every window.  [B, windows, H, D] of x [B, L, H, D]

    A window that reaches past the end of its document is seen by no token; its number is arbitrary.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pieces = _pieces(x, windows).sum(2, dtype=wide)
    total = pieces
    # A window that is longer than the text has no tokens further on.
    for offset in range(1, min(windows.reach, pieces.shape[1] - 1) + 1):
        total = total + torch.nn.functional.pad(pieces[:, offset:], (0, 0, 0, 0, 0, offset))
    return (total / windows.length).to(x.dtype)


def window_tokens(x: Tensor, windows: Windows) -> Tensor:
    """The tokens of every window.  [B, windows, length, H, D] of x [B, L, H, D]"""
    pieces = _pieces(x, windows)
    shifted = [
        torch.nn.functional.pad(pieces[:, n:], (0, 0, 0, 0, 0, 0, 0, min(n, pieces.shape[1])))
        for n in range(windows.reach + 1)
    ]
    return torch.cat(shifted, dim=2)


def _pieces(x: Tensor, windows: Windows) -> Tensor:
    """Tokens from the start of each window to that of the next.  [B, windows, stride, H, D]"""
    if windows.packed:
        place = windows.places[:, None] + torch.arange(windows.stride, device=x.device)
        place = place.clamp(max=max(x.shape[1] - 1, 0))
        result: Tensor = x.index_select(1, place.flatten()).unflatten(1, place.shape)
        return result
    behind = windows.count * windows.stride - x.shape[1]
    if behind:  # padding by nothing is a copy
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, behind))
    whole: Tensor = x.unflatten(1, (windows.count, windows.stride))
    return whole


@judged
def native_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None = None,
    compressed: tuple[Tensor, Tensor] | None = None,
    *,
    branches: SparseBranches = SparseBranches(),
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o_t = sum over the branches of g_t o_t: compressed keys, blocks that they choose, a window.

    The compressed branch is the softmax over the compressed keys that end at or before t; the chosen
    branch the causal softmax over the tokens of the `best` blocks of t; the last that over the window.
    A block is scored by the probabilities of the compressed keys that overlap it, each counted as often
    as its strides do, summed over the query heads of a key head; the choice has no gradient.

    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv], any Hq / Hkv; gates [B, Lq, Hq or 1,
    3] weigh compressed, chosen and window (None: 1 each); compressed are keys [B, windows, Hkv, D] and
    values [B, windows, Hkv, Dv] (None: means of the windows), block / stride windows for each of the
    ceil(Lk / block) blocks: those that reach past the end are seen by no token.  The last query stands on
    the last key.
    Options: branches, the sizes; scale (None: D ** -0.5); cu_seqlens int32 [N + 1], documents in which
    blocks, windows and positions start anew (Lq = Lk).
    Cost: of dense, about (stride / block + best block + window) / Lk plus 1 / (2 stride).
    Limits: the first length - 1 tokens of a document see no compressed key: 0, gradient 0.
    Equals: with best blocks for all tokens and gates (0, 1, 0), causal attention.
    Paper: Native Sparse Attention (2502.11089); Flash Sparse Attention (2508.18224).
    """
    if not isinstance(branches, SparseBranches):
        raise OptionError("branches", repr(branches), "SparseBranches are needed")
    if not k.shape[1]:
        nothing = attend(q, k, v, Causal(), Softmax(scale=scale))
        return gated_sum((nothing,) * (3 if branches.window else 2), gates)
    table = branches.windows(q, k, cu_seqlens)
    if compressed is None:
        compressed = compress_mean(k, table), compress_mean(v, table)
    _check(q, k, v, gates, compressed, table)
    score = Softmax(scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = _visible(q, k, branches, cu_seqlens, table)
    far, lse = attend(q, *compressed, seen, score, return_lse=True)
    others: tuple[Tensor, ...] = (far,)
    if branches.window:
        window = Sliding(branches.window - 1)
        others = (far, attend(q, k, v, window, score, cu_seqlens=cu_seqlens))
    if branches.granularity == "tile":
        pattern = Blocks(_per_tile(q, k, compressed, branches, scale, cu_seqlens)) & Causal()
        chosen = attend(q, k, v, pattern, score)
        return gated_sum((far, chosen, *others[1:]), gates)
    indices = select(q, compressed[0], lse, table, branches.choice, scale)
    lists = table.lists(indices, branches.near)
    if gates is not None and _at_once(q, k, v, far, gates) and takes_gates(q, k, v, lists):
        return attend_gated(q, k, v, lists, scale, gates, others)
    chosen, _ = attend_lists(q, k, v, lists, scale)
    return gated_sum((far, chosen, *others[1:]), gates)


def _at_once(q: Tensor, k: Tensor, v: Tensor, far: Tensor, gates: Tensor) -> bool:
    """Whether the pass along the lists may apply the gates: no gradient needs what it leaves out."""
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, far, gates))
    tangents = forward_ad._current_level >= 0
    return not (needed or tangents) and _fused((far, q))


def gated_sum(outputs: tuple[Tensor, ...], gates: Tensor | None) -> Tensor:
    """sum_n gates[..., n] outputs[n]; outputs [B, L, H, D], gates [B, L, H or 1, n], None for 1."""
    if gates is None:
        total = outputs[0]
        for o in outputs[1:]:
            total = total + o
        return total
    if _fused(outputs):
        from foveal.compose.gate_kernel import GatedSum

        found: Tensor = GatedSum.apply(gates, *outputs)  # type: ignore[no-untyped-call]
        return found
    gates = gates.to(outputs[0].dtype)
    total = outputs[0] * gates[..., 0, None]
    for n, o in enumerate(outputs[1:], start=1):
        total = torch.addcmul(total, o, gates[..., n, None])
    return total


def _fused(outputs: tuple[Tensor, ...]) -> bool:
    """Whether one kernel adds them up: elementwise operations move the outputs three times as often."""
    x = outputs[0]
    if not x.is_cuda or len(outputs) not in (2, 3) or any(o.dtype != x.dtype for o in outputs):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return x.dtype == torch.bfloat16  # compared with float64 on a GPU


def selected_blocks(
    q: Tensor,
    k: Tensor,
    *,
    branches: SparseBranches = SparseBranches(),
    compressed: Tensor | None = None,
    scale: float | None = None,
) -> BlockSelection:
    """The blocks that every token chooses, as a selection for `Blocks`; compressed keys as above."""
    table = branches.windows(q, k)
    keys = compress_mean(k, table) if compressed is None else compressed
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = _visible(q, k, branches, None, table)
    _, lse = attend(q, keys, keys, seen, Softmax(scale=scale), return_lse=True)
    return BlockSelection(select(q, keys, lse, table, branches.choice, scale), 1, branches.block)


def _check(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, compressed: tuple[Tensor, Tensor],
    table: Windows,
) -> None:  # fmt: skip
    if gates is not None and (
        gates.shape[:2] != q.shape[:2] or gates.shape[2:] not in ((1, 3), (q.shape[2], 3))
    ):
        raise ShapeError("gates", list(gates.shape), f"[{q.shape[0]}, {q.shape[1]}, heads, 3]")
    if not isinstance(compressed, tuple | list) or len(compressed) != 2:
        raise OptionError("compressed", type(compressed).__name__, "keys and values are needed")
    for x, of in zip(compressed, (k, v), strict=True):
        if x.shape[1:2] != (table.count,):
            raise ShapeError("compressed", list(x.shape), f"{table.count} windows are needed")
        need_shape("compressed", x, (of.shape[0], table.count, *of.shape[2:]), like=of)
        need_dtype(of, compressed=x)


def _visible(
    q: Tensor, k: Tensor, branches: SparseBranches, cu_seqlens: Tensor | None, table: Windows
) -> Pattern:
    if cu_seqlens is None:
        return _ended(q.shape[1], k.shape[1], branches.length, branches.stride, branches.block)
    return Rows(table.first.long() * table.step, table.seen.long())


@kept(maxsize=64)
def _ended(Lq: int, Lk: int, length: int, stride: int, block: int) -> Rows:
    """The windows that end at or before each token."""
    table = windows(Lq, Lk, length, stride, block, torch.device("cpu"))
    return Rows(table.first.long() * table.step, table.seen.long())


def _per_tile(
    q: Tensor,
    k: Tensor,
    compressed: tuple[Tensor, Tensor],
    branches: SparseBranches,
    scale: float,
    cu_seqlens: Tensor | None,
) -> BlockSelection:
    """Lists of whole tiles of queries, by the mean of their queries at the place of the last one."""
    if cu_seqlens is not None or q.shape[1] != k.shape[1]:
        raise SelectionError(
            "granularity", "tile", "one sequence with as many queries as keys is needed"
        )
    block, length = branches.block, q.shape[1]
    tiles = -(-length // block)
    padded = torch.nn.functional.pad(q.detach(), (0, 0, 0, 0, 0, tiles * block - length))
    count = torch.full((tiles,), block, device=q.device)
    count[-1] = length - (tiles - 1) * block
    mean = padded.unflatten(1, (tiles, block)).sum(2) / count[:, None, None].to(q.dtype)
    table = branches.windows(q, k)
    last = torch.arange(block - 1, tiles * block, block, device=q.device).clamp(max=length - 1)
    own = table.at(last)
    rows = Rows(own.first.long() * own.step, own.seen.long())
    keys, values = (x.detach() for x in compressed)
    _, lse = attend(mean, keys, values, rows, Softmax(scale=scale), return_lse=True)
    return BlockSelection(select(mean, keys, lse, own, branches.choice, scale), block, block)
