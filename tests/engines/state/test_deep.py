"""A memory of several layers against its definition, and one layer against `TwoState`."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveal as fv
from foveal.engines.state.deep import Gates, Network, recalled, scan_network

_N, _H, _L, _D = 2, 2, 11, 4


def drawn(source: torch.Generator, momentum: bool) -> tuple[list[Tensor], Gates]:
    """q, k, v [N, H, L, D] of length 1, and gates whose steps do not diverge."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    tensors = [F.normalize(normal(_N, _H, _L, _D), dim=-1) for _ in range(3)]
    decay, speed, write = (torch.sigmoid(normal(_N, _H, _L, 1) + x) for x in (2.0, 0.0, -2.0))
    return tensors, Gates(decay.log(), speed.log() if momentum else None, write)


def network(source: torch.Generator, widths: tuple[int, ...]) -> Network:
    def matrices(scale: float) -> tuple[Tensor, ...]:
        return tuple(
            scale * torch.randn(_N, _H, a, b, generator=source, dtype=torch.float64)
            for a, b in itertools.pairwise(widths)
        )

    memory = matrices(0.5)
    return Network(memory, matrices(0.1), memory)


def defined(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, at: Network, chunk: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o and the last memory, one token after the other, gradients by autograd."""
    memory, momentum, anchor = at
    outputs = []
    for t in range(q.shape[2]):
        leaves = tuple(m.detach().requires_grad_() for m in anchor)
        error = recalled(leaves, k[:, :, t : t + 1]) - v[:, :, t : t + 1]
        found = torch.autograd.grad(error.square().sum(), leaves)
        kept, step = gates.log_decay[:, :, t : t + 1].exp(), gates.write[:, :, t : t + 1] / 2
        speed = torch.zeros_like(kept)
        if gates.log_momentum is not None:
            speed = gates.log_momentum[:, :, t : t + 1].exp()
        momentum = tuple(speed * s - step * g for s, g in zip(momentum, found, strict=True))
        memory = tuple(kept * m + s for m, s in zip(memory, momentum, strict=True))
        outputs.append(recalled(memory, q[:, :, t : t + 1]))
        if (t + 1) % chunk == 0:
            anchor = memory
    return torch.cat(outputs, dim=2), memory


@pytest.mark.parametrize("chunk", [1, 4, 20])
@pytest.mark.parametrize("widths", [(_D, _D), (_D, 7, _D), (_D, 3, 5, _D)])
@pytest.mark.parametrize("momentum", [True, False])
def test_is_its_definition(
    chunk: int, widths: tuple[int, ...], momentum: bool, source: torch.Generator
) -> None:
    tensors, gates = drawn(source, momentum)
    at = network(source, widths)
    o, after = scan_network(*tensors, gates, at, 0, chunk)
    expected, memory = defined(*tensors, gates, at, chunk)
    torch.testing.assert_close(o, expected)
    for got, exact in zip(after.memory, memory, strict=True):
        torch.testing.assert_close(got, exact)


def test_pieces_are_the_whole(source: torch.Generator) -> None:
    tensors, gates = drawn(source, True)
    at, parts, place = network(source, (_D, 6, _D)), [], 0
    whole, _ = scan_network(*tensors, gates, at, 0, 4)
    for start, stop in ((0, 3), (3, 10), (10, _L)):
        own = slice(start, stop)
        o, at = scan_network(*(x[:, :, own] for x in tensors), gates.part(own), at, place, 4)
        place = (place + stop - start) % 4
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("chunk", [1, 4])
def test_one_layer_is_two_state(chunk: int, source: torch.Generator) -> None:
    (q, k, v), gates = drawn(source, True)
    at = network(source, (_D, _D))._replace(momentum=(torch.zeros(_N, _H, _D, _D).double(),))
    o, _ = scan_network(q, k, v, gates, at, 0, chunk)
    assert gates.log_momentum is not None
    initial = [at.memory[0], at.momentum[0]]
    if chunk > 1:
        initial += [at.anchor[0], torch.zeros(_N, _H).double()]
    expected = fv.scan(
        *(x.transpose(1, 2) for x in (q, k, v)),
        rule=fv.TwoState(chunk),
        log_decay=gates.log_decay[..., 0].mT,
        write_gate=gates.write[..., 0].mT,
        log_momentum=gates.log_momentum[..., 0].mT,
        scale=1.0,
        initial_state=tuple(initial),
    )
    torch.testing.assert_close(o.transpose(1, 2), expected)
