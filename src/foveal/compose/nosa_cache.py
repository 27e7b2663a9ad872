"""NOSA one token at a time: most pages that a step reads are those of the step before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._errors import CacheError, ShapeError
from foveal._host import on_host
from foveal.caches.base import KVShape, check_shape
from foveal.caches.checks import need_whole
from foveal.caches.offloaded import Offloaded
from foveal.compose.decode_selected import check_step
from foveal.scores.softmax import Softmax


class NosaCache(Offloaded):
    """Blocks on the host, of which a step reads some by its query and the rest by learned weights alone.

    `append` takes the log-weight c of every key as `bias`.  A step reads `by_query` blocks by the mean keys
    of windows (the first and the `local_blocks` last ones among them), and those of largest mean c up
    to `budget`.  The second part does not depend on the query, so it stays on the device.
    Options: max_tokens of a sequence on the host; block, budget, by_query, window, stride and
    local_blocks as the system "nosa" has them; local_blocks of at least 1 stay on the device.
    Cost of a step: at most `by_query` blocks per key head come to the device, whatever the queries do: a
    block that c names and the last step did not read has made room for one that the query names.  Sums of
    keys over `stride` tokens stay on the device.
    Limits: one query per sequence and step.
    Equals: the last row of the system "nosa"; with a budget for all blocks, attention with a key bias.
    Paper: NOSA (2510.13602).
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        max_tokens: int,
        block: int = 64,
        budget: int = 64,
        by_query: int = 16,
        window: int = 32,
        stride: int = 16,
        local_blocks: int = 2,
    ) -> None:
        check_shape(shape)
        need_whole(1, block=block, budget=budget, by_query=by_query, window=window, stride=stride)
        need_whole(1, local_blocks=local_blocks)
        if not local_blocks < by_query <= budget:
            needed = f"more than local_blocks ({local_blocks}), up to {budget}, is needed"
            raise CacheError("by_query", by_query, needed)
        if window % stride or block % stride:
            raise CacheError("stride", stride, f"a divisor of {window} and {block} is needed")
        recent = (local_blocks - 1) * block + 1
        super().__init__(
            shape,
            max_tokens=max_tokens,
            slots=budget,
            page_size=block,
            recent=recent,
            biased=True,
        )
        self.block, self.budget, self.by_query = block, budget, by_query
        self.window, self.stride, self.local_blocks = window, stride, local_blocks
        runs = self._most * (block // stride) + self._room // stride + 1
        wide = torch.float64 if shape.dtype == torch.float64 else torch.float32
        size = (shape.batch, runs, shape.kv_heads)
        # Sums over every `stride` tokens of a sequence: of the keys, and of their weights.
        self._keys = torch.zeros(*size, shape.head_dim, dtype=wide, device=shape.device)
        self._weights = torch.zeros(*size, dtype=wide, device=shape.device)

    @on_host
    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        counts: Sequence[int] | None = None,
        last: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        if bias is None:
            raise CacheError("bias", None, "the log-weight of every key is needed")
        before = torch.tensor(self.host_seen, device="cpu")
        try:
            super().append(k, v, counts=counts, last=last, bias=bias)
        finally:  # of what was stored, should it be a first part
            self._sum(k, bias, before)

    def _sum(self, k: Tensor, bias: Tensor, before: Tensor) -> None:
        """Adds the first tokens of every row, as many as are stored, to the sums of their runs."""
        stored = torch.tensor(self.host_seen, device="cpu") - before
        if not bool(stored.any()):
            return
        number = torch.arange(k.shape[1], device="cpu")
        inside = (number < stored[:, None]).to(k.device)
        place = before[:, None] + number
        sequence = torch.arange(len(k), device="cpu")[:, None]
        index = (sequence.expand_as(place), place // self.stride)
        where = tuple(x.to(k.device)[inside] for x in index)
        weights = bias.expand(-1, -1, self.shape.kv_heads)[inside]
        self._keys.index_put_(where, k[inside].to(self._keys), accumulate=True)
        self._weights.index_put_(where, weights.to(self._weights), accumulate=True)

    def free(self, sequences: Sequence[int] | None = None) -> None:
        super().free(sequences)
        for b in range(self.shape.batch) if sequences is None else sequences:
            self._keys[b], self._weights[b] = 0, 0

    def grow(self, max_tokens: int) -> None:
        had = self._most
        super().grow(max_tokens)
        more = (self._most - had) * (self.block // self.stride)
        self._keys = torch.nn.functional.pad(self._keys, (0, 0, 0, 0, 0, more))
        self._weights = torch.nn.functional.pad(self._weights, (0, 0, 0, more))

    @on_host
    def crop(self, seen: int | Sequence[int]) -> None:
        had = self.host_seen
        super().crop(seen)
        rows = [x.transpose(1, 2) for x in self._near_rows()]
        for b, (n, before) in enumerate(zip(self.host_seen, had, strict=True)):
            if n == before:
                continue
            run, left = divmod(n, self.stride)
            near = self.near.host_lengths[b][0]
            newest = slice(near - left, near)
            for sums, own in ((self._keys, rows[0]), (self._weights, rows[-1][..., 0])):
                sums[b, run:] = 0
                sums[b, run] = own[b, newest].to(sums).sum(0)

    def summary_bytes(self) -> int:
        row = (self.shape.head_dim + 1) * self._keys.element_size()
        return sum(-(-n // self.stride) for n in self.host_seen) * self.shape.kv_heads * row

    def _summaries(self) -> list[Tensor]:
        return [self._keys, self._weights]

    @on_host
    def decode(self, q: Tensor, score: Softmax = Softmax()) -> Tensor:
        """o [batch, 1, Hq, value_dim] of the newest token, q [batch, 1, Hq, head_dim]."""
        from foveal._decode import decode

        check_step(q, score)
        if q.shape[2] % self.shape.kv_heads:
            raise ShapeError("q", list(q.shape), f"heads that {self.shape.kv_heads} divides")
        chosen = self._blocks(q.detach())
        places = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[..., : self.budget]
        old = torch.tensor(self._pages, device=q.device)[:, None, None]
        self.select(torch.where(chosen.gather(-1, places) & (places < old), places, -1))
        return decode(q, self, score)

    def _blocks(self, q: Tensor) -> Tensor:
        """The blocks that a step reads: bool [batch, kv_heads, blocks]."""
        lengths = torch.tensor(self.host_seen, device=q.device)
        blocks = -(-max(self.host_seen) // self.block)
        size, reach = self.block // self.stride, self.window // self.stride
        runs = blocks * size + reach - 1
        windows = runs - reach + 1
        keys, weights = (_head(x, runs) for x in (self._keys, self._weights))
        means = keys.unfold(1, reach, 1).sum(-1) / self.window  # [B, windows, Hkv, D]
        of_c = (weights.unfold(1, reach, 1).sum(-1) / self.window).transpose(1, 2)
        start = torch.arange(windows, device=q.device) * self.stride
        seen = (start + self.window <= lengths[:, None])[:, None]
        rows = q[:, 0].to(means).unflatten(1, (self.shape.kv_heads, -1))
        s = torch.einsum("bhgd,bwhd->bhgw", rows, means) * q.shape[-1] ** -0.5
        p = s.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0).sum(2)
        by_score, by_weight = (
            _largest(x.masked_fill(~seen, -torch.inf), size, reach) for x in (p, of_c)
        )
        number = torch.arange(blocks, device=q.device)
        own = ((lengths - 1) // self.block)[:, None, None]
        forced = (number == 0) | (number > own - self.local_blocks)
        hidden = number > own
        first = _ranks(by_score.masked_fill(forced, torch.inf).masked_fill(hidden, -torch.inf))
        named = (first < self.by_query) & ~hidden
        rest = _ranks(by_weight.masked_fill(named | hidden, -torch.inf))
        return named | ((rest < self.budget - self.by_query) & ~hidden)


def _head(x: Tensor, count: int) -> Tensor:
    """The first `count` of the second axis, with 0 behind what there is."""
    more = max(count - x.shape[1], 0)
    if more:
        x = torch.cat([x, x.new_zeros(len(x), more, *x.shape[2:])], dim=1)
    return x[:, :count]


def _largest(x: Tensor, size: int, reach: int) -> Tensor:
    """[B, H, blocks]: the largest of the windows that touch a block, of x [B, H, windows]."""
    padded = torch.nn.functional.pad(x, (reach - 1, 0), value=-torch.inf)
    found: Tensor = padded.unfold(-1, size + reach - 1, size).amax(-1)
    return found


def _ranks(scores: Tensor) -> Tensor:
    """0 for the largest of the last axis; ties go to the lower index first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
