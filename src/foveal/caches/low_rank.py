"""Keys and values as coefficients in a basis of fewer columns."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._arguments import need_tensors, tensors_or_none
from foveal._errors import ShapeError
from foveal.caches.base import KVShape, check_shape
from foveal.caches.codec import Codec
from foveal.caches.paged import Paged


class LowRank(Paged):
    """Stores U_k^T (k - m_k) and U_v^T (v - m_v); a decode never expands them.

    A query becomes U_k^T q, the output U_v o + m_v: the kernel is the ordinary one with smaller rows.
    Shapes: key_basis [kv_heads, head_dim, rank] and value_basis [kv_heads, value_dim, rank], each with
    orthonormal columns per head and a rank of its own; key_mean [kv_heads, head_dim], value_mean
    [kv_heads, value_dim], default 0.
    Options: as for `Paged`.
    Limits: with a soft cap or slopes, only key_mean 0 gives the scores of the projected keys: others
    are refused by `decode`.
    Equals: `Paged` on U U^T (x - m) + m; a basis of full rank on x itself.
    Paper: Eigen Attention (2408.05646), MatryoshkaKV (2410.14731).
    """

    def __init__(
        self,
        shape: KVShape,
        key_basis: Tensor,
        value_basis: Tensor,
        *,
        pages: int,
        key_mean: Tensor | None = None,
        value_mean: Tensor | None = None,
        page_size: int = 16,
        per_head: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        check_shape(shape)
        need_tensors(key_basis=key_basis, value_basis=value_basis)
        tensors_or_none(key_mean=key_mean, value_mean=value_mean)
        heads = shape.kv_heads
        for name, x, dim in (
            ("key_basis", key_basis, shape.head_dim),
            ("value_basis", value_basis, shape.values),
        ):
            fits = x.dim() == 3 and x.shape[:2] == (heads, dim) and 1 <= x.shape[2] <= dim
            if not fits:
                raise ShapeError(name, list(x.shape), f"[{heads}, {dim}, 1 to {dim}] is needed")
        for name, mean, dim in (
            ("key_mean", key_mean, shape.head_dim),
            ("value_mean", value_mean, shape.values),
        ):
            if mean is not None and tuple(mean.shape) != (heads, dim):
                raise ShapeError(name, list(mean.shape), f"[{heads}, {dim}] is needed")
        device = torch.device(shape.device)
        self.key_basis, self.value_basis = (
            x.to(device, shape.dtype) for x in (key_basis, value_basis)
        )
        self.key_mean, self.value_mean = (
            None if x is None else x.to(device, shape.dtype) for x in (key_mean, value_mean)
        )
        ranks = key_basis.shape[2], value_basis.shape[2]
        codecs = Codec(ranks[0], shape.dtype), Codec(ranks[1], shape.dtype)
        self._build(shape, codecs, pages, page_size, per_head, max_tokens, False)

    def _encoded(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = []
        for x, mean, basis in (
            (k, self.key_mean, self.key_basis),
            (v, self.value_mean, self.value_basis),
        ):
            x = x.to(basis.dtype)
            x = x if mean is None else x - mean[:, None]
            found.append(torch.einsum("bhnd,hdr->bhnr", x, basis))
        return tuple(found)

    def dense(self) -> tuple[Tensor, Tensor]:
        found = []
        for x, mean, basis in zip(
            super().dense(),
            (self.key_mean, self.value_mean),
            (self.key_basis, self.value_basis),
            strict=True,
        ):
            y = torch.einsum("bnhr,hdr->bnhd", x, basis)
            if mean is not None:
                stored = torch.arange(y.shape[1], device=y.device) < self._lengths[..., None]
                y = y + mean * stored.transpose(1, 2)[..., None].to(y.dtype)
            found.append(y)
        return found[0], found[1]

    def project(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        heads = q.unflatten(2, (self.shape.kv_heads, -1))
        stored = torch.einsum("blhgd,hdr->blhgr", heads, self.key_basis).flatten(2, 3)
        if self.key_mean is None:
            return stored, None
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        shift = torch.einsum("blhgd,hd->blhg", heads.to(wide), self.key_mean.to(wide))
        return stored, shift.flatten(2)

    def restore(self, o: Tensor, lse: Tensor) -> Tensor:
        heads = o.unflatten(2, (self.shape.kv_heads, -1))
        full = torch.einsum("blhgr,hdr->blhgd", heads, self.value_basis)
        if self.value_mean is not None:
            visible = (lse > -torch.inf).to(full.dtype).unflatten(2, (self.shape.kv_heads, -1))
            full = full + self.value_mean[:, None] * visible[..., None]
        return full.flatten(2, 3)
