"""RAT: a recurrence inside chunks, attention over what chunks end with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal._judged import judged
from foveal.compose import merge
from foveal.layers.causal import rotary
from foveal.layers.state import LayerState, StateLayer, one_by_one, place_of, unequal
from foveal.patterns import Causal


def chunk_recurrence(x: Tensor, gate: Tensor) -> Tensor:
    """y_t = gate_t y_{t-1} + x_t from y = 0, along the second axis, in about log2(C) passes.

    Shapes: all [B, C, ...].
    """
    factor, y, step = gate, x, 1
    while step < x.shape[1]:
        y = torch.cat([y[:, :step], y[:, step:] + factor[:, step:] * y[:, :-step]], dim=1)
        factor = torch.cat([factor[:, :step], factor[:, step:] * factor[:, :-step]], dim=1)
        step *= 2
    return y


@judged
def rat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    chunk: int = 16,
    rotary_base: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Softmax of each query over its own summary and those at the end of all earlier chunks.

    Inside a chunk, from 0 at its start, k'_t = g_t k'_{t-1} + (1 - g_t) k_t, and v' with the same gate g.
    Shapes: q, k, v and gate (0 < g < 1, 1/2 by default) [B, L, H, D].
    Options: rotary_base turns q and k' by the number of their chunk.
    """
    gate = torch.full_like(v, 0.5) if gate is None else gate
    o, _, _ = _solve(q, k, v, gate, chunk, rotary_base, None, implementation)
    return o


def _solve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk: int,
    rotary_base: float | None,
    past: tuple[Tensor, Tensor, int] | None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, and the summaries of all chunks (k', v') in float32 at least, the last one perhaps open.

    past: k' and v' of all chunks so far, rotated, and the tokens seen.
    """
    if not q.shape == k.shape == v.shape == gate.shape:
        raise ShapeError(
            "gate", list(gate.shape), f"q, k, v and gate of one shape, {list(q.shape)}"
        )
    length, seen = q.shape[1], 0 if past is None else past[2]
    held, whole = seen % chunk, seen // chunk
    wide = torch.promote_types(q.dtype, torch.float32)
    gates = gate.to(wide).repeat(1, 1, 1, 2)
    kv = torch.cat([k, v], dim=-1).to(wide) * (1 - gates)
    if held:
        # The open summary stands in for the tokens that made it.
        assert past is not None
        opened = torch.cat([_turn(past[0][:, -1:], -whole, rotary_base), past[1][:, -1:]], dim=-1)
        blank = opened.new_zeros(opened.shape).expand(-1, held - 1, -1, -1)
        kv = torch.cat([blank, opened, kv], dim=1)
        gates = torch.cat([torch.zeros_like(kv[:, :held]), gates], dim=1)
    count = -(-kv.shape[1] // chunk)
    missing = count * chunk - kv.shape[1]
    kv, gates = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (kv, gates))
    kv, gates = (x.unflatten(1, (count, chunk)).flatten(0, 1) for x in (kv, gates))
    summed = chunk_recurrence(kv, gates).unflatten(0, (len(q), count))  # [B, chunks, C, H, 2 D]
    own_k, own_v = summed.chunk(2, dim=-1)
    numbers = whole + torch.arange(count, device=q.device)
    if rotary_base is not None:
        places = numbers.repeat_interleave(chunk)[None]
        own_k = rotary(own_k.flatten(1, 2), places, rotary_base).view_as(own_k)
        q = rotary(q, places[:, held : held + length], rotary_base)
    at = torch.full((count,), chunk - 1, device=q.device)
    at[count - 1 :] = (held + length - 1) % chunk
    here = torch.arange(count, device=q.device)
    end_k, end_v = own_k[:, here, at], own_v[:, here, at]  # [B, chunks, H, D]
    if past is not None:
        end_k, end_v = (
            torch.cat([old[:, :whole], new], dim=1)
            for old, new in zip(past[:2], (end_k, end_v), strict=True)
        )
    # The queries of a chunk are heads of one token, which sees the chunks before it.
    padded = F.pad(q, (0, 0, 0, 0, held, missing)).unflatten(1, (count, chunk))
    heads = q.shape[2]
    grouped = padded.transpose(2, 3).flatten(2, 3)  # [B, chunks, H C, D]
    near_lse = (padded * own_k).sum(-1) * q.shape[-1] ** -0.5
    far, far_lse = attend(
        grouped,
        end_k[:, : max(whole + count - 1, 0)].to(q.dtype),
        end_v[:, : max(whole + count - 1, 0)].to(q.dtype),
        Causal(),
        return_lse=True,
        implementation=implementation,
    )
    far = far.unflatten(2, (heads, chunk)).transpose(2, 3)
    far_lse = far_lse.unflatten(2, (heads, chunk)).transpose(2, 3)
    o, _ = merge((far, own_v.to(q.dtype)), (far_lse, near_lse.to(far_lse.dtype)))
    return o.flatten(1, 2)[:, held : held + length], end_k, end_v


def _turn(x: Tensor, number: int, base: float | None) -> Tensor:
    """One summary [B, 1, H, D] turned by the number of its chunk."""
    if base is None:
        return x
    return rotary(x, torch.full((1, 1), number, device=x.device), base)


class RATAttention(StateLayer):
    """y = W_o [sigmoid(W_z x) * rat(q, k, v, sigmoid(W_g x + b))].

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`; the state holds one key and
    value for each chunk.
    Options: chunk 1 is attention on (1 - g) k and (1 - g) v; rotary_base as for `rat`.
    Equals: any cut of x in two calls that pass the state.
    Paper: RAT (2507.04416), without its sharing of q and k between heads.
    """

    def __init__(
        self, dim: int, heads: int, *, chunk: int = 16, rotary_base: float | None = 10000.0
    ) -> None:
        super().__init__(dim, heads)
        if chunk < 1:
            raise ShapeError("chunk", chunk, "at least 1 is needed")
        self.chunk = chunk
        self.rotary_base = rotary_base
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.gate = nn.Linear(dim, dim)
        self.read = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            self.gate.bias.uniform_(1, max(chunk - 1, 1) + 1e-6).log_()

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if cu_seqlens is not None or (state is not None and unequal(state.tails[2])):
            return one_by_one(x, state, cu_seqlens, self._run)
        return self._run(x, state)

    def _run(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Sequences with the same number of tokens so far."""
        seen = torch.full((len(x),), x.shape[1])
        past = None
        if state is not None:
            before = place_of(state.tails[2])
            real = -(-before // self.chunk)
            k, v = (y[:, y.shape[1] - real :] for y in state.tails[:2])
            past, seen = (k, v, before), seen + state.tails[2].cpu()
            if not x.shape[1]:
                return x, LayerState((k, v, seen))
        q, k, v = (self.split(y) for y in self.qkv(x).chunk(3, dim=-1))
        gate = torch.sigmoid(self.split(self.gate(x)))
        o, k, v = _solve(q, k, v, gate, self.chunk, self.rotary_base, past)
        return self.out(torch.sigmoid(self.read(x)) * o.flatten(-2)), LayerState((k, v, seen))
