"""The memory of Titans, and its three ways to work beside attention."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._attend import attend
from foveal._errors import OptionError, ShapeError
from foveal._scan import State, scan
from foveal.compose import merge
from foveal.engines.state.deep import Gates, Network, recalled, scan_network
from foveal.layers.causal import attend_on
from foveal.layers.state import (
    LayerState,
    ShortConvolution,
    StateLayer,
    one_by_one,
    place_of,
    ragged,
)
from foveal.patterns import Causal
from foveal.rules import TwoState


class TitansMemory(StateLayer):
    """y = W_o RMSNorm_head(o), o by `TwoState`: a memory trained while it reads.

    q and k are unit vectors after silu of a short convolution, v likewise without the norm; forgetting,
    momentum and step size are sigmoids of maps of x.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: chunk as for `TwoState`; momentum=False leaves the second state at what was written last;
    largest_write bounds twice the step size; depth matrices [dim / heads, hidden], ..., [hidden,
    dim / heads] with silu between them make the memory, 1 for a linear one, which starts empty; a
    deeper one starts from learned matrices.  hidden None is twice dim / heads.
    Limits: with chunk > 1 steps are taken from an old memory; largest_write x chunk far above 1 can
    make it diverge.  A deep memory wants chunk > 1: its runs are worked through one after the other.
    Equals: any cut of x in two calls that pass the state.
    Paper: Titans (2501.00663).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        chunk: int = 1,
        momentum: bool = True,
        largest_write: float = 1.0,
        conv: int = 4,
        depth: int = 1,
        hidden: int | None = None,
    ) -> None:
        super().__init__(dim, heads)
        if depth < 1:
            raise ShapeError("depth", depth, "at least 1 is needed")
        if depth > 1 and hidden is not None and hidden < 1:
            raise ShapeError("hidden", hidden, "at least 1 is needed")
        if largest_write < 0:
            raise OptionError("largest_write", largest_write, "at least 0 is needed")
        self.rule = TwoState(chunk)
        own = dim // heads
        widths = [own, *[2 * own if hidden is None else hidden] * (depth - 1), own]
        self.first = nn.ParameterList(
            nn.Parameter(torch.randn(heads, wide, to) * wide**-0.5)
            for wide, to in (() if depth == 1 else itertools.pairwise(widths))
        )
        self.largest_write = largest_write
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.q_conv, self.k_conv, self.v_conv = (ShortConvolution(dim, conv) for _ in range(3))
        self.keep, self.write = nn.Linear(dim, heads), nn.Linear(dim, heads)
        self.momentum = nn.Linear(dim, heads) if momentum else None
        self.norm = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.constant_(self.keep.bias, 4.0)  # forgets 2 % of the memory with a token
        nn.init.constant_(self.write.bias, -1.0)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if len(self.first) and (
            cu_seqlens is not None
            or (state is not None and ragged(_places(state), self.rule.chunk))
        ):
            return one_by_one(x, state, cu_seqlens, lambda row, own: self.mix(row, own, None))
        tails = (None,) * 3 if state is None else state.tails
        q, q_tail = self.q_conv(self.q(x), tails[0], cu_seqlens)
        k, k_tail = self.k_conv(self.k(x), tails[1], cu_seqlens)
        v, v_tail = self.v_conv(self.v(x), tails[2], cu_seqlens)
        q, k = (F.normalize(self.split(y), dim=-1) for y in (q, k))
        log_decay = F.logsigmoid(self.keep(x))
        write_gate = self.largest_write * torch.sigmoid(self.write(x))
        log_momentum = None if self.momentum is None else F.logsigmoid(self.momentum(x))
        before = None if state is None else state.memory
        if len(self.first):
            momentum = None if log_momentum is None else log_momentum.mT[..., None]
            gates = Gates(log_decay.mT[..., None], momentum, write_gate.mT[..., None])
            memory: State
            o, memory = self._deep(q, k, self.split(v), gates, before)
        else:
            o, memory = scan(
                q, k, self.split(v), self.rule, log_decay=log_decay, write_gate=write_gate,
                log_momentum=log_momentum, scale=1.0, initial_state=before, return_state=True,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
        return self._join(o), LayerState((q_tail, k_tail, v_tail), memory)

    def _deep(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, before: State | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """o [B, L, H, D] and the state: memory, momentum, anchor and tokens of the open run."""
        chunk, depth = self.rule.chunk, len(self.first)
        if before is None:
            memory = tuple(m.expand(len(q), *m.shape) for m in self.first)
            network, place = Network(memory, tuple(map(torch.zeros_like, memory)), memory), 0
        else:
            parts = [tuple(before[depth * i : depth * (i + 1)]) for i in range(3)]
            network, place = Network(*parts), int(before[-1][:1].sum()) % chunk
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        o, network = scan_network(q, k, v, gates, network, place, chunk)
        places = torch.full((len(q),), (place + q.shape[2]) % chunk, device=q.device)
        return o.transpose(1, 2), (*itertools.chain(*network), places)

    def recall(self, x: Tensor, state: LayerState | None) -> Tensor:
        """What the memory of a state gives for x [B, L, dim], without learning from it."""
        if state is None:
            return torch.zeros_like(x)
        q, _ = self.q_conv(self.q(x), state.tails[0])
        q = F.normalize(self.split(q), dim=-1).transpose(1, 2)
        memory = [m.to(q.dtype) for m in state.memory[: max(len(self.first), 1)]]
        return self._join(recalled(memory, q).transpose(1, 2))

    def _join(self, o: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(o).flatten(-2))
        return y


def _places(state: LayerState) -> Tensor:
    """Tokens of the open run of each sequence, of a deep memory."""
    return state.memory[-1]


class _WithMemory(StateLayer):
    """Projections of attention, persistent tokens and a memory."""

    def __init__(self, dim: int, heads: int, persistent: int, memory: TitansMemory | None) -> None:
        super().__init__(dim, heads)
        memory = TitansMemory(dim, heads) if memory is None else memory
        if not isinstance(memory, TitansMemory):
            raise OptionError("memory", f"a {type(memory).__name__}", "a TitansMemory is needed")
        if memory.dim != dim:
            raise ShapeError("memory", f"one of dim {memory.dim}", f"the dim {dim} is needed")
        self.memory = memory
        self.persistent = nn.Parameter(0.02 * torch.randn(persistent, dim))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def _attend(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor, Tensor] | None,
        cu_seqlens: Tensor | None,
        window: int,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Attention in a window and to the persistent tokens."""
        q, k, v = (self.split(y) for y in self.qkv(x).chunk(3, dim=-1))
        _, keys, values = (self.split(y) for y in self.qkv(self.persistent).chunk(3, dim=-1))
        context = (keys, values) if len(self.persistent) else None
        o, kept = attend_on(q, k, v, past, cu_seqlens, window, context)
        return self.out(o.flatten(-2)), kept


def _past(tails: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return tails[0], tails[1], tails[2]


class TitansMAG(_WithMemory):
    """y = RMSNorm(attention(x)) * sigmoid(RMSNorm(memory(x))): a window gated by the memory.

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: window counts the tokens that attention sees, `persistent` learned tokens beside them;
    memory None is `TitansMemory(dim, heads)`.
    Equals: any cut of x in two calls that pass the state.
    Paper: Titans (2501.00663), memory as a gate; the paper leaves the gate's non-linearity open.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 64,
        persistent: int = 4,
        memory: TitansMemory | None = None,
    ) -> None:
        super().__init__(dim, heads, persistent, memory)
        self.window = window
        self.norms = nn.ModuleList((nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)))

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        past = None if state is None else _past(state.tails)
        before = None if state is None else LayerState(state.tails[3:], state.memory)
        near, kept = self._attend(x, past, cu_seqlens, self.window)
        far, memory = self.memory.mix(x, before, cu_seqlens)
        y = self.norms[0](near) * torch.sigmoid(self.norms[1](far))
        return y, LayerState((*kept, *memory.tails), memory.memory)


class TitansMAL(_WithMemory):
    """y = attention(x + memory(x)): the memory is a layer below attention in a window.

    Shapes, options: as for `TitansMAG`.
    Equals: any cut of x in two calls that pass the state.
    Paper: Titans (2501.00663), memory as a layer.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 64,
        persistent: int = 4,
        memory: TitansMemory | None = None,
    ) -> None:
        super().__init__(dim, heads, persistent, memory)
        self.window = window
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        past = None if state is None else _past(state.tails)
        before = None if state is None else LayerState(state.tails[3:], state.memory)
        far, memory = self.memory.mix(x, before, cu_seqlens)
        y, kept = self._attend(self.norm(x + far), past, cu_seqlens, self.window)
        return y, LayerState((*kept, *memory.tails), memory.memory)


class TitansMAC(_WithMemory):
    """y = a * sigmoid(RMSNorm(memory(a))), a = attention in segments that also see what memory recalls.

    A segment of `segment` tokens asks the memory as it was before the segment, h_j for token j; token i
    attends to the persistent tokens and to h_j and x_j of its segment, j <= i; the memory then learns
    from the attended tokens a.
    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: persistent and memory as for `TitansMAG`.
    Cost: the state holds the tokens of the open segment, which are worked through again with each piece.
    Equals: any cut of x in two calls that pass the state; later tokens change nothing.
    Paper: Titans (2501.00663), memory as a context.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        segment: int = 64,
        persistent: int = 4,
        memory: TitansMemory | None = None,
    ) -> None:
        super().__init__(dim, heads, persistent, memory)
        if segment < 1:
            raise ShapeError("segment", segment, "at least 1 is needed")
        self.segment = segment
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if cu_seqlens is not None or (state is not None and ragged(state.tails[1], self.segment)):
            return one_by_one(x, state, cu_seqlens, self._segments)
        return self._segments(x, state)

    def _segments(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Sequences that stand at the same place of their segments.

        The state is (open tokens with segment - 1 rows, seen, the memory before the open segment).
        """
        new, seen = x.shape[1], torch.full((len(x),), x.shape[1])
        before = None
        if state is not None:
            held = place_of(state.tails[1]) % self.segment
            seen = seen + state.tails[1].cpu()
            x = torch.cat([state.tails[0][:, state.tails[0].shape[1] - held :], x], dim=1)
            before = LayerState(state.tails[2:], state.memory)
        if before is None:
            _, before = self.memory.mix(x[:, :0], None, None)
        outputs, after = [], before
        for piece in x.split(self.segment, dim=1):
            y, after = self._segment(piece, before)
            outputs.append(y)
            if piece.shape[1] == self.segment:
                before = after
        held = x.shape[1] % self.segment
        open_tokens = F.pad(x[:, x.shape[1] - held :], (0, 0, self.segment - 1 - held, 0))
        y = torch.cat(outputs, dim=1) if outputs else x
        return y[:, y.shape[1] - new :], LayerState(
            (open_tokens, seen, *before.tails), before.memory
        )

    def _segment(self, x: Tensor, before: LayerState) -> tuple[Tensor, LayerState]:
        """A segment, or its first tokens, and the memory after it."""
        q, k, v = (self.split(y) for y in self.qkv(x).chunk(3, dim=-1))
        parts = [attend(q, k, v, Causal(), return_lse=True)]
        _, k, v = (self.split(y) for y in self.qkv(self.memory.recall(x, before)).chunk(3, dim=-1))
        parts.append(attend(q, k, v, Causal(), return_lse=True))
        if len(self.persistent):
            _, k, v = (self.split(y) for y in self.qkv(self.persistent).chunk(3, dim=-1))
            k, v = (y.to(q.dtype).expand(len(q), *y.shape) for y in (k, v))
            parts.append(attend(q, k, v, return_lse=True))
        o, _ = merge(*zip(*parts, strict=True))
        a = self.out(o.flatten(-2))
        recall, after = self.memory.mix(a, before, None)
        return a * torch.sigmoid(self.norm(recall)), after
