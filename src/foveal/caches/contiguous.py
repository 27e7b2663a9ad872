"""One row of memory per sequence and head."""

from __future__ import annotations

from foveal.caches.base import KVShape, check_shape
from foveal.caches.checks import need_whole
from foveal.caches.codec import Codec
from foveal.caches.paged import Paged


class Contiguous(Paged):
    """Room for `max_tokens` tokens of every sequence, [batch, kv_heads, max_tokens, D] in one piece.

    The page of a sequence is its whole row: it never needs a table walk, and never grows.
    Options: per_head lets heads keep different tokens; biased keeps a logarithmic weight per key.
    """

    def __init__(
        self, shape: KVShape, *, max_tokens: int, per_head: bool = False, biased: bool = False
    ) -> None:
        check_shape(shape)
        need_whole(1, max_tokens=max_tokens)
        codecs = Codec(shape.head_dim, shape.dtype), Codec(shape.values, shape.dtype)
        rows = shape.batch * (shape.kv_heads if per_head else 1)
        self._build(shape, codecs, rows, max_tokens, per_head, max_tokens, biased)
