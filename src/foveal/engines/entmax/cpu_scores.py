"""The weights of one tile of the CPU edition, and the gradient of its scores."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from foveal.engines.entmax.solve import threshold
from foveal.engines.tile.cpu_scores import Scorer, Weights
from foveal.engines.tile.walk import Tile
from foveal.scores.entmax import EntmaxForm


class EntmaxScorer(Scorer):
    """alpha-entmax in the place of the softmax."""

    @property
    def _alpha(self) -> float:
        alpha = cast(EntmaxForm, self.task.score).alpha
        assert not isinstance(alpha, Tensor)
        return alpha

    def weights(self, tile: Tile, q: Tensor, k: Tensor) -> Weights:
        """Weights of q [M, G rows, D] on k [M, D, columns]; they live in the scratch."""
        shape = (q.shape[0], q.shape[1], k.shape[2])
        products = self.scratch.take("scores", shape, q.dtype)
        rate = self._alpha - 1
        torch.baddbmm(products, q, k, beta=0, alpha=self.task.score.scale * rate, out=products)
        z = products.view(len(q), -1, tile.height, k.shape[2])
        hidden = self._hide(tile, z)
        tau = threshold(z, 1 / rate)
        z.sub_(tau).clamp_min_(0.0)
        if rate != 1:
            z.pow_(1 / rate)
        return Weights(z, None, hidden, None)

    def score_gradient(self, weights: Weights, products: Tensor, dlse: Tensor) -> Tensor:
        """dS = u (dP - sum u dP / sum u) with u = p ^ (2 - alpha), in the place of dP."""
        ds = products.view(weights.values.shape)
        u = torch.where(weights.values > 0, weights.values ** (2 - self._alpha), 0.0)
        total = u.sum(-1, keepdim=True)
        shift = (u * ds).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        return ds.sub_(shift).mul_(u)
