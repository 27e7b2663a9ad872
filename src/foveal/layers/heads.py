"""The projections that the attention layers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from foveal._arguments import need_tensors
from foveal._errors import DeviceError, DtypeError, ShapeError
from foveal._judged import need_dtype


def need_tokens(layer: nn.Module, x: Tensor, dim: int, shape: str = "[B, *grid, {dim}]") -> None:
    """Raises unless x has a last axis of dim and fits the dtype and the device of the layer's weights.

    The first plain linear map of its own tells those; where that has hooks, or autocast is on, they
    may bring x along.
    """
    need_tensors(x=x)
    if x.dim() < 2 or x.shape[-1] != dim:
        raise ShapeError("x", list(x.shape), f"{shape.format(dim=dim)} is needed")
    if not x.is_floating_point():
        raise DtypeError("x", x.dtype, "a floating dtype is needed")
    if torch.compiler.is_compiling():
        return
    linear = next((each for each in layer.children() if type(each) is nn.Linear), None)
    if linear is None or linear._forward_pre_hooks:
        return
    if x.device != linear.weight.device:
        needed = f"the device of the weights, {linear.weight.device}, is needed"
        raise DeviceError("x", x.device, needed)
    need_dtype(linear.weight, x=x)


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
        self.dim = dim
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim) if out_proj else nn.Identity()
        self.drop = nn.Dropout(dropout)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, *grid, heads, D] of x [B, *grid, dim]"""
        need_tokens(self, x, self.dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def join(self, o: Tensor) -> Tensor:
        """y [B, *grid, dim] of o [B, *grid, heads, D]"""
        y: Tensor = self.drop(self.proj(o.flatten(-2)))
        return y


class MultiHead(Projections, ABC):
    """y = join(mix(split(x))); a layer overrides `mix`.

    Shapes: x and y [B, *grid, dim].
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.mix(*self.split(x)))

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o [B, *grid, heads, D] of q, k, v of the same shape."""
