"""The systems of `state` written a second time: one token after the other, one head at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.systems.definitions import Example, draw, qkv


def each_head(cell: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """o [B, L, H, Dv] of `cell` on each sequence and head; tensors [B, L, H, ...]."""
    rows = [
        torch.stack([cell(*(x[b, :, h] for x in tensors)) for h in range(tensors[0].shape[2])], 1)
        for b in range(len(tensors[0]))
    ]
    return torch.stack(rows)


def delta_cell(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[-1], v.shape[-1])
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    outputs = []
    for t in range(len(q)):
        key, query = (x[t] / x[t].square().sum().sqrt() for x in (k, q))
        turn = eye - gate[t] * torch.outer(key, key)
        factor = decay[t].exp().expand(len(key))
        state = turn @ torch.diag(factor) @ state + gate[t] * torch.outer(key, v[t])
        outputs.append(query @ state / math.sqrt(len(key)))
    return torch.stack(outputs)


def kda(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (11,))
    decay, gate = -draw(source, 2, 11, 2, 5).abs(), draw(source, 2, 11, 2).sigmoid()
    return Example((q, k, v, decay, gate), lambda *tensors: each_head(delta_cell, *tensors))


def gated_deltanet(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (11,))
    decay, gate = -draw(source, 2, 11, 2).abs(), 2 * draw(source, 2, 11, 2).sigmoid()
    return Example((q, k, v, decay, gate), lambda *tensors: each_head(delta_cell, *tensors))


def lightning(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (9,), heads=8)

    def cell(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        state = q.new_zeros(q.shape[-1], v.shape[-1])
        outputs = []
        for t in range(len(q)):
            state = state * torch.exp(-slope[t]) + torch.outer(k[t], v[t])
            outputs.append(q[t] @ state)
        return torch.stack(outputs)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.tensor([2.0 ** -(h + 1) for h in range(8)], dtype=q.dtype)
        return each_head(cell, q, k, v, slopes.expand(2, 9, 8))

    return Example((q, k, v), expected)


def mlstm(source: torch.Generator) -> Example:
    q, k, v = qkv(source, (9,))

    def cell(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor) -> Tensor:
        memory, normaliser = q.new_zeros(q.shape[-1], v.shape[-1]), torch.zeros_like(q[0])
        outputs = []
        for t in range(len(q)):
            kept, gate = forget[t].sigmoid(), write[t].exp()
            memory = kept * memory + gate * torch.outer(k[t], v[t])
            normaliser = kept * normaliser + gate * k[t]
            query = q[t] / math.sqrt(len(q[t]))
            outputs.append(query @ memory / torch.clamp((query @ normaliser).abs(), min=1))
        return torch.stack(outputs)

    inputs = (q, k, v, draw(source, 2, 9, 2), draw(source, 2, 9, 2))
    return Example(inputs, lambda *tensors: each_head(cell, *tensors))


def based(source: torch.Generator) -> Example:
    def cell(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for t in range(len(q)):
            z = k[: t + 1] @ q[t] / math.sqrt(len(q[t]))
            weights = 1 + z + z * z / 2
            outputs.append(weights @ v[: t + 1] / weights.sum())
        return torch.stack(outputs)

    return Example(qkv(source, (9,)), lambda *tensors: each_head(cell, *tensors))


STATE_DEFINITIONS: dict[str, tuple[Callable[[torch.Generator], Example], ...]] = {
    "kda": (kda,),
    "gated_deltanet": (gated_deltanet,),
    "lightning_attention": (lightning,),
    "mlstm": (mlstm,),
    "based": (based,),
}
