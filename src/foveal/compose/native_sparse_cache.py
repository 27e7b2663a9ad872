"""Native sparse attention one token at a time: caches of tokens and of compressed keys."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._errors import ShapeError
from foveal.caches.base import KVShape, check_append
from foveal.caches.codec import Codec
from foveal.caches.paged import Paged
from foveal.caches.view import Columns, View
from foveal.compose.decode_selected import check_one_query, decode_selected, decode_view
from foveal.compose.native_sparse import Compression, SparseBranches, compress_mean, gated_sum
from foveal.engines.tile.windows import windows
from foveal.patterns.blocks import BlockSelection
from foveal.patterns.dense import Dense
from foveal.patterns.sliding import Sliding
from foveal.scores.softmax import Softmax


class NativeSparseCache:
    """Keys and values of one layer, and those of the windows that have ended, for `decode`.

    Options: shape; branches with lists per token; pages of `branches.block` tokens in the pool; max_tokens
    a sequence may hold, default all that the pool holds; compress, what makes (keys, values) of windows,
    as for `native_sparse`.
    Cost of a step: the compressed keys and values, `best` blocks and the window, read once, and the
    compressed keys once more for the choice.
    Limits: one query per sequence and step.
    Equals: the last row of `native_sparse` over all tokens.
    Paper: Native Sparse Attention (2502.11089).
    """

    def __init__(
        self,
        shape: KVShape,
        branches: SparseBranches = SparseBranches(),
        *,
        pages: int,
        max_tokens: int | None = None,
        compress: tuple[Compression, Compression] = (compress_mean, compress_mean),
    ) -> None:
        self.shape, self.branches, self.compress = shape, branches, compress
        self.tokens = Paged(shape, pages=pages, page_size=branches.block, max_tokens=max_tokens)
        room = max(self.tokens.max_tokens // branches.stride, 1)
        size = (shape.batch, shape.kv_heads, room)
        device = torch.device(shape.device)
        self.keys = torch.zeros(*size, shape.head_dim, dtype=shape.dtype, device=device)
        self.values = torch.zeros(*size, shape.values, dtype=shape.dtype, device=device)
        self._ended = torch.zeros(shape.batch, 1, dtype=torch.int32, device=device)

    @property
    def lengths(self) -> Tensor:
        """int32 [batch, 1]: tokens stored."""
        return self.tokens.lengths

    @property
    def ended(self) -> Tensor:
        """int32 [batch, 1]: windows that have ended."""
        return self._ended

    def append(self, k: Tensor, v: Tensor, *, counts: list[int] | None = None) -> None:
        """Stores tokens k [batch, L, kv_heads, head_dim], v, and the windows that end with them.

        Options: counts, how many of each row are stored, the first ones.
        """
        check_append(self.shape, k, v, counts, None)
        before = [self._windows(row[0]) for row in self.tokens.host_lengths]
        self.tokens.append(k, v, counts=counts)
        after = [self._windows(row[0]) for row in self.tokens.host_lengths]
        most = max(b - a for a, b in zip(before, after, strict=True))
        if most:
            self._compress(before, after, most)

    def _windows(self, tokens: int) -> int:
        return max((tokens - self.branches.length) // self.branches.stride + 1, 0)

    def _compress(self, before: list[int], after: list[int], most: int) -> None:
        b, device = self.branches, self.keys.device
        span = (most - 1) * b.stride + b.length
        first, stop = (torch.tensor(x, device=device) for x in (before, after))
        place = first[:, None] * b.stride + torch.arange(span, device=device)
        view = self.tokens.view()
        slots = view.slots(place.clamp(max=self.tokens.max_tokens - 1)[:, None])
        table = windows(span, span, b.length, b.stride, b.block, device)
        assert view.values is not None
        number = first[:, None] + torch.arange(most, device=device)  # [B, most]
        inside = number < stop[:, None]
        row = torch.arange(len(before), device=device)[:, None].expand_as(number)
        for columns, compress, target in zip(
            (view.keys, view.values), self.compress, (self.keys, self.values), strict=True
        ):
            x = columns.read(slots, self.shape.dtype).transpose(1, 2)
            made = compress(x, table)[:, :most]
            target[row[inside], :, number[inside]] = made[inside].to(target.dtype)
        self._ended.copy_(stop[:, None])

    def decode(
        self, q: Tensor, gates: Tensor | None = None, *, scale: float | None = None
    ) -> Tensor:
        """o [batch, 1, Hq, Dv] of the newest token, q [batch, 1, Hq, D]; gates [batch, 1, Hq or 1, 3]."""
        check_one_query(q)
        if gates is not None and (
            gates.dim() != 4 or gates.shape[2] not in (1, q.shape[2]) or gates.shape[3] != 3
        ):
            raise ShapeError("gates", list(gates.shape), f"[{q.shape[0]}, 1, heads, 3] is needed")
        score = Softmax(scale=scale)
        far, lse = decode_view(q, self._view(), self.shape, score, Dense())
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        chosen = decode_selected(q, self.tokens, self._choose(q, lse, scale), score)
        if not self.branches.window:
            return gated_sum((far, chosen), gates)
        window = Sliding(self.branches.window - 1)
        near, _ = decode_view(q, self.tokens.view(), self.shape, score, window)
        return gated_sum((far, chosen, near), gates)

    def _view(self) -> View:
        """The compressed keys and values as a store of one page per sequence."""
        batch, heads, room = self.keys.shape[:3]
        pages = torch.arange(batch, dtype=torch.int32, device=self.keys.device)
        ended = [[self._windows(row[0])] for row in self.tokens.host_lengths]
        codecs = (
            Codec(self.shape.head_dim, self.shape.dtype),
            Codec(self.shape.values, self.shape.dtype),
        )
        return View(
            lengths=self._ended,
            host_lengths=ended,
            seen=self._ended[:, 0],
            page_table=pages.view(-1, 1, 1),
            page_size=room,
            steps=(heads * room, room, 1),
            kv_heads=heads,
            keys=Columns(codecs[0], (self.keys.view(-1, self.shape.head_dim),)),
            values=Columns(codecs[1], (self.values.view(-1, self.shape.values),)),
            value_dim=self.shape.values,
        )

    def _choose(self, q: Tensor, lse: Tensor, scale: float) -> BlockSelection:
        """The best blocks of the newest token of every sequence."""
        b = self.branches
        step, reach = b.block // b.stride, b.length // b.stride - 1
        heads, room = self.keys.shape[1:3]
        grouped = q[:, 0].unflatten(1, (heads, -1))
        s = (grouped @ self.keys.mT).to(lse.dtype) * scale  # [B, Hkv, G, windows]
        p = torch.exp(s - lse[:, 0].unflatten(1, (heads, -1))[..., None])
        window = torch.arange(room, device=q.device)
        p = torch.where((window < self._ended[..., None, None]), p, 0.0).sum(2)
        blocks = -(-self.tokens.max_tokens // b.block)
        behind = max(blocks * step + reach - room, 0)
        padded = torch.nn.functional.pad(p, (reach, behind))
        count = torch.arange(step + reach, device=q.device)
        times = torch.minimum(count + 1, step + reach - count).clamp(max=min(step, reach + 1))
        found = padded.unfold(-1, step + reach, step)[..., :blocks, :] @ times.to(p.dtype)
        own = ((self.lengths - 1) // b.block)[..., None]
        block = torch.arange(blocks, device=q.device)
        forced = (block < b.sink_blocks) | (block > own - b.local_blocks)
        found = found.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
        best = torch.sort(found, dim=-1, descending=True, stable=True)
        chosen = torch.where(best.values == -torch.inf, blocks, best.indices)[..., : b.best]
        chosen = chosen.sort(-1).values
        indices = torch.where(chosen == blocks, -1, chosen).to(torch.int32)
        return BlockSelection(indices[:, :, None], 1, b.block)
