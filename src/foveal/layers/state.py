"""What layers with a state share: the state, packed sequences, short convolutions."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._arguments import tensors_or_none
from foveal._errors import OptionError, PackingError, ShapeError
from foveal._scan import State
from foveal.layers.heads import need_tokens


class LayerState(NamedTuple):
    """What a layer keeps of the tokens so far: `tails` beside its memory, all with sequences first.

    Tails are the last inputs of short convolutions, keys and values, or counts of tokens.
    """

    tails: tuple[Tensor, ...]
    memory: State = ()

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, tails first."""
        memory = (self.memory,) if isinstance(self.memory, Tensor) else self.memory
        return (*self.tails, *memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerState:
        """The state with every tensor changed."""
        tails = tuple(change(x) for x in self.tails)
        if isinstance(self.memory, Tensor):
            return LayerState(tails, change(self.memory))
        return LayerState(tails, tuple(change(x) for x in self.memory))


class StateLayer(nn.Module, ABC):
    """A layer y, state = layer(x, state): a sequence may come in pieces, several in one tensor.

    Shapes: x and y [B, L, dim]; with cu_seqlens int32 [N + 1], B = 1 and N sequences one behind the
    other, else N = B; the state holds N sequences.
    Options: heads divide dim; return_state returns (y, state after x), else y alone.
    Equals: any cut of x in two calls that pass the state; packed, each sequence alone.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.dim = dim
        self.heads = heads

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        self.judge(x, state, cu_seqlens)
        y, state = self.mix(x, state, cu_seqlens)
        return (y, state) if return_state else y

    def judge(self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> None:
        """Raises for arguments of a call that do not fit the layer or each other."""
        shape = "[B, L, {dim}]"
        need_tokens(self, x, self.dim, shape)
        if x.dim() != 3:
            raise ShapeError("x", list(x.shape), f"{shape.format(dim=self.dim)} is needed")
        tensors_or_none(cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            _need_offsets(cu_seqlens)
            if len(x) != 1:
                needed = "with cu_seqlens, a batch of 1 is needed"
                raise PackingError("x", f"batch {len(x)}", needed)
        if state is not None and not isinstance(state, LayerState):
            raise OptionError("state", f"a {type(state).__name__}", "a LayerState is needed")
        _need_sequences(state, len(x) if cu_seqlens is None else len(cu_seqlens) - 1)

    @abstractmethod
    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """y and the state after x."""

    def split(self, x: Tensor) -> Tensor:
        """[B, L, heads, D] of [B, L, heads * D]"""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads


def _need_sequences(state: LayerState | None, count: int) -> None:
    """Raises for the state of another number of sequences."""
    for part in () if state is None else state.tensors():
        if len(part) != count:
            needed = f"the state of {count} sequences is needed"
            raise ShapeError("state", f"one of {len(part)} sequences", needed)


def _need_offsets(cu_seqlens: Tensor) -> None:
    whole = not cu_seqlens.is_floating_point() and cu_seqlens.dtype != torch.bool
    if not whole or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        came = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise PackingError("cu_seqlens", came, "integers [N + 1] are needed")


def sequence_lengths(x: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Tokens of each sequence in x [B, L, ...]."""
    if cu_seqlens is None:
        return [x.shape[1]] * x.shape[0]
    _need_offsets(cu_seqlens)
    offsets = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != x.shape[1] or min(lengths, default=0) < 0:
        raise PackingError("cu_seqlens", offsets, f"ascending from 0 to {x.shape[1]} is needed")
    return lengths


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[Tensor]:
    """Each sequence [L_n, ...] of x [B, L, ...]."""
    if cu_seqlens is None:
        return iter(x.unbind(0))
    return iter(x[0].split(sequence_lengths(x, cu_seqlens)))


def beside(rows: Sequence[Tensor]) -> Tensor:
    """[N, most, ...] of rows [L_n, ...], zeros in front of the shorter ones."""
    most = max((len(row) for row in rows), default=0)
    padded = [torch.cat([row.new_zeros(most - len(row), *row.shape[1:]), row]) for row in rows]
    return torch.stack(padded)


def one_by_one(
    x: Tensor,
    state: LayerState | None,
    cu_seqlens: Tensor | None,
    run: Callable[[Tensor, LayerState | None], tuple[Tensor, LayerState]],
) -> tuple[Tensor, LayerState]:
    """`run` on each sequence alone, [1, L_n, dim], for layers whose work depends on where it stands."""
    outputs, states = [], []
    for n, row in enumerate(sequences(x, cu_seqlens)):
        before = None if state is None else state.map(lambda part, n=n: part[n : n + 1])  # type: ignore[misc]
        y, after = run(row[None], before)
        outputs.append(y)
        states.append(after)
    y = torch.cat(outputs, dim=0 if cu_seqlens is None else 1) if outputs else x
    return y, joined_states(states)


def joined_states(states: Sequence[LayerState]) -> LayerState:
    """The states of single sequences as one; shorter tails get zeros in front."""

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        if parts[0].dim() == 1:
            return torch.cat(parts)
        return beside([part[0] for part in parts])

    tails = tuple(join(parts) for parts in zip(*(each.tails for each in states), strict=True))
    memories = [
        each.memory if isinstance(each.memory, tuple) else (each.memory,) for each in states
    ]
    memory = tuple(join(parts) for parts in zip(*memories, strict=True))
    alone = isinstance(states[0].memory, Tensor)
    return LayerState(tails, memory[0] if alone else memory)


def ragged(seen: Tensor, size: int) -> bool:
    """Whether sequences stand at different places of their runs of `size` tokens."""
    return bool((seen % size != seen[:1] % size).any())


def unequal(seen: Tensor) -> bool:
    """Whether sequences have seen different numbers of tokens."""
    return bool((seen != seen[:1]).any())


def place_of(seen: Tensor) -> int:
    """Tokens that every sequence has seen, where all have seen as many; 0 for an empty batch."""
    return int(seen[:1].sum())


def positions(x: Tensor, seen: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places of the tokens in their sequences [B, L], and tokens seen after them, int64 [N].

    `seen` counts the tokens before x; both counts lie on the CPU, where no device waits for them.
    """
    lengths = torch.tensor(sequence_lengths(x, cu_seqlens), dtype=torch.int64)
    before = torch.zeros_like(lengths) if seen is None else seen.cpu()
    if cu_seqlens is None:
        places = torch.arange(x.shape[1], device=x.device)[None]
        if seen is not None:
            places = places + before.to(x.device)[:, None]
        return places.expand(len(x), -1), before + lengths
    rows = [
        start + torch.arange(n) for start, n in zip(before.tolist(), lengths.tolist(), strict=True)
    ]
    return torch.cat(rows)[None].to(x.device), before + lengths


class ShortConvolution(nn.Module):
    """y_t = silu(sum_i w_i x_{t-size+1+i}), i = 0, ..., size - 1, for each channel.

    Shapes: x and y [B, L, dim]; tail [N, size - 1, dim], the last tokens before x, zeros by default;
    cu_seqlens as for `StateLayer`.
    """

    def __init__(self, dim: int, size: int = 4) -> None:
        super().__init__()
        if size < 1:
            raise ShapeError("conv", size, "at least 1 token is needed")
        self.filter = nn.Parameter(torch.empty(dim, 1, size).uniform_(-(size**-0.5), size**-0.5))

    def forward(
        self, x: Tensor, tail: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y, and the tail after x."""
        reach = self.filter.shape[-1] - 1
        lengths = sequence_lengths(x, cu_seqlens)
        if tail is None:
            tail = x.new_zeros(len(lengths), reach, x.shape[-1])
        if cu_seqlens is None:
            x = torch.cat([tail, x], dim=1)
            return self._filtered(x), x[:, x.shape[1] - reach :]
        pieces = [
            part for pair in zip(tail, sequences(x, cu_seqlens), strict=True) for part in pair
        ]
        whole = torch.cat(pieces) if pieces else x[0]
        ends = torch.tensor(lengths, dtype=torch.int64).add(reach).cumsum(0)
        last = ends[:, None] - reach + torch.arange(reach)
        own = torch.ones(len(whole), dtype=torch.bool)
        for start, n in zip(ends.tolist(), lengths, strict=True):
            own[start - n - reach : start - n] = False
        padded = self._filtered(F.pad(whole, (0, 0, reach, 0))[None])
        return padded[:, own.to(x.device)], whole[last.to(x.device)]

    def _filtered(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.filter.shape[-1]:
            return x[:, :0]
        return F.silu(F.conv1d(x.mT, self.filter, groups=x.shape[-1]).mT)
