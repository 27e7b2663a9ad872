"""One latent row per token in place of the keys and values of all heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._errors import DtypeError, ShapeError
from foveal.caches.base import KVShape
from foveal.caches.checks import need_whole
from foveal.caches.codec import Codec
from foveal.caches.paged import Paged


class Latent(Paged):
    """The row [c, p] of a token: a latent c that is key and value at once, and a positional key p.

    A query is [W_uk^T q, q_p] for every head ("absorbed"), the score scale (q'.c + q_p.p), the
    output sum w c, which W_uv of each head then expands.  Every row is read once for both products.
    Shapes: append(c [batch, L, 1, latent_dim], p [batch, L, 1, rope_dim]); decode takes q
    [batch, Lq, Hq, latent_dim + rope_dim] and gives o [batch, Lq, Hq, latent_dim].
    Options: dtype, device, pages, page_size, max_tokens as for `Paged`.
    Limits: the scale is that of the heads before absorption, never (latent_dim + rope_dim)^-1/2: name
    it in `Softmax(scale=...)`.
    Equals: attention over the expanded keys and values of every head.
    Paper: DeepSeek-V2 (2405.04434); with p not rotated in Kimi Linear (2510.26692).
    """

    def __init__(
        self,
        batch: int,
        latent_dim: int,
        rope_dim: int,
        *,
        pages: int,
        page_size: int = 64,
        max_tokens: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        need_whole(1, latent_dim=latent_dim)
        need_whole(0, rope_dim=rope_dim)
        self.latent_dim, self.rope_dim = latent_dim, rope_dim
        shape = KVShape(batch, 1, latent_dim + rope_dim, latent_dim, dtype, device)
        codecs = Codec(latent_dim + rope_dim, dtype), None
        self._build(shape, codecs, pages, page_size, False, max_tokens, False)

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        counts: Sequence[int] | None = None,
        last: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        super().append(*self._row(k, v), counts=counts, last=last, bias=bias)

    def rewrite(self, indices: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        super().rewrite(indices, *self._row(k, v), bias)

    def _row(self, c: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        need_tensors(k=c, v=p)
        if c.dtype != p.dtype:
            raise DtypeError("v", p.dtype, f"the dtype of the cache, {self.shape.dtype}, is needed")
        for name, x, dim in (("k", c, self.latent_dim), ("v", p, self.rope_dim)):
            if x.dim() != 4 or x.shape[2:] != (1, dim):
                needed = f"[{self.shape.batch}, L, 1, {dim}] is needed"
                raise ShapeError(name, list(x.shape), needed)
        return torch.cat((c, p), -1), c
