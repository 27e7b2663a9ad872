"""NATTEN's modules, with its argument and parameter names, so that its checkpoints load."""

from __future__ import annotations

from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal.compat.natten.fused import Flags, Sizes, neighborhood
from foveal.layers.neighborhood import relative_table
from foveal.patterns.base import per_axis
from foveal.scores import RelativeBias, Softmax


class _NeighborhoodAttention(nn.Module):
    axes: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ShapeError("num_heads", num_heads, f"a divisor of embed_dim, {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.pattern = neighborhood(self.axes, kernel_size, stride, dilation, is_causal)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        if rel_pos_bias:
            self.rpb = relative_table(num_heads, per_axis(self.pattern.window, self.axes))
        else:
            self.register_parameter("rpb", None)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.axes + 2 or x.shape[-1] != self.embed_dim:
            raise ShapeError(
                "x", list(x.shape), f"[batch, {self.axes} grid axes, {self.embed_dim}] is needed"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        score = Softmax(self.scale)
        o = attend(
            q, k, v, self.pattern, score if self.rpb is None else score + RelativeBias(self.rpb)
        )
        y: Tensor = self.proj_drop(self.proj(o.flatten(-2)))
        return y

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, head_dim={self.head_dim}, pattern={self.pattern!r}"


_DOC = """Projections and neighborhood attention on a grid of {axes} axes, as NATTEN's module of that name.

    Shapes: x and y [batch, {grid}, embed_dim]; parameters qkv.weight, qkv.bias, proj.weight, proj.bias.
    Options: as NATTEN's; rel_pos_bias adds the table `rpb` [num_heads, 2 kernel_size - 1 per axis] of
    the original paper, with gradient.
    """


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _DOC.format(axes=1, grid="X")
    axes = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _DOC.format(axes=2, grid="X, Y")
    axes = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _DOC.format(axes=3, grid="X, Y, Z")
    axes = 3
