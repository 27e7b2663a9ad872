"""What programs leave of segments that they did not hold whole, and the launch that merges it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.caches.view import View
from foveal.engines.common.early import starts_early
from foveal.engines.decode.merge import decode_merge_forward
from foveal.engines.decode.problem import Terms
from foveal.engines.tile.replay import launch


@dataclass(frozen=True)
class Parts:
    """Sums, largest scores (base 2) and totals [2 programs, rows, value_dim or none] of `programs`."""

    programs: int
    rows: int
    keys: int
    sums: Tensor
    largest: Tensor
    totals: Tensor

    @classmethod
    def of(cls, programs: int, rows: int, keys: int, value_dim: int, device: torch.device) -> Parts:
        """Room for parts of tiles of `rows` rows and `keys` keys."""
        size = (2 * programs, rows)
        made = [torch.empty(s, device=device) for s in ((*size, value_dim), size, size)]
        return cls(programs, rows, keys, *made)


def split_options(view: View, terms: Terms, groups: int, parts: Parts) -> dict[str, Any]:
    """The constants by which both kernels find the same shares."""
    per_unit = view.lengths.shape[1]
    return {
        "WINDOW": terms.left is not None,
        "UNITS_PAD": max(power(view.batch * per_unit), 16),
        "UNITS_PER_SEQUENCE": per_unit,
        "HEADS": view.kv_heads,
        "GROUPS": groups,
        "ROWS": parts.rows,
        "KV_TILE": parts.keys,
        "DV": view.value_dim,
        "EARLY": starts_early(view.lengths.device),
    }


def merge_parts(
    view: View, terms: Terms, o: Tensor, lse: Tensor, parts: Parts, lean: bool = False
) -> None:
    """Launches the kernel that turns parts into o [B, Lq, Hq, Dv] and lse [B, Lq, Hq]."""
    Lq, groups = o.shape[1], o.shape[2] // view.kv_heads
    rows, segments = Lq * groups, view.batch * view.kv_heads
    in_parts = parts.programs // (segments * -(-rows // parts.rows)) + 2
    merged = min(max(power(in_parts), 4), 64)
    together = min(max(64 // merged, 1), 4, power(rows))
    shared = split_options(view, terms, groups, parts)
    launch(
        decode_merge_forward,
        (segments * -(-rows // together),),
        *(view.lengths, view.after, terms.sink, o, lse, parts.sums, parts.largest, parts.totals),
        *(view.lengths.numel(), Lq, terms.left or 0, terms.sink_tokens, parts.programs, int(lean)),
        DV_PAD=max(power(view.value_dim), 16),
        PARTS=merged,
        TOGETHER=together,
        num_warps=4,
        **shared,
        **({"launch_pdl": True} if shared["EARLY"] else {}),
    )


def power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
