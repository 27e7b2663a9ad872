"""PyTorch's depthwise convolution of images, channels last."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def grouped(x: Tensor, filter: Tensor, dilation: int = 1) -> Tensor:
    """A depthwise convolution of an image [B, H, W, C] that keeps its grid, odd windows."""
    padding = [dilation * (k // 2) for k in filter.shape[1:]]
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        filter[:, None],
        padding=padding,
        dilation=dilation,
        groups=len(filter),
    )
    return y.permute(0, 2, 3, 1)
