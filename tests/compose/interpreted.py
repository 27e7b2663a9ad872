"""What a process with Triton's interpreter runs: the kernels of `merge`."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from foveal.caches import Contiguous, KVShape, Paged
from foveal.compose import merge
from foveal.compose.decode_selected import listed_pages as plain_pages
from foveal.compose.decode_selected import view_of
from foveal.compose.native_sparse import gated_sum
from foveal.testing.bounds import check_near, error, neighbour


def _results(outputs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """o, lse and all gradients, those by the number of their branch."""
    leaves = [x.to(dtype).requires_grad_() for x in (*outputs, *lses)]
    o, lse = merge(leaves[: len(outputs)], leaves[len(outputs) :])
    seen = torch.where(lse.isfinite(), lse, 0.0)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=dtype).view_as(x) for x in (o, seen)]
    gradients = torch.autograd.grad((o, seen), leaves, weights)
    names = [f"d{kind} {n}" for kind in ("o", "lse") for n in range(len(outputs))]
    return {"o": o.detach(), "lse": lse.detach()} | dict(zip(names, gradients, strict=True))


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

    def errors_at(number: int) -> dict[str, float]:
        near = [neighbour(x, source) for x in outputs] if number else outputs
        exact = _results(near, lses, torch.float64)
        return {name: error(x, exact[name]) for name, x in _plain(near, lses).items()}

    found = _results(outputs, lses, torch.float32)
    verdicts = check_near(found, _results(outputs, lses, torch.float64), errors_at)
    return [str(verdict) for verdict in verdicts if not verdict.ok]


def _plain(outputs: list[Tensor], lses: list[Tensor]) -> dict[str, Tensor]:
    """By elementwise operations in float32, as three branches are of which one sees nothing."""
    nothing = torch.zeros_like(outputs[0]), torch.full_like(lses[0], -torch.inf)
    found = _results([*outputs, nothing[0]], [*lses, nothing[1]], torch.float32)
    return {name: x for name, x in found.items() if not name.endswith("2")}


def pages_of_blocks(seed: int) -> list[str]:
    """Caches and blocks for which one kernel names other pages, or lengths, than plain operations."""
    from foveal.compose.listed_kernel import listed_pages

    source = torch.Generator().manual_seed(seed)
    shape = KVShape(3, 2, 8, dtype=torch.float32)
    rows = torch.randn(3, 37, 2, 8, generator=source)
    found = []
    for cache in (
        Paged(shape, pages=30, page_size=6),
        Paged(shape, pages=60, page_size=6, per_head=True),
        Contiguous(shape, max_tokens=48),
    ):
        cache.append(rows, rows, counts=[37, 5, 0])
        view = view_of(cache)
        for heads, block, batch in itertools.product((1, 2), (4, 6, 12), (1, 3)):
            blocks = torch.arange(-(-37 // block), dtype=torch.int32).expand(batch, heads, -1)
            kept = torch.rand(blocks.shape, generator=source) < 0.5
            listed = blocks.masked_fill(~kept, -1)
            size = math.gcd(view.page_size, block)
            pairs = zip(
                listed_pages(view, listed, block, size),
                plain_pages(view, listed, block, size),
                strict=True,
            )
            if not all(torch.equal(a, b) for a, b in pairs):
                found.append(f"{type(cache).__name__}, {heads} lists of blocks of {block}")
    return found
