"""The projections that the attention layers share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from foveal._errors import ShapeError


def each(
    change: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same change of layout of q, k and v."""
    return change(q), change(k), change(v)


class Projections(nn.Module):
    """Linear maps from tokens to the q, k, v of every head, and from the heads back to tokens.

    Options: dim = heads * head_dim; qkv_bias adds a bias to q, k, v; out_proj=False leaves the map
    back out; dropout acts on its output.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        out_proj: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim) if out_proj else nn.Identity()
        self.drop = nn.Dropout(dropout)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, *grid, heads, D] of x [B, *grid, dim]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def join(self, o: Tensor) -> Tensor:
        """y [B, *grid, dim] of o [B, *grid, heads, D]"""
        y: Tensor = self.drop(self.proj(o.flatten(-2)))
        return y


class MultiHead(Projections):
    """y = join(mix(split(x))); a layer overrides `mix`.

    Shapes: x and y [B, *grid, dim].
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.mix(*self.split(x)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o [B, *grid, heads, D] of q, k, v of the same shape."""
        raise NotImplementedError
