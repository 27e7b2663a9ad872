"""Small backbones of the blocks of UniRepLKNet and of the Visual Attention Network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.layers import UniRepLKBlock, VANBlock

BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "unireplk": lambda dim, window: UniRepLKBlock(dim, window, scale=1.0),
    "van": lambda dim, window: VANBlock(dim),
}


class Backbone(nn.Module):
    """A linear map of every pixel, blocks on the full grid, and a linear map to classes.

    Shapes: x [B, H, W, channels] to [B, H, W, classes], or with `pooled` to [B, classes].
    """

    def __init__(
        self,
        block: str,
        channels: int,
        classes: int,
        *,
        dim: int = 32,
        depth: int = 3,
        window: int = 7,
        pooled: bool = True,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(channels, dim)
        self.blocks = nn.Sequential(*(BLOCKS[block](dim, window) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.blocks(self.stem(x)))
        out: Tensor = self.head(y.mean((1, 2)) if self.pooled else y)
        return out


def train(
    network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], rate: float = 3e-3
) -> list[float]:
    """One step of AdamW for each batch; the losses."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    network.train()
    losses = []
    for x, classes in batches:
        loss = F.cross_entropy(network(x).flatten(0, -2), classes.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    network.eval()
    return losses
