"""What a method keeps of the attention of a real model, and what it takes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.bench.selection.methods import Call, Method
from foveal.bench.selection.reading import Document, Layer, Reading
from foveal.patterns import Blocks, Causal, Extent, Pattern
from foveal.patterns.combine import Intersection
from foveal.probe.mass import keys_per_row

_PATIENCE = 2.0
"""Seconds after which no further round of one case begins."""


@dataclass(frozen=True)
class Exact:
    """Dense attention of the queries from `first` on of one layer, and what it pays to the fact.

    lse [1, rows, Hq]; found [1, Hq, asking queries, needle keys]: weights of the fact's number.
    """

    first: int
    o: Tensor
    lse: Tensor
    found: Tensor


def exact(layer: Layer, about: Document, first: int) -> Exact:
    q, k = layer.q[:, first:], layer.k
    o, lse = attend(q, k, layer.v, Causal(), return_lse=True)
    return Exact(first, o, lse, _weights(layer, about, lse[:, about.asking - first :]))


def _weights(layer: Layer, about: Document, lse: Tensor) -> Tensor:
    asking = layer.q[:, about.asking :].double()
    keys = layer.k[:, slice(*about.needle)].double()
    keys = keys.repeat_interleave(asking.shape[2] // keys.shape[2], dim=2)
    s = torch.einsum("bihd,bjhd->bhij", asking, keys) * asking.shape[-1] ** -0.5
    return torch.exp(s - lse.double().transpose(1, 2)[..., None])


def quality(
    method: Method, call: Call, layer: Layer, about: Document, whole: Exact
) -> dict[str, Any]:
    """Means over the heads of one layer.

    density: scored pairs over those of causal attention; mass: share of the softmax on kept pairs, mean
    over queries (None where attention is no softmax over pairs); error: |o - exact| / |exact|; needle: of
    what the asking queries pay to the fact in dense attention, the share that is left.
    """
    rows = layer.q.shape[1] - whole.first
    causal = sum(range(whole.first + 1, layer.q.shape[1] + 1)) / rows
    if method.choose is not None:
        pattern = method.choose(call)
        o, lse = attend(call.q, call.k, layer.v, pattern, return_lse=True)
        mass: float | None = float(torch.exp(lse.double() - whole.lse.double()).mean())
        pairs, needle = pairs_of(pattern, call.extent), _needle(pattern, call, about, whole)
    else:
        assert method.compute is not None
        answer = method.compute(call, layer.v)
        o, pairs, mass = answer.o, answer.pairs, None
        needle = _paid(method, call, layer, about, whole)
    lost = (whole.o.double() - o.double()).norm(dim=(1, 3))
    return {
        "density": pairs / causal,
        "mass": mass,
        "error": float((lost / whole.o.double().norm(dim=(1, 3))).mean()),
        "needle": needle,
    }


def _needle(pattern: Pattern, call: Call, about: Document, whole: Exact) -> float:
    Lk, heads = call.k.shape[1], whole.found.shape[1]
    q_pos = torch.arange(about.asking, Lk, device=call.q.device)
    k_pos = torch.arange(*about.needle, device=call.q.device)
    seen = pattern.allows(q_pos[:, None], k_pos[None], call.extent)
    if seen.dim() == 4 and seen.shape[1] not in (1, heads):
        seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
    return float((whole.found * seen).sum() / whole.found.sum())


def _paid(method: Method, call: Call, layer: Layer, about: Document, whole: Exact) -> float:
    """The same with values that are 1 at the fact, for methods that list no pairs; at most 1."""
    assert method.compute is not None
    marks = torch.zeros(1, layer.k.shape[1], layer.k.shape[2], 8).to(layer.v)
    marks[:, slice(*about.needle)] = 1.0
    o = method.compute(call, marks).o[:, about.asking - whole.first :, :, 0].double()
    paid = whole.found.sum(-1).transpose(1, 2)
    return float(torch.minimum(o, paid).sum() / paid.sum())


def pairs_of(pattern: Pattern, extent: Extent) -> float:
    """Visible pairs per query and head, mean; by blocks where the pattern is a causal list of those."""
    parts = pattern.members if isinstance(pattern, Intersection) else ()
    lists = [each for each in parts if isinstance(each, Blocks)]
    if len(parts) != 2 or len(lists) != 1 or Causal() not in parts:
        return float(keys_per_row(pattern, extent).double().mean())
    chosen = lists[0].selection
    q_block, kv_block = chosen.q_block, chosen.kv_block
    mask = chosen.block_mask(-(-extent.Lk // kv_block))
    total = 0.0
    for tiles in torch.arange(mask.shape[2], device=mask.device).split(256):
        row = tiles[:, None] * q_block + torch.arange(q_block, device=mask.device)
        row = torch.where(row < extent.Lq, row + extent.Lk - extent.Lq, -1)  # [tiles, q_block]
        first = torch.arange(mask.shape[3], device=mask.device) * kv_block
        last = (first + kv_block).clamp(max=extent.Lk)
        seen = (torch.minimum(row[..., None] + 1, last) - first).clamp(min=0).sum(1)
        total += float((mask[:, :, tiles] * seen).double().sum())
    return total / (mask.shape[0] * mask.shape[1] * extent.Lq)


def seconds(method: Method, call: Call, layer: Layer, rounds: int) -> dict[str, float]:
    """Median times of the method (choosing included), of choosing alone, and of dense attention, in turn."""

    def chosen() -> Any:
        assert method.choose is not None
        return method.choose(call)

    def whole() -> Any:
        if method.shipped is not None:
            return method.shipped(call, layer.v)
        if method.compute is not None:
            return method.compute(call, layer.v).o
        return attend(call.q, call.k, layer.v, chosen())

    def dense() -> Any:
        return attend(call.q, call.k, layer.v, Causal())

    found: dict[str, list[float]] = {"seconds": [], "dense_seconds": []}
    actions = {"seconds": whole, "dense_seconds": dense}
    if method.choose is not None:
        found["choosing_seconds"], actions["choosing_seconds"] = [], chosen
    begin = time.perf_counter()
    for number in range(rounds + 1):
        if number > 1 and time.perf_counter() - begin > _PATIENCE:
            break
        for name, action in actions.items():
            spent = _timed(action, call.q.device)
            if number or rounds == 1:
                found[name].append(spent)
    return {name: sorted(each)[len(each) // 2] for name, each in found.items() if each}


def _timed(action: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every value over the layers; None where one layer has none."""
    result: dict[str, Any] = {}
    for name in found[0]:
        values = [each[name] for each in found]
        known = all(value is not None for value in values)
        result[name] = math.fsum(values) / len(values) if known else None
    return result


def first_row(method: Method, reading: Reading) -> int:
    """The first query that a method acts on: 0, or the first whose next token is judged."""
    return 0 if method.rows == "all" else reading.document.text[0]
