"""Keys that are seen from their own place on, each until a place of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._errors import SelectionError
from foveal.patterns.base import FULL, PARTIAL, Extent, Pattern, for_heads


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Lifetimes(Pattern):
    """Query t sees key j while j <= t <= ends[j].

    Shapes: ends int64 [B or 1, heads, Lk], the last position that sees a key, per head; heads is 1, the key
    heads or the query heads.  An end before j hides the key.
    Equals: ends of Lk and more are Causal(), ends j + w - 1 are Sliding(w - 1).
    Cost: of the tiles that a key lives through.
    Paper: token types of Neural Attention Search (2502.13251).
    """

    ends: Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        need_tensors(ends=self.ends)
        ends = self.ends
        if ends.dim() != 3 or ends.is_floating_point() or ends.dtype == torch.bool:
            raise SelectionError("ends", list(ends.shape), "integers [B, heads, Lk] are needed")
        object.__setattr__(self, "ends", ends.detach().to(torch.int64))
        content = self.ends.cpu().contiguous().numpy().tobytes()
        object.__setattr__(self, "digest", hashlib.sha1(content).hexdigest())

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Lifetimes) and self.digest == other.digest
        return same and isinstance(other, Lifetimes) and self.ends.shape == other.ends.shape

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def key(self) -> str:
        shape = "x".join(str(size) for size in self.ends.shape)
        return f"Lifetimes({shape} #{self.digest[:8]})"

    @property
    def depends_on_data(self) -> bool:
        return True

    def validate(self, extent: Extent) -> None:
        if self.ends.shape[-1] != extent.Lk:
            needed = f"an end for each of {extent.Lk} keys is needed"
            raise SelectionError("ends", list(self.ends.shape), needed)

    def validate_lists(self, batch: int, q_heads: int, kv_heads: int) -> None:
        shape = self.ends.shape
        if shape[0] not in (1, batch) or shape[1] not in (1, kv_heads, q_heads):
            needed = f"a batch of {batch} or 1 and ends for 1, {kv_heads} or {q_heads} heads"
            raise SelectionError("ends", list(shape), needed)

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        ends = self.ends[:, :, k_pos.to(self.ends.device)].to(k_pos.device)
        return (k_pos <= q_pos) & (q_pos <= ends)

    def allows_listed(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        shape = [max(pair) for pair in zip(self.ends.shape[:2], k_pos.shape[:2], strict=True)]
        places = for_heads(k_pos, shape[1], 1).expand(*shape, -1)
        ends = for_heads(self.ends.to(k_pos.device), shape[1], 1).expand(*shape, -1)
        ends = ends.gather(-1, places)[:, :, None]
        places, query = places[:, :, None], q_pos[:, None]
        return (places <= query) & (query <= ends)

    def tile_unit(self) -> tuple[int, int]:
        return 64, 64

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        shift = extent.Lk - extent.Lq
        first = torch.arange(0, extent.Lq, q_tile, device=self.ends.device)
        last = (first + q_tile).clamp(max=extent.Lq) - 1 + shift
        first = (first + shift)[:, None]
        last = last[:, None]
        place = torch.arange(extent.Lk, device=self.ends.device)
        behind = -extent.Lk % kv_tile

        def tiles(x: Tensor, fill: int) -> Tensor:
            padded = torch.nn.functional.pad(x, (0, behind), value=fill)
            cut: Tensor = padded.unflatten(-1, (-1, kv_tile))
            return cut

        # A key takes part in a tile of queries if it is born before its end and dies behind its start.
        until = torch.where(self.ends < place, -1, self.ends)
        latest = tiles(until, -1).amax(-1)[:, :, None]
        earliest = tiles(until, extent.Lk + extent.Lq).amin(-1)[:, :, None]
        born = torch.arange(0, extent.Lk, kv_tile, device=self.ends.device)
        grown = (born + kv_tile).clamp(max=extent.Lk) - 1
        some = (born <= last) & (latest >= first)
        whole = (grown <= first) & (earliest >= last)
        return some.to(torch.uint8) * PARTIAL + (some & whole).to(torch.uint8) * (FULL - PARTIAL)
