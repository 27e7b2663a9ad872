"""RetrievalAttention one token at a time: old keys on the host, the nearest of them fetched per query."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._errors import CacheError, ShapeError
from foveal._host import on_host
from foveal.caches.base import KVShape, check_shape
from foveal.caches.checks import need_whole
from foveal.caches.offloaded import Offloaded
from foveal.compose.decode_selected import check_step, decode_view
from foveal.compose.merge import merge
from foveal.patterns.dense import Dense
from foveal.scores.base import Score
from foveal.scores.bias import KeyBias
from foveal.scores.softmax import Softmax


class RetrievalCache(Offloaded):
    """The first and the newest keys on the device; of the others each query head fetches the nearest.

    A step finds, on the host and among all keys there, the `keys` of largest q . k of every query head;
    the query heads of a key head fetch theirs together, and each reads its own.
    Options: q_heads, a multiple of the key heads; max_tokens of a sequence on the host; keys per query head,
    the first `sinks`, the newest `window`.
    Cost of a step: the products with all keys on the host, where they lie; at most keys x q_heads / kv_heads
    tokens per key head come to the device, fewer where those of the last step are wanted again.
    Limits: one query per sequence and step; the search is by all products, no graph.
    Equals: the last row of the system "retrieval_attention"; with as many keys as there are, `Paged`.
    Paper: RetrievalAttention (2409.10516).
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        q_heads: int,
        max_tokens: int,
        keys: int = 100,
        sinks: int = 128,
        window: int = 512,
    ) -> None:
        check_shape(shape)
        need_whole(1, q_heads=q_heads, max_tokens=max_tokens)
        if q_heads % shape.kv_heads:
            raise CacheError("q_heads", q_heads, f"a multiple of {shape.kv_heads} is needed")
        need_whole(0, keys=keys, sinks=sinks, window=window)
        self.q_heads, self.keys, self.sinks = q_heads, keys, sinks
        slots = self._slots_for(max_tokens, shape.kv_heads)
        super().__init__(shape, max_tokens=max_tokens, slots=slots, page_size=1, recent=window)

    def _slots_for(self, max_tokens: int, kv_heads: int) -> int:
        """Slots of a key head for all that its query heads read in a step."""
        return max(min(self.sinks + self.keys * (self.q_heads // kv_heads), max_tokens), 1)

    def grow(self, max_tokens: int) -> None:
        super().grow(max_tokens)
        slots = self._slots_for(self._most, self.shape.kv_heads)
        if slots > self.slots:
            self._take_slots(slots)

    @on_host
    def decode(self, q: Tensor, score: Softmax = Softmax()) -> Tensor:
        """o [batch, 1, q_heads, value_dim] of the newest token, q [batch, 1, q_heads, head_dim]."""
        check_step(q, score)
        if q.shape[2] != self.q_heads:
            raise ShapeError("q", list(q.shape), f"{self.q_heads} heads are needed")
        wanted = self._nearest(q)
        together = wanted.unflatten(1, (self.shape.kv_heads, -1)).any(2)
        pages, used = _places(together)
        self.select(torch.where(used, pages, -1))
        far, near = self.parts()
        plain: Score = Softmax(scale=score.scale, soft_cap=score.soft_cap)
        found = [decode_view(q, near.view, self.shape, plain, Dense())]
        if pages.shape[-1]:
            own = wanted.gather(2, pages.repeat_interleave(wanted.shape[1] // pages.shape[1], 1))
            bias = torch.where(own, 0.0, -torch.inf).to(q.device)
            found.append(decode_view(q, far.view, self.shape, plain + KeyBias(bias), Dense()))
        o, lse = merge(*zip(*found, strict=True))
        if score.sink is not None:
            share = torch.exp(lse - torch.logaddexp(lse, score.sink.to(lse.dtype)))
            o = o * share[..., None].to(o.dtype)
        return o

    def _nearest(self, q: Tensor) -> Tensor:
        """Which tokens on the host every query head reads: bool [batch, q_heads, most], on the host."""
        most = max(self._pages)
        rows = q[:, 0].detach().to("cpu").unflatten(1, (self.shape.kv_heads, -1))
        products = rows @ self.host_keys[:, :, :most, 0].mT
        s = products.flatten(1, 2)  # [B, Hq, most]
        place = torch.arange(most, device="cpu")
        stored = place < torch.tensor(self._pages, device="cpu")[:, None, None]
        first = (place < self.sinks) & stored
        s = s.masked_fill(first | ~stored, -torch.inf)
        best = s.topk(min(self.keys, most), dim=-1)
        marks = torch.zeros_like(s, dtype=torch.bool)
        return first | marks.scatter_(-1, best.indices, best.values > -torch.inf)


def _places(marks: Tensor) -> tuple[Tensor, Tensor]:
    """Marked places of the last axis in order, [..., most of them], and which of these are marked."""
    most = int(marks.sum(-1).amax()) if marks.numel() else 0
    places = (~marks).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    return places, marks.gather(-1, places)
