"""Layers that only the informative blocks of tokens pass, in the forward and in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import SelectionError, ShapeError
from foveal._judged import judged, need_shape, need_square
from foveal._shares import share_of
from foveal.layers.trainable_sparse_blocks import pool_blocks, ranks
from foveal.patterns import Causal, Dense, Pattern
from foveal.scores import KeyBias, Score, Softmax


def kept_blocks(scores: Tensor, length: int, block: int, keep: float) -> tuple[Tensor, Tensor]:
    """Tokens of the best blocks in their order, int64 [B, n], and which of them are real, bool [B, n].

    Shapes: scores [B, ceil(length / block)]; of the blocks the share `keep` is kept, rounded up, ties to the
    earlier one.  Lists that hold the short last block end in tokens that are not real.
    """
    blocks = -(-length // block)
    if scores.shape[-1] != blocks:
        raise ShapeError("scores", list(scores.shape), f"one for each of {blocks} blocks is needed")
    if not 0 < keep <= 1:
        raise SelectionError("keep", keep, "a share in (0, 1] is needed")
    kept = ranks(scores.detach()) < share_of(blocks, keep)
    chosen = kept.nonzero()[:, 1].view(len(scores), -1)
    token = (chosen[..., None] * block + torch.arange(block, device=scores.device)).flatten(1)
    real = token < length
    most = int(real.sum(-1).max())
    return token[:, :most].clamp(max=length - 1), real[:, :most]


@judged
def lemo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    block: int = 64,
    keep: float = 0.5,
    causal: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Attention among the tokens of the best blocks; the others give and get nothing: o = 0.

    Shapes: q [B, L, Hq, D], k and v [B, L, Hkv, .], scores [B, ceil(L / block)], higher is kept.
    Options: keep, share of the blocks.
    Cost: keep^2 of dense, forward and backward; kept tokens are gathered.
    Limits: the choice has no gradient; `information_loss` trains what predicts the scores.
    Equals: keep = 1 is dense or causal attention.
    Paper: LeMo (2501.09767).
    """
    need_square(q, k)
    need_shape("scores", scores, (q.shape[0], -1), like=q)
    token, real = kept_blocks(scores, q.shape[1], block, keep)
    own_q, own_k, own_v = (_rows(x, token) for x in (q, k, v))
    pattern: Pattern = Causal() if causal else Dense()
    score: Score = Softmax()
    if not causal and not bool(real.all()):
        wide = torch.promote_types(q.dtype, torch.float32)
        hidden = torch.zeros(real.shape, dtype=wide, device=q.device)
        score = score + KeyBias(hidden.masked_fill(~real, -torch.inf)[:, None])
    o = attend(own_q, own_k, own_v, pattern, score, implementation=implementation)
    return _placed(torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]), o, token, real)


def _rows(x: Tensor, token: Tensor) -> Tensor:
    index = token.view(*token.shape, *[1] * (x.dim() - 2)).expand(*token.shape, *x.shape[2:])
    return x.gather(1, index)


def _placed(x: Tensor, rows: Tensor, token: Tensor, real: Tensor) -> Tensor:
    """x with rows at tokens; what is not real is written behind the end and cut."""
    place = torch.where(real, token, x.shape[1])
    index = place.view(*place.shape, *[1] * (x.dim() - 2)).expand(*place.shape, *x.shape[2:])
    longer = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1)
    return longer.scatter(1, index, rows.to(x.dtype))[:, :-1]


def block_information(q: Tensor, k: Tensor, block: int = 64, causal: bool = True) -> Tensor:
    """The share of the attention of all queries and heads that falls on each block.  [B, blocks]

    What a predictor should say of a block; no L x L map is formed.
    """
    with torch.no_grad():
        owner = torch.arange(k.shape[1], device=k.device) // block
        one_hot = torch.nn.functional.one_hot(owner, -(-k.shape[1] // block)).to(k.dtype)
        v = one_hot[None, :, None].expand(*k.shape[:3], -1)
        return attend(q, k, v, Causal() if causal else Dense()).mean((1, 2))


def information_loss(scores: Tensor, information: Tensor) -> Tensor:
    """Mean over sequences of KL(information || softmax of scores)."""
    log = torch.log_softmax(scores, dim=-1)
    known = torch.where(information > 0, information, 1.0).log()
    return (information * (known - log)).sum(-1).mean()


class LessTokens(nn.Module):
    """A layer that the best blocks of tokens pass: y = layer(x) at theirs, x elsewhere.

    Scores come from a small net on the mean of every block; it learns by `information_loss(layer.scores(x),
    block_information(q, k))`, not from what passes.
    Shapes: x and y [B, L, dim].
    Options: layer, called with the kept tokens [B, n, dim], and with their places int64 [B, n] where
    places is set; it must be causal in them, or block divide L.
    Cost: keep of the layer's products, keep^2 of its attention, in both directions.
    """

    def __init__(
        self,
        layer: nn.Module,
        dim: int,
        *,
        block: int = 64,
        keep: float = 0.5,
        hidden: int = 32,
        places: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.block, self.keep, self.places = layer, block, keep, places
        self.predictor = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def scores(self, x: Tensor) -> Tensor:
        """[B, blocks]"""
        pooled = pool_blocks(x.detach()[:, :, None], self.block)[:, :, 0]
        found: Tensor = self.predictor(pooled)[..., 0]
        return found

    def forward(self, x: Tensor) -> Tensor:
        token, real = kept_blocks(self.scores(x), x.shape[1], self.block, self.keep)
        rows = _rows(x, token)
        more: tuple[Any, ...] = (token,) if self.places else ()
        return _placed(x, self.layer(rows, *more), token, real)


@judged
def representation_shift_tokens(before: Tensor, after: Tensor, *, keep: float = 0.5) -> Tensor:
    """The tokens that a layer moved most, in their order: |after_i - before_i| decides.  [B, n, dim]

    Shapes: before and after [B, L, dim], what a layer got and gave; n is the share `keep` of L, rounded up.
    Cost: one pass over both; needs no attention map and goes with every kernel.
    Equals: keep = 1 is `after`.
    Paper: representation shift (2508.00367).
    """
    from foveal.layers.trainable_sparse_tokens import drop_tokens, representation_shift

    need_shape("before", before, (-1, -1, -1), like=after)
    need_shape("after", after, tuple(before.shape), like=before)
    return drop_tokens(after, representation_shift(before, after), keep)[0]
