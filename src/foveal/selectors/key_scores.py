"""S10: a score per key that no query decides."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from foveal._errors import SelectionError
from foveal.selectors.base import Tiling


@dataclass(frozen=True, slots=True, eq=False)
class KeyScores:
    """The largest of the values of a block's keys, the same for every tile.

    Shapes: values [B, heads, Lk], heads 1, the key heads or the query heads.
    Paper: the scores of SPARSEK (2406.16747), NOSA (2510.13602) and learned eviction (2510.20787).
    """

    values: Tensor

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        if self.values.shape[-1] != tiling.Lk:
            raise SelectionError("values", list(self.values.shape), f"a score for {tiling.Lk} keys")
        padded = F.pad(self.values, (0, -tiling.Lk % tiling.kv_block), value=-float("inf"))
        blocks = padded.unflatten(-1, (-1, tiling.kv_block)).amax(-1)
        result: Tensor = blocks[:, :, None].expand(-1, -1, tiling.q_blocks, -1)
        return result
