"""Attention with fewer projections: one for all heads, or none for keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal._judged import judged, need_dtype, need_shape
from foveal.patterns import Causal, Dense

KINDS = ("optimised", "efficient", "super")


@judged
def head_embeddings(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_embedding: Tensor,
    k_embedding: Tensor,
    v_embedding: Tensor,
    *,
    multiply: bool = False,
    causal: bool = True,
) -> Tensor:
    """Heads that differ by an embedding only: q_h = q + e_h, or q (1 + e_h); k and v alike.

    With `+` the embedding of a key shifts all scores of a query alike and falls out of the softmax, and
    that of a value adds to the output; with a factor both move to the query and the output.  So one head
    of keys and values serves all.
    Shapes: q, k, v [B, L, 1, D], the embeddings [H, D]; returns [B, L, H, D].
    Paper: Pit One Against Many (Xue and Aletras, 2023; 2310.07911).
    """
    D, H = q.shape[3], q_embedding.shape[0] if q_embedding.dim() else 0
    for name, x in (("q", q), ("k", k), ("v", v)):
        need_shape(name, x, (q.shape[0], -1, 1, D), like=q)
    embeddings = {
        "q_embedding": q_embedding,
        "k_embedding": k_embedding,
        "v_embedding": v_embedding,
    }
    for name, x in embeddings.items():
        need_shape(name, x, (H, D), like=q)
    need_dtype(q, **embeddings)
    pattern = Causal() if causal else Dense()
    if not multiply:
        # The embedding of a key falls out of the softmax; NaN in it would not.
        return attend(q + q_embedding, k, v, pattern) + (v_embedding + 0 * k_embedding)
    heads = q * ((1 + q_embedding) * (1 + k_embedding))
    return attend(heads, k, v, pattern) * (1 + v_embedding)


class HeadEmbeddingAttention(nn.Module):
    """y = W_o concat_h softmax(q_h k_h^T / sqrt(D)) v_h, with one W_q, W_k, W_v for all heads.

    Shapes: x and y [B, L, dim]; parameters 3 dim D + 3 heads D + heads D dim.
    Options: head_dim D, default dim / heads; multiply, factors 1 + e_h in place of terms e_h; causal.
    Paper: Pit One Against Many (Xue and Aletras, 2023; 2310.07911).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        multiply: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__()
        D = dim // heads if head_dim is None else head_dim
        self.multiply, self.causal = multiply, causal
        self.q, self.k, self.v = (nn.Linear(dim, D, bias=False) for _ in range(3))
        self.embeddings = nn.Parameter(torch.randn(3, heads, D) * D**-0.5)
        self.out = nn.Linear(heads * D, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x)[:, :, None] for project in (self.q, self.k, self.v))
        a, b, c = self.embeddings.unbind()
        o = head_embeddings(q, k, v, a, b, c, multiply=self.multiply, causal=self.causal)
        y: Tensor = self.out(o.flatten(-2))
        return y


@judged
def super_attention(
    q: Tensor, x: Tensor, mixing: Tensor | None = None, *, causal: bool = True
) -> Tensor:
    """o_h = softmax(q_h x_h^T / sqrt(D)) (W_A x_h): the slices of x are keys and, mixed, values.

    Shapes: q and x [B, L, H, D]; mixing W_A [L, L], None is the identity (efficient attention); with
    causal only its lower triangle counts.
    Paper: You Need to Pay Better Attention (2403.01643).
    """
    need_shape("x", x, tuple(q.shape), like=q)
    need_dtype(q, x=x, mixing=mixing)
    v = x
    if mixing is not None:
        if mixing.shape != (x.shape[1], x.shape[1]):
            needed = f"[{x.shape[1]}, {x.shape[1]}], a square over the tokens, is needed"
            raise ShapeError("mixing", list(mixing.shape), needed)
        v = torch.einsum("ij,bjhd->bihd", mixing.tril() if causal else mixing, x)
    return attend(q, x, v, Causal() if causal else Dense())


class SlicedAttention(nn.Module):
    """Attention whose keys or values are slices of the input.

    "optimised" has no W_v, "efficient" has neither W_k nor W_v, "super" mixes the values of "efficient"
    along the tokens by W_A [length, length], which starts as the identity.
    Shapes: x and y [B, L, dim]; heads divide dim; "super" takes L <= length.
    Paper: You Need to Pay Better Attention (2403.01643).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kind: str = "super",
        length: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        if kind not in KINDS:
            raise ShapeError("kind", kind, f"one of {', '.join(KINDS)} is needed")
        if kind == "super" and (length is None or length < 1):
            raise ShapeError("length", length, "the number of tokens, at least 1, is needed")
        self.heads, self.causal = heads, causal
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False) if kind == "optimised" else None
        self.mixing = nn.Parameter(torch.eye(length or 0)) if kind == "super" else None
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, own = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(x), x))
        if self.k is not None:
            k = self.k(x).unflatten(-1, (self.heads, -1))
            o = attend(q, k, own, Causal() if self.causal else Dense())
        else:
            length = x.shape[1]
            mixing = None if self.mixing is None else self.mixing[:length, :length]
            o = super_attention(q, own, mixing, causal=self.causal)
        y: Tensor = self.out(o.flatten(-2))
        return y
