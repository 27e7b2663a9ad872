"""Cross-axis attention: whole rows and whole columns of an image as tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal.layers.heads import each
from foveal.patterns import Dense
from foveal.scores import Softmax


def attend_lines(q: Tensor, k: Tensor, v: Tensor, axis: Literal[0, 1]) -> Tensor:
    """o = softmax(q' k'^T) v + q', q' and k' of length 1; tokens are the lines along `axis`.

    With axis 0 the tokens are the H rows and a token's feature the W * D numbers of its row and
    head; with axis 1 the W columns, of H * D numbers.

    Shapes: q, k, v and o [B, H, W, heads, D].
    """
    if not q.dim() == k.dim() == v.dim() == 5:
        raise ShapeError("q", list(q.shape), "[B, H, W, heads, D] is needed, as for k and v")
    if v.shape[-1] != q.shape[-1]:
        raise ShapeError("v", list(v.shape), f"the D of q, {q.shape[-1]}, is needed")
    if k.shape[:4] != q.shape[:4]:
        raise ShapeError("k", list(k.shape), f"the shape of q, {list(q.shape)}, is needed")
    if axis == 1:
        turned = each(lambda x: x.transpose(1, 2), q, k, v)
        return attend_lines(*turned, 0).transpose(1, 2)
    width = q.shape[2]
    q, k, v = each(lambda x: x.transpose(2, 3).flatten(3), q, k, v)  # [B, H, heads, W D]
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    o = attend(q, k, v, Dense(), Softmax(scale=1.0)) + q
    lines: Tensor = o.unflatten(-1, (width, -1))
    return lines.transpose(2, 3)


class CrossAxisAttention(nn.Module):
    """The multi-scale cross-axis attention of MCANet.

    a and b are sums of three horizontal and of three vertical depthwise convolutions of norm(x),
    both through one 1x1 convolution P.  Rows attend with q = b, k = v = a, columns with q = a, k =
    v = b, and y = P(rows) + P(columns) + x.

    Shapes: x and y [B, dim, H, W].
    Options: heads divides dim; sizes of the strip convolutions are odd.
    Paper: MCANet (2312.08866); the temperature of its released code is not used there, and is left
    out.
    """

    def __init__(self, dim: int, heads: int = 8, sizes: tuple[int, ...] = (7, 11, 21)) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.horizontal = nn.ModuleList(_strip(dim, (1, size)) for size in sizes)
        self.vertical = nn.ModuleList(_strip(dim, (size, 1)) for size in sizes)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        a = self._heads(torch.stack([strip(normed) for strip in self.horizontal]).sum(0))
        b = self._heads(torch.stack([strip(normed) for strip in self.vertical]).sum(0))
        rows, columns = attend_lines(b, a, a, 0), attend_lines(a, b, b, 1)
        y: Tensor = x
        for part in (rows, columns):
            y = y + self.proj(part.flatten(-2).movedim(-1, 1))
        return y

    def _heads(self, image: Tensor) -> Tensor:
        """[B, H, W, heads, D] of an image [B, dim, H, W], projected."""
        projected: Tensor = self.proj(image).movedim(1, -1).unflatten(-1, (self.heads, -1))
        return projected


def _strip(dim: int, size: tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, size, padding=(size[0] // 2, size[1] // 2), groups=dim)
