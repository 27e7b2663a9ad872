"""Native sparse attention as a layer, and the learned maps from windows to compressed keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import OptionError, ShapeError
from foveal.compose.native_sparse import (
    SparseBranches,
    compress_mean,
    native_sparse,
    window_tokens,
)
from foveal.engines.tile.windows import Windows, windows
from foveal.layers.causal import rotary
from foveal.layers.state import (
    LayerState,
    StateLayer,
    one_by_one,
    place_of,
    positions,
    unequal,
)


class MeanCompression(nn.Module):
    """The mean of every window.  [B, windows, heads, D] of x [B, L, heads, D]; no parameters."""

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        return compress_mean(x, windows)


class LinearCompression(nn.Module):
    """k~_w,h = W_h vec(x_w + P_h): one linear map per head on the tokens of a window, laid side by side.

    Shapes: x [B, L, heads, D] to [B, windows, heads, D]; weight [heads, length D, D]; places P
    [heads, length, D], zeros at first, left out with `places=False`.  Starts as the mean.
    Paper: the map of Flash Sparse Attention's module (2508.18224).
    """

    def __init__(self, heads: int, head_dim: int, length: int, *, places: bool = True) -> None:
        super().__init__()
        mean = torch.eye(head_dim).repeat(length, 1) / length
        self.weight = nn.Parameter(mean.expand(heads, -1, -1).clone())
        self.places = nn.Parameter(torch.zeros(heads, length, head_dim)) if places else None

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        tokens = _placed(window_tokens(x, windows), self.places)
        return torch.einsum(
            "bwlhd,hlde->bwhe", tokens, self.weight.unflatten(1, (windows.length, -1))
        )


class MLPCompression(nn.Module):
    """k~_w,h = V_h gelu(W_h vec(x_w + P_h)) beside the mean of the window, from which it starts.

    Shapes: x [B, L, heads, D] to [B, windows, heads, D]; first [heads, length D, hidden], second [heads,
    hidden, D], zeros at first; places as in `LinearCompression`.
    Paper: the map phi of Native Sparse Attention (2502.11089), whose sizes are not published.
    """

    def __init__(
        self, heads: int, head_dim: int, length: int, hidden: int, *, places: bool = True
    ) -> None:
        super().__init__()
        spread = (length * head_dim) ** -0.5
        self.first = nn.Parameter(torch.randn(heads, length * head_dim, hidden) * spread)
        self.second = nn.Parameter(torch.zeros(heads, hidden, head_dim))
        self.places = nn.Parameter(torch.zeros(heads, length, head_dim)) if places else None

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        tokens = _placed(window_tokens(x, windows), self.places)
        hidden = torch.einsum(
            "bwlhd,hldm->bwhm", tokens, self.first.unflatten(1, (windows.length, -1))
        )
        return tokens.mean(2) + torch.einsum("bwhm,hmd->bwhd", F.gelu(hidden), self.second)


def _placed(tokens: Tensor, places: Tensor | None) -> Tensor:
    """tokens [B, windows, length, heads, D] with places [heads, length, D] added."""
    return tokens if places is None else tokens + places.transpose(0, 1)


class NativeSparseAttention(StateLayer):
    """y = W_o sum_branch g o over compressed keys, the blocks that they choose, and a window.

    g = sigmoid(W_g x) per token, head and branch; compressed keys are made before the rotation and then
    turned by the place of their window's first token.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`; the state holds the keys and
    values [N, T, kv_heads, head_dim], the compressed ones, and keys of windows that are not full yet.
    Options: kv_heads, a divisor of heads, None is heads; head_dim None is dim / heads; branches, the
    sizes; compression "mean", "linear" or "mlp" (hidden: head_dim); rotary_base None leaves q and k
    without positions.
    Paper: Native Sparse Attention (2502.11089); Flash Sparse Attention (2508.18224).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        branches: SparseBranches = SparseBranches(),
        compression: str = "linear",
        rotary_base: float | None = 10000.0,
    ) -> None:
        super().__init__(dim, heads)
        if not isinstance(branches, SparseBranches):
            raise OptionError("branches", repr(branches), "SparseBranches are needed")
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ShapeError("kv_heads", kv_heads, f"a divisor of heads, {heads}, is needed")
        head_dim = dim // heads if head_dim is None else head_dim
        self.branches = branches
        self.rotary_base = rotary_base
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.gate = nn.Linear(dim, 3 * heads)
        self.compress_k = _compression(compression, self.kv_heads, head_dim, branches.length, True)
        self.compress_v = _compression(compression, self.kv_heads, head_dim, branches.length, False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        if state is None and not return_state:
            self.judge(x, state, cu_seqlens)
            return self._whole(x, cu_seqlens)
        return super().forward(x, state, cu_seqlens=cu_seqlens, return_state=return_state)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if cu_seqlens is not None or (state is not None and unequal(state.tails[-1])):
            return one_by_one(x, state, cu_seqlens, self._piece)
        return self._piece(x, state)

    def _whole(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        places, _ = positions(x, None, cu_seqlens)
        if not x.shape[1]:
            return x
        q, k, v, raw = self._projected(x, places)
        table = self.branches.windows(q, k, cu_seqlens)
        compressed = self._compressed(raw, v, table, table.positions)
        return self._attend(x, q, k, v, compressed, cu_seqlens)

    def _piece(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Sequences of one length, after as many tokens each."""
        seen = None if state is None else state.tails[-1]
        places, after = positions(x, seen, None)
        q, k, v, raw = self._projected(x, places)
        raw_v = v
        begun = 0
        if state is not None:
            past = self._real(state)
            k, v, raw, raw_v = (
                torch.cat(pair, dim=1) for pair in zip(past[:4], (k, v, raw, raw_v), strict=True)
            )
            begun = past[4].shape[1]
        stride, length = self.branches.stride, self.branches.length
        whole = max((raw.shape[1] - length) // stride + 1, 0)
        b = self.branches
        own = windows(raw.shape[1], raw.shape[1], length, stride, b.block, x.device)
        first = torch.arange(own.count, device=x.device) * stride + begun * stride
        new = [y[:, :whole] for y in self._compressed(raw, raw_v, own, first)]
        if state is not None:
            new = [torch.cat(pair, dim=1) for pair in zip(past[4:], new, strict=True)]
        count = self.branches.windows(q, k).count
        padded = [F.pad(y, (0, 0, 0, 0, 0, count - y.shape[1])) for y in new]
        y = self._attend(x, q, k, v, (padded[0], padded[1]), None)
        rest = (z[:, whole * stride :] for z in (raw, raw_v))
        return y, LayerState((k, v, *rest, *new, after))

    def _real(self, state: LayerState) -> tuple[Tensor, ...]:
        """The tails without the zeros that stand before those of shorter sequences."""
        seen = place_of(state.tails[-1])
        ended = max((seen - self.branches.length) // self.branches.stride + 1, 0)
        rest = seen - ended * self.branches.stride
        sizes = (seen, seen, rest, rest, ended, ended)
        return tuple(x[:, x.shape[1] - n :] for x, n in zip(state.tails[:-1], sizes, strict=True))

    def _projected(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, and k before its rotation."""
        q = self.split(self.q(x))
        k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (self.k(x), self.v(x)))
        if self.rotary_base is None:
            return q, k, v, k
        return rotary(q, places, self.rotary_base), rotary(k, places, self.rotary_base), v, k

    def _compressed(
        self, raw: Tensor, v: Tensor, table: Windows, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.compress_k(raw, table), self.compress_v(v, table)
        if self.rotary_base is not None:
            keys = rotary(keys, places.expand(len(keys), -1), self.rotary_base)
        return keys, values

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        compressed: tuple[Tensor, Tensor],
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        gates = torch.sigmoid(self.gate(x)).unflatten(-1, (self.heads, 3))
        o = native_sparse(q, k, v, gates, compressed, branches=self.branches, cu_seqlens=cu_seqlens)
        y: Tensor = self.out(o.flatten(-2))
        return y


def _compression(kind: str, heads: int, head_dim: int, length: int, places: bool) -> nn.Module:
    if kind == "mean":
        return MeanCompression()
    if kind == "linear":
        return LinearCompression(heads, head_dim, length, places=places)
    if kind == "mlp":
        return MLPCompression(heads, head_dim, length, head_dim, places=places)
    raise ShapeError("compression", kind, '"mean", "linear" or "mlp" is needed')
