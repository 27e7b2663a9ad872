"""What a process with Triton's interpreter runs: the kernels of `merge`."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.compose import merge
from foveal.compose.native_sparse import gated_sum
from foveal.testing import check
from foveal.testing.bounds import INPUTS, error


def _results(outputs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """o, lse and all gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in (*outputs, *lses)]
    o, lse = merge(leaves[: len(outputs)], leaves[len(outputs) :])
    seen = torch.where(lse.isfinite(), lse, 0.0)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=dtype).view_as(x) for x in (o, seen)]
    gradients = torch.autograd.grad((o, seen), leaves, weights)
    return [o.detach(), lse.detach(), *gradients]


def gated(seed: int) -> list[float]:
    """Largest differences of a gated sum and its gradients from plain operations."""
    from foveal.compose.gate_kernel import GatedSum

    source = torch.Generator().manual_seed(seed)
    gates = torch.rand(2, 7, 3, 3, generator=source).requires_grad_()
    outputs = [torch.randn(2, 7, 3, 5, generator=source).requires_grad_() for _ in range(3)]
    found: list[float] = []
    for own, count in ((gates, 3), (gates[:, :, :1], 3), (gates, 2)):
        some = outputs[:count]
        ours = GatedSum.apply(own, *some)
        plain = gated_sum(tuple(some), own)
        weight = torch.randn(plain.shape, generator=source)
        pairs = [(ours, plain)]
        gradients = (torch.autograd.grad(x, [gates, *some], weight) for x in (ours, plain))
        pairs += list(zip(*gradients, strict=True))
        found += [float((a - b).abs().max()) for a, b in pairs]
    return found


def merged(shape: tuple[int, ...], seed: int) -> list[str]:
    """Verdicts that are not ok; rows that one branch, or none, sees are among them."""
    source = torch.Generator().manual_seed(seed)
    outputs = [torch.randn(shape, generator=source) for _ in range(2)]
    lses = [3 * torch.randn(shape[:-1], generator=source) for _ in range(2)]
    lses[0].flatten()[:2] = -torch.inf
    lses[1].flatten()[1:3] = -torch.inf
    found = _results(outputs, lses, torch.float32)
    exact = _results(outputs, lses, torch.float64)
    errors = [0.0] * len(exact)
    for _ in range(INPUTS):
        near = [x * (1 + 1e-3 * torch.randn(x.shape, generator=source)) for x in outputs]
        pairs = zip(_plain(near, lses), _results(near, lses, torch.float64), strict=True)
        errors = [max(e, error(a, b)) for e, (a, b) in zip(errors, pairs, strict=True)]
    verdicts = [
        check(str(number), *results)
        for number, results in enumerate(zip(found, errors, exact, strict=True))
    ]
    return [str(verdict) for verdict in verdicts if not verdict.ok]


def _plain(outputs: list[Tensor], lses: list[Tensor]) -> list[Tensor]:
    """By elementwise operations in float32, as three branches are of which one sees nothing."""
    nothing = torch.zeros_like(outputs[0]), torch.full_like(lses[0], -torch.inf)
    found = _results([*outputs, nothing[0]], [*lses, nothing[1]], torch.float32)
    return [*found[:4], *found[5:7]]
