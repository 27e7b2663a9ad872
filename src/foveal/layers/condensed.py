"""TLinFormer: a history condensed into a few positions, exact softmax throughout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal._judged import judged
from foveal.layers.units import GatedUnits
from foveal.patterns import Causal


@judged
def tlinformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 64,
    observed: int = 64,
    implementation: str | None = None,
) -> Tensor:
    """The compress layer: the last `observed` tokens of the history see all of it; the window sees both.

    The last `window` tokens are the window, those before the history.  A token of the window gives
    softmax over the history plus, a softmax of its own, causal attention inside the window.
    Shapes: q, k, v [B, L, H, .] with L >= window; returns [B, min(observed, L - window) + window, H, Dv].
    Cost: 2 (D + Dv) (observed + window) L FLOPs per head: linear in L.
    Paper: TLinFormer (2508.20407).
    """
    if k.shape[1] != q.shape[1]:
        raise ShapeError("k", list(k.shape), f"the {q.shape[1]} tokens of q are needed")
    history = q.shape[1] - window
    if window < 1 or history < 0:
        raise ShapeError("window", window, f"1, ..., {q.shape[1]} tokens are needed")
    first = max(history - observed, 0)
    past_k, past_v = k[:, :history], v[:, :history]
    outputs = []
    if history > first:
        latent = attend(q[:, first:history], past_k, past_v, implementation=implementation)
        outputs.append(latent)
    own = _both(q[:, history:], (past_k, past_v), k[:, history:], v[:, history:], implementation)
    return torch.cat([*outputs, own], dim=1)


def _both(
    q: Tensor,
    past: tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    implementation: str | None = None,
) -> Tensor:
    """Attention to `past`, if there is any, plus causal attention among the tokens of the window."""
    o = attend(q, k, v, Causal(), implementation=implementation)
    if past[0].shape[1]:
        o = o + attend(q, *past, implementation=implementation)
    return o


class TLinFormerBlock(nn.Module):
    """history', window' = block(history, window): compress, layers on the latent, restore.

    The last `observed` tokens of the history see all of it and become the latent; `depth` layers let the
    latent see itself; in the last layer all of the history sees the latent.  The window sees, beside
    itself up to the own token, the history in the first layer and the latent in the others.
    Shapes: history [B, N, dim], window [B, W, dim]; returns the same.
    Options: hidden is the width of the channel mixers, None 8 / 3 of dim.
    Equals: a window that grows token by token gives the same rows; the history does not see the window.
    Paper: TLinFormer (2508.20407).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        observed: int = 64,
        depth: int = 1,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.observed = observed
        self.layers = nn.ModuleList(_Layer(dim, heads, hidden) for _ in range(depth + 2))

    def forward(self, history: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        first, *hidden, last = self.layers
        latent, window = first(history[:, -self.observed :], history, window)
        for layer in hidden:
            latent, window = layer(latent, latent, window)
        restored, window = last(history, latent, window)
        return restored, window


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int | None) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.units = GatedUnits(dim, max(8 * dim // 3, 1) if hidden is None else hidden, F.silu)
        self.norms = nn.ModuleList((nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)))

    def forward(self, asking: Tensor, asked: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that ask of the past, the rows they see, and the window, which sees these and itself."""
        past = self.norms[0](asked)
        keys = (self._heads(self.k, past), self._heads(self.v, past))
        if asked.shape[1]:
            latent = attend(self._heads(self.q, self.norms[0](asking)), *keys)
            asking = self._mixed(asking, latent)
        own = self.norms[0](window)
        q, k, v = (self._heads(each, own) for each in (self.q, self.k, self.v))
        return asking, self._mixed(window, _both(q, keys, k, v))

    def _heads(self, map_of: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = map_of(x).unflatten(-1, (self.heads, -1))
        return y

    def _mixed(self, x: Tensor, o: Tensor) -> Tensor:
        x = x + self.out(o.flatten(-2))
        y: Tensor = x + self.units(self.norms[1](x))
        return y
