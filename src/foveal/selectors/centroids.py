"""S5: clusters of keys, found once, against every query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._errors import SelectionError
from foveal.selectors.base import Tiling, group_queries


@dataclass(frozen=True)
class Clusters:
    """Clusters of the keys of a prefix: centroids [B, Hkv, C, D], labels int64 [B, Hkv, L] and sizes."""

    centroids: Tensor
    labels: Tensor
    sizes: Tensor

    def shares(self, q: Tensor, scale: float | None = None) -> Tensor:
        """S_c = e^{q.C_c} / sum_c' N_c' e^{q.C_c'} for every query.  [B, Hq, Lq, C]

        The share of the softmax that one key of the cluster would take if all stood on their centroids.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        grouped = q.unflatten(2, (self.centroids.shape[1], -1))
        s = torch.einsum("bihgd,bhcd->bhgic", grouped, self.centroids.to(q.dtype)) * scale
        total = torch.logsumexp(
            s + self.sizes.to(s.dtype).log()[:, :, None, None], -1, keepdim=True
        )
        return torch.exp(s - total).flatten(1, 2)


def cluster(
    k: Tensor, count: int, *, steps: int = 10, generator: torch.Generator | None = None
) -> Clusters:
    """k-means of the keys k [B, L, Hkv, D] by cosine; a centroid is the mean of the keys themselves.

    Starts from `count` keys drawn by `generator`; an empty cluster keeps its direction and has size 0.
    Paper: Squeezed Attention (2411.09688).
    """
    if not 1 <= count <= k.shape[1]:
        raise SelectionError("count", count, f"1 to {k.shape[1]} clusters are needed")
    keys = k.detach().transpose(1, 2)  # [B, H, L, D]
    unit = F.normalize(keys, dim=-1)
    first = torch.randperm(k.shape[1], generator=generator)[:count].to(k.device)
    direction = unit[:, :, first]
    for _ in range(steps):
        labels = (unit @ direction.mT).argmax(-1)
        total, sizes = _sums(unit, labels, count)
        direction = torch.where((sizes > 0)[..., None], F.normalize(total, dim=-1), direction)
    labels = (unit @ direction.mT).argmax(-1)
    total, sizes = _sums(keys, labels, count)
    centroids = torch.where(
        (sizes > 0)[..., None], total / sizes.clamp(min=1)[..., None], direction
    )
    return Clusters(centroids, labels, sizes)


def _sums(x: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(*x.shape[:2], count, x.shape[3])
    total.scatter_add_(2, labels[..., None].expand_as(x), x)
    sizes = torch.zeros(*labels.shape[:2], count, dtype=torch.int64, device=x.device)
    return total, sizes.scatter_add_(2, labels, torch.ones_like(labels))


@dataclass(frozen=True, slots=True, eq=False)
class Centroids:
    """The largest share S_c that a query of the tile gives to a cluster with a key in the block.

    Options: clusters of all Lk keys; with `count`, they are found from the keys of the call.
    Paper: Squeezed Attention (2411.09688).
    """

    clusters: Clusters | None = None
    count: int = 64

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        found = self.clusters
        if found is None:
            found = cluster(k, min(self.count, k.shape[1]))
        shares = found.shares(group_queries(q, k).flatten(2, 3))  # [B, Hq, Lq, C]
        rows = F.pad(shares, (0, 0, 0, -tiling.Lq % tiling.q_block), value=-torch.inf)
        rows = rows.unflatten(2, (-1, tiling.q_block)).amax(3)
        groups = q.shape[2] // k.shape[2]
        labels = found.labels.repeat_interleave(groups, dim=1)
        keys = rows.gather(-1, labels[:, :, None].expand(-1, -1, rows.shape[2], -1))
        keys = F.pad(keys, (0, -tiling.Lk % tiling.kv_block), value=-torch.inf)
        result: Tensor = keys.unflatten(-1, (-1, tiling.kv_block)).amax(-1)
        return result
