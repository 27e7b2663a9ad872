"""Terms added to the product of a pair: per pair, per key, by distance, from a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveal._errors import ScoreError
from foveal.scores.base import Additive, Geometry


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    return len(shape) == len(target) and all(
        n in (1, t) for n, t in zip(shape, target, strict=True)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Bias(Additive):
    """s_ij += tensor[b, h, i, j].

    Shapes: tensor [B or 1, Hq or 1, Lq or 1, Lk or 1], any floating dtype.
    """

    argument: ClassVar[str] = "Bias"
    tensor: Tensor

    @property
    def parameter(self) -> Tensor:
        return self.tensor

    def validate(self, geometry: Geometry) -> None:
        target = (geometry.batch, geometry.q_heads, geometry.extent.Lq, geometry.extent.Lk)
        if not _broadcasts(self.tensor.shape, target):
            raise ScoreError(
                "Bias", list(self.tensor.shape), f"what broadcasts to {list(target)} is needed"
            )

    def values(self, parameter: Tensor, q_tokens: Tensor, k_tokens: Tensor, at: Geometry) -> Tensor:
        rows = q_tokens if parameter.shape[2] > 1 else q_tokens[:1, :1] * 0
        columns = k_tokens if parameter.shape[3] > 1 else k_tokens[:1, :1] * 0
        return parameter[:, :, rows[:, :, None], columns[:, None, :]].transpose(1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class KeyBias(Additive):
    """s_ij += tensor[b, h, j]: a log-weight of every key.

    Shapes: tensor [B or 1, 1 or Hkv or Hq, Lk].
    Equals: KeyBias(log w) weighs key j by w_j in the numerator and the denominator.
    """

    argument: ClassVar[str] = "KeyBias"
    tensor: Tensor

    @property
    def parameter(self) -> Tensor:
        return self.tensor

    def validate(self, geometry: Geometry) -> None:
        shape = self.tensor.shape
        heads = {1, geometry.kv_heads, geometry.q_heads}
        fits = len(shape) == 3 and shape[0] in (1, geometry.batch) and shape[1] in heads
        if not fits or shape[2] != geometry.extent.Lk:
            raise ScoreError(
                "KeyBias",
                list(shape),
                f"[{geometry.batch} or 1, one of {sorted(heads)}, {geometry.extent.Lk}] is needed",
            )

    def values(self, parameter: Tensor, q_tokens: Tensor, k_tokens: Tensor, at: Geometry) -> Tensor:
        if parameter.shape[1] not in (1, at.q_heads):
            parameter = parameter.repeat_interleave(at.q_heads // at.kv_heads, dim=1)
        return parameter[:, :, k_tokens].transpose(1, 2)[:, :, :, None]


@dataclass(frozen=True, slots=True, eq=False)
class Alibi(Additive):
    """s_ij -= slopes[h] * |i - j|, distances in tokens between absolute positions.

    Shapes: slopes [Hq].
    Paper: Train Short, Test Long (2108.12409).
    """

    argument: ClassVar[str] = "slopes"
    slopes: Tensor

    @property
    def parameter(self) -> Tensor:
        return self.slopes

    def validate(self, geometry: Geometry) -> None:
        if tuple(self.slopes.shape) != (geometry.q_heads,):
            raise ScoreError(
                "slopes",
                list(self.slopes.shape),
                f"one slope per query head, [{geometry.q_heads}], is needed",
            )
        if len(geometry.extent.kv_grid) > 1:
            raise ScoreError(
                "Alibi", f"a grid {geometry.extent.kv_grid}", "a sequence of one axis is needed"
            )

    def values(self, parameter: Tensor, q_tokens: Tensor, k_tokens: Tensor, at: Geometry) -> Tensor:
        q_pos = q_tokens + (at.extent.Lk - at.extent.Lq)
        distance = (q_pos[:, :, None] - k_tokens[:, None, :]).abs()
        # Tokens may be named on the CPU where the slopes are on a GPU.
        return (-parameter[:, None, None] * distance[:, None].to(parameter))[None]


@dataclass(frozen=True, slots=True, eq=False)
class RelativeBias(Additive):
    """s_ij += table[h, offset(i, j) + reach], offsets per axis from query to key in pattern steps.

    Shapes: table [Hq or 1, 2 reach + 1 per axis]; for a Neighborhood or Partition of window w a table of
    2 w - 1 per axis, as in the original neighborhood attention and in Swin.  A step is a token, or
    `dilation` tokens for a dilated Neighborhood.
    Limits: the table must reach every offset that the pattern allows.
    Paper: Neighborhood Attention Transformer (2204.07143), Swin Transformer (2103.14030).
    """

    argument: ClassVar[str] = "table"
    table: Tensor

    @property
    def parameter(self) -> Tensor:
        return self.table

    def validate(self, geometry: Geometry) -> None:
        rank, shape = len(geometry.extent.kv_grid), self.table.shape
        if (
            len(shape) != rank + 1
            or shape[0] not in (1, geometry.q_heads)
            or any(n % 2 == 0 for n in shape[1:])
        ):
            raise ScoreError(
                "table",
                list(shape),
                f"[{geometry.q_heads} or 1] and an odd size for each of the {rank} axes are needed",
            )
        for axis, (size, reach) in enumerate(
            zip(shape[1:], geometry.pattern.reach(geometry.extent), strict=True)
        ):
            if size < 2 * reach + 1:
                raise ScoreError(
                    "table",
                    list(shape),
                    f"axis {axis} needs {2 * reach + 1} entries: the pattern reaches {reach} steps",
                )

    def values(self, parameter: Tensor, q_tokens: Tensor, k_tokens: Tensor, at: Geometry) -> Tensor:
        q_pos = q_tokens[:, :, None] + (at.extent.Lk - at.extent.Lq)
        offsets = at.pattern.offsets(q_pos, k_tokens[:, None, :], at.extent)
        index = torch.zeros((), dtype=torch.int64)
        for size, offset in zip(parameter.shape[1:], offsets, strict=True):
            index = index * size + (offset + size // 2).clamp(0, size - 1)
        return parameter.flatten(1)[:, index].transpose(0, 1)[None]
