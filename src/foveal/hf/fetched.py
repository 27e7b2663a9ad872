"""Caches with their old keys on the host behind the cache interface of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal._errors import CacheError, RefusedError, ShapeError, UnknownNameError
from foveal.caches.base import KVShape
from foveal.caches.checks import need_whole
from foveal.caches.offloaded import Offloaded
from foveal.compose.louis_cache import LouisCache
from foveal.compose.nosa_cache import NosaCache
from foveal.compose.retrieval_cache import RetrievalCache
from foveal.hf.layer_call import LayerCall, solve
from foveal.scores import KeyBias

if TYPE_CHECKING:
    from foveal.hf.selected import Selected

Weights = Callable[[Tensor, int], Tensor]

FETCHING: dict[str, type[Offloaded]] = {
    "louis_kv": LouisCache,
    "nosa": NosaCache,
    "retrieval_attention": RetrievalCache,
}
_FIRST_ROOM = 1024  # tokens of a sequence that there is room for, at least, where none are named


@dataclass(frozen=True)
class Fetching:
    """A cache by its name, with options, before there are keys that say how large it is.

    max_tokens None: room on the host is doubled whenever it is used up.  weights: the log-weight of every
    key, where the cache takes one.
    """

    name: str
    kind: type[Offloaded]
    options: Mapping[str, Any]
    max_tokens: int | None = None
    weights: Weights | None = None

    @staticmethod
    def named(cache: str | type[Offloaded], options: Mapping[str, Any]) -> Fetching:
        """What `use` was given; raises for an option that the cache does not have, or cannot use."""
        kinds = {kind: name for name, kind in FETCHING.items()}
        name = cache if isinstance(cache, str) else kinds[cache]
        kind = FETCHING[name]
        parameters = inspect.signature(kind).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "q_heads"]
        known += ["weights"] if kind is NosaCache else []
        if unknown := sorted(set(options) - set(known)):
            raise UnknownNameError(f"option of {name}", unknown[0], tuple(known))
        given = {**options}
        most, weights = given.pop("max_tokens", None), given.pop("weights", None)
        if most is not None:
            need_whole(1, max_tokens=most)
        if kind is NosaCache and not callable(weights):
            needed = "a function of keys [B, L, Hkv, D] and the number of their layer is needed"
            raise CacheError("weights", weights, f"{needed}: it gives log-weights [B, L, Hkv]")
        found = Fetching(name, kind, given, most, weights)
        found.made(KVShape(1, 1, 1), 1, 1)
        return found

    def made(self, shape: KVShape, q_heads: int, tokens: int) -> Offloaded:
        """An empty cache of a layer, with room for sequences of `tokens` tokens or for `max_tokens`."""
        own: dict[str, Any] = {"q_heads": q_heads} if self.kind is RetrievalCache else {}
        most = tokens if self.max_tokens is None else self.max_tokens
        return self.kind(shape, max_tokens=most, **own, **self.options)


@dataclass(eq=False)
class Fetched:
    """The tokens of one layer: the newest on the device, and those on the host of which steps fetch some.

    real bool [B, seen], False at padding, which is not stored; `seen` counts it.
    """

    fetching: Fetching
    layer: int
    cache: Any = None
    real: Tensor | None = None
    memo: Tensor | None = None
    room: int = 0
    noted: Any = field(default=None, repr=False)

    @property
    def seen(self) -> int:
        return 0 if self.real is None else self.real.shape[1]

    @property
    def batch(self) -> int:
        return 0 if self.real is None else len(self.real)

    def bytes(self) -> int:
        """Bytes on the device."""
        return 0 if self.cache is None else int(self.cache.bytes())

    def host_bytes(self) -> int:
        """Bytes of what lies on the host."""
        return 0 if self.cache is None else int(self.cache.host_bytes())

    def fetched_bytes(self) -> int:
        """Bytes that ever came from the host."""
        return 0 if self.cache is None else int(self.cache.fetched_bytes)

    def attend(self, call: LayerCall, selected: Selected | None) -> Tensor:
        """Appends the new tokens of a call; one of them fetches what it reads, several read everything."""
        new, before = call.k.shape[1], self.real
        real = torch.ones(call.k.shape[:2], dtype=torch.bool)
        if call.padding is not None:
            real = call.padding[:, -new:].cpu()
        if before is not None and len(before) != len(real):
            needed = f"{len(before)} sequences, as in the calls before, are needed"
            raise ShapeError("past_key_values", f"{len(real)} sequences", needed)
        self._make_room(call, real)
        self.noted = self.cache.noted() if isinstance(self.cache, LouisCache) else None
        try:
            self._append(call.k.detach(), call.v.detach(), real)
            self.real = real if before is None else torch.cat([before, real], dim=1)
            if new > 1:
                return self._everything(call, selected)
            o: Tensor = self.cache.decode(call.q, call.score)
            return o
        except BaseException:
            self._back_to(before)
            raise

    def _make_room(self, call: LayerCall, real: Tensor) -> None:
        """A cache that the new tokens fit, as far as the options let it."""
        B, new, heads, dim = call.k.shape
        if self.cache is None:
            self.room = max(2 * new, _FIRST_ROOM)
            shape = KVShape(B, heads, dim, call.v.shape[3], call.k.dtype, call.k.device)
            self.cache = self.fetching.made(shape, call.q.shape[2], self.room)
        needed = max(self.cache.host_seen) + new
        if self.fetching.max_tokens is None and needed > self.room:
            self.room = max(2 * self.room, needed)
            self.cache.grow(self.room)

    def _append(self, k: Tensor, v: Tensor, real: Tensor) -> None:
        bias = self._weights(k)
        counts = None
        if not bool(real.all()):
            counts = real.sum(-1).tolist()
            order = (~real).to(torch.uint8).argsort(dim=-1, stable=True).to(k.device)
            rows = torch.arange(len(k), device=k.device)[:, None]
            k, v = k[rows, order], v[rows, order]
            bias = None if bias is None else bias[rows, order]
        self.cache.append(k, v, counts=counts, bias=bias)

    def _weights(self, k: Tensor) -> Tensor | None:
        """Log-weights [B, L, Hkv] of keys."""
        if self.fetching.weights is None:
            return None
        found = self.fetching.weights(k, self.layer)
        if not isinstance(found, Tensor) or found.shape not in (k.shape[:3], (*k.shape[:2], 1)):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError("weights", got, f"log-weights {list(k.shape[:3])} are needed")
        return found.detach()

    def _everything(self, call: LayerCall, selected: Selected | None) -> Tensor:
        """Attention of the queries of several tokens to all that came so far."""
        assert self.real is not None
        real = self.real.to(call.q.device)
        if call.k.shape[1] < self.seen:
            k, v = (self._by_place(rows, real) for rows in self.cache.dense())
            call = replace(call, k=k, v=v)
        padding = None if bool(real.all()) else real
        weights = self._weights(call.k.detach())
        if weights is not None:  # with padding hidden by the same terms
            terms = weights.to(torch.promote_types(weights.dtype, torch.float32)).transpose(1, 2)
            terms = terms if padding is None else terms.masked_fill(~real[:, None], -torch.inf)
            call, padding = replace(call, score=call.score + KeyBias(terms)), None
        whole = replace(call, padding=padding)
        o: Tensor = solve(whole) if selected is None else selected.solve(whole)
        return o

    def _by_place(self, rows: Tensor, real: Tensor) -> Tensor:
        """Stored rows [B, L, Hkv, .] as [B, seen, Hkv, .], with 0 at padding."""
        stored = torch.arange(rows.shape[1], device=rows.device) < real.sum(-1, keepdim=True)
        found = rows.new_zeros(*real.shape, *rows.shape[2:])
        found[real] = rows[stored]
        return found

    def crop(self, count: int) -> None:
        """Drops the newest `count` tokens."""
        if count > self.seen:
            raise CacheError("crop", count, f"at most the {self.seen} tokens there are")
        if count and self.real is not None:
            self._back_to(self.real[:, : self.seen - count])

    def _back_to(self, real: Tensor | None) -> None:
        """As it was when these tokens had been seen."""
        self.real = real
        if self.noted is not None:
            self.cache.recall(self.noted)
        self.cache.crop(0 if real is None else real.sum(-1))

    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes what index[b] was."""
        if self.real is None:
            return
        if len(index) != self.batch:
            reason = f"it keeps its {self.batch} sequences, and {len(index)} are asked for"
            raise RefusedError(self.fetching.name, reason)
        self.cache.reorder(index.tolist())
        self.real, self.noted = self.real[index.cpu()], None
