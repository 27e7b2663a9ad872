"""What every cache is and does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._arguments import need_tensors, tensors_or_none
from foveal._errors import CacheError, DeviceError, DtypeError, ShapeError
from foveal.caches.checks import whole_numbers
from foveal.caches.view import View

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class KVShape:
    """The keys and values of one attention layer: batch sequences of kv_heads heads.

    Options: value_dim None is head_dim; dtype of the computation, and of the storage where it is not
    compressed; device as in PyTorch.
    Limits: batch, kv_heads, head_dim, value_dim of at least 1; a floating dtype.
    """

    batch: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        object.__setattr__(self, "device", _device(self.device))
        for name in ("batch", "kv_heads", "head_dim", "value_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CacheError(name, value, "an integer of at least 1 is needed")
        if self.dtype not in _DTYPES:
            raise DtypeError("dtype", self.dtype, "float64, float32, bfloat16 or float16 is needed")

    @property
    def values(self) -> int:
        """value_dim, filled in."""
        assert self.value_dim is not None
        return self.value_dim


def _device(device: torch.device | str) -> torch.device:
    """With its number, as tensors there have it."""
    try:
        named = torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise DeviceError("device", repr(device), "a device of PyTorch is needed") from error
    return torch.empty(0, device=named).device


@dataclass(frozen=True)
class Part:
    """One piece of what a decode reads: a view, and whether one sequence of it serves all queries.

    apart: makes a view of these tokens as every sequence's own, for queries that see different ones;
    behind: the fewest tokens that a sequence has behind a shared piece.
    """

    view: View
    shared: bool = False
    apart: Callable[[], View] | None = None
    behind: int = 0


class Cache(ABC):
    """Keys and values of one layer, for `decode`.

    A sequence holds `lengths` stored tokens in order of time and has seen `seen` tokens; they differ
    where tokens were evicted.  Both are int32 on the device; `host_lengths` and `host_seen` are the
    same numbers on the host.
    """

    shape: KVShape

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """int32 [batch, 1 or kv_heads]: tokens stored."""

    @property
    @abstractmethod
    def seen(self) -> Tensor:
        """int32 [batch]: tokens ever appended."""

    @property
    @abstractmethod
    def host_lengths(self) -> list[list[int]]:
        """`lengths` as lists."""

    @property
    @abstractmethod
    def host_seen(self) -> list[int]:
        """`seen` as a list."""

    @abstractmethod
    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        counts: Sequence[int] | None = None,
        last: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        """Stores L new tokens behind those of every sequence.

        Shapes: k [batch, L, kv_heads, head_dim], v [batch, L, kv_heads, value_dim], bias
        [batch, L, 1 or kv_heads].
        Options: counts, how many tokens of each row are stored, the first ones (the last ones with
        `last`), default all; bias, a logarithmic weight of each key, where the cache keeps one.
        Limits: raises OutOfPagesError with the cache as before when there is no room.
        """

    @abstractmethod
    def prepare(self, tokens: int = 1) -> None:
        """Makes room for `tokens` tokens per sequence that the replay of a CUDA graph will append."""

    @abstractmethod
    def free(self, sequences: Sequence[int] | None = None) -> None:
        """Empties sequences, all by default, and gives their room back."""

    @abstractmethod
    def keep(self, indices: Tensor) -> None:
        """Evicts all stored tokens but those named.

        Shapes: indices [batch, 1 or kv_heads, n], ascending places of stored tokens, -1 behind the last.
        """

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor]:
        """k [batch, L, kv_heads, head_dim] and v of the stored tokens, L the longest length; 0 behind."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes of storage in use."""

    @abstractmethod
    def capacity_bytes(self) -> int:
        """Bytes of storage taken from the device, in use or not."""

    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What `decode` reads, oldest tokens first."""

    def project(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries as the stored keys need them, and what that leaves out of every score of a query.

        Shapes: q [batch, Lq, Hq, head_dim]; the second, added to the scores, [batch, Lq, Hq].
        """
        return q, None

    def restore(self, o: Tensor, lse: Tensor) -> Tensor:
        """Outputs [batch, Lq, Hq, value_dim] of those over stored values, and of their lse."""
        return o


def check_append(
    shape: KVShape, k: Tensor, v: Tensor, counts: Sequence[int] | None, bias: Tensor | None
) -> None:
    """Raises for tensors that do not fit the cache."""
    need_tensors(k=k, v=v)
    tensors_or_none(bias=bias)
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (shape.batch, shape.kv_heads, shape.head_dim):
        needed = f"[{shape.batch}, L, {shape.kv_heads}, {shape.head_dim}]"
        raise ShapeError("k", list(k.shape), f"{needed} is needed")
    if tuple(v.shape) != (*k.shape[:3], shape.values):
        raise ShapeError("v", list(v.shape), f"{[*k.shape[:3], shape.values]} is needed")
    if bias is not None and (
        bias.dim() != 3 or bias.shape[:2] != k.shape[:2] or bias.shape[2] not in (1, k.shape[2])
    ):
        raise ShapeError("bias", list(bias.shape), f"{list(k.shape[:3])} is needed")
    for name, x in (("k", k), ("v", v), ("bias", bias)):
        if x is not None and x.device != shape.device:
            raise DeviceError(name, x.device, f"the device of the cache, {shape.device}, is needed")
        if x is not None and not x.is_floating_point():
            raise DtypeError(name, x.dtype, "a floating dtype is needed")
        if x is not None and name != "bias" and x.dtype != shape.dtype:
            raise DtypeError(name, x.dtype, f"the dtype of the cache, {shape.dtype}, is needed")
    if counts is not None:
        given = whole_numbers("counts", counts, shape.batch)
        if any(not 0 <= n <= k.shape[1] for n in given):
            raise CacheError(
                "counts", given, f"{shape.batch} numbers from 0 to {k.shape[1]} are needed"
            )


def check_shape(shape: object) -> None:
    """Raises where something else stands in the place of a `KVShape`."""
    if not isinstance(shape, KVShape):
        raise CacheError("shape", shape, "a foveal.caches.KVShape is needed")
