"""A memory of several layers that trains itself, chunk by chunk, in products of matrices.

The gradients of a run of tokens are all taken at the memory before the run, so that those of one
matrix are outer products h_j u_j^T; what a token reads from a matrix that has learned from the tokens
of its run up to itself is then, as for a single matrix (`two_state`),
x (c M + f S) + sum_{j<=i} G_ij (x . h_j) u_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.engines.state.levels import decay_matrix


class Network(NamedTuple):
    """silu between the matrices of a memory, its momentum, and the memory before the open run.

    Shapes: each a tuple of [N, H, D_i, D_{i+1}].
    """

    memory: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]


class Gates(NamedTuple):
    """log a, log e (None for e = 0) and b of tokens [N, H, L, 1]."""

    log_decay: Tensor
    log_momentum: Tensor | None
    write: Tensor

    def part(self, tokens: slice) -> Gates:
        return Gates(*(None if x is None else x[:, :, tokens] for x in self))  # type: ignore[arg-type]


def recalled(memory: Sequence[Tensor], x: Tensor) -> Tensor:
    """What a memory gives for x [N, H, L, D_0], [N, H, L, D_n]."""
    for number, matrix in enumerate(memory):
        x = (F.silu(x) if number else x) @ matrix
    return x


def scan_network(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, network: Network, place: int, chunk: int
) -> tuple[Tensor, Network]:
    """M_t = a_t M_{t-1} + S_t, S_t = e_t S_{t-1} - b_t/2 grad |M(k_t) - v_t|^2, o_t = M_t(q_t).

    Gradients are taken at the memory before the run of `chunk` tokens that t lies in, of which `place`
    are already over.  Shapes: q and k [N, H, L, D_0], v and o [N, H, L, D_n].
    """
    outputs, start = [], 0
    while start < q.shape[2]:
        own = slice(start, min(start + chunk - place, q.shape[2]))
        place = (place + own.stop - own.start) % chunk
        o, network = _run(q[:, :, own], k[:, :, own], v[:, :, own], gates.part(own), network)
        if place == 0:
            network = network._replace(anchor=network.memory)
        outputs.append(o)
        start = own.stop
    return torch.cat(outputs, dim=2) if outputs else v, network


def _run(q: Tensor, k: Tensor, v: Tensor, gates: Gates, at: Network) -> tuple[Tensor, Network]:
    adds, since = decay_matrix(gates.log_decay), gates.log_decay.cumsum(-2).exp()
    if gates.log_momentum is None:
        between, of_momentum = adds, torch.zeros_like(since)
        until = torch.zeros_like(since).index_fill(
            -2, torch.tensor(q.shape[2] - 1, device=q.device), 1
        )
        lasting = torch.zeros_like(since[..., -1:, :])
    else:
        spread, since_momentum = (
            decay_matrix(gates.log_momentum),
            gates.log_momentum.cumsum(-2).exp(),
        )
        between, of_momentum = adds @ spread, adds @ since_momentum
        until, lasting = spread[..., -1, :, None], since_momentum[..., -1:, :]
    inputs, writes = _writes(k, v, gates.write, at.anchor)
    o = q
    memory, momentum = [], []
    for number, (m, s, x, u) in enumerate(zip(at.memory, at.momentum, inputs, writes, strict=True)):
        o = F.silu(o) if number else o
        o = since * (o @ m) + of_momentum * (o @ s) + ((o @ x.mT) * between) @ u
        learned = (between[..., -1, :, None] * x).mT @ u
        memory.append(since[..., -1:, :] * m + of_momentum[..., -1:, :] * s + learned)
        momentum.append(lasting * s + (until * x).mT @ u)
    return o, Network(tuple(memory), tuple(momentum), at.anchor)


def _writes(
    k: Tensor, v: Tensor, gate: Tensor, anchor: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """x_i and u_i of every matrix: minus half the gradient of a token, times its gate, is x_i u_i^T."""
    inputs, before = [k], k
    for number, matrix in enumerate(anchor):
        before = inputs[-1] @ matrix
        if number < len(anchor) - 1:
            inputs.append(F.silu(before))
    u = gate * (v - before)
    writes = [u]
    for number in range(len(anchor) - 1, 0, -1):
        before = inputs[number - 1] @ anchor[number - 1]
        sigmoid = torch.sigmoid(before)
        u = (u @ anchor[number].mT) * sigmoid * (1 + before * (1 - sigmoid))
        writes.append(u)
    return inputs, writes[::-1]
