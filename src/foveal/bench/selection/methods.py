"""The methods that are compared: how each finds keys in q and k, and its settings from few to many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from foveal._errors import UnknownNameError
from foveal.bench.selection.reading import Reading
from foveal.compose import attend_segments
from foveal.layers.trainable_sparse_blocks import pyramid_sparse_attention
from foveal.layers.trainable_sparse_tokens import core_context
from foveal.patterns import Blocks, BlockSelection, Causal, Chosen, Extent, Pattern, Sliding
from foveal.probe.mass import block_mass
from foveal.selectors import (
    Antidiagonal,
    Compressed,
    Forced,
    LowBit,
    Mass,
    Pooled,
    Selector,
    Threshold,
    Tiling,
    TopRatio,
    VerticalSlash,
    cluster,
    key_basis,
    select,
)
from foveal.systems.sparse.prefill import pbs_pattern
from foveal.systems.sparse.steps import delta_pattern, page_shares
from foveal.systems.sparse.tokens import loki_pattern, squeezed_pattern

_SINK = 64
_BLOCK = 64


@dataclass(frozen=True)
class Call:
    """One layer that a method is asked about.

    q [1, Lq, Hq, D] stands on the last of the keys k [1, Lk, Hkv, D]; memory is shared by the layers of
    one reading, in their order; fitted is what `Method.fit` made of another text.
    """

    layer: int
    q: Tensor
    k: Tensor
    setting: float
    memory: dict[str, Any] = field(default_factory=dict)
    fitted: Any = None

    @property
    def extent(self) -> Extent:
        return Extent((self.q.shape[1],), (self.k.shape[1],))


@dataclass(frozen=True)
class Answer:
    """Attention as a method computes it.

    pairs: scored pairs per query and head, mean.
    """

    o: Tensor
    pairs: float


Choose = Callable[[Call], Pattern]
Compute = Callable[[Call, Tensor], Answer]
Fit = Callable[[Reading], Any]


@dataclass(frozen=True)
class Method:
    """A method by name, with the entry of the catalogue that it is, and its settings by rising cost.

    choose gives the pairs to keep; compute the attention itself, where it is no softmax over pairs of q and
    k as they stand.  shipped: the operator that is timed, where it computes the same in another order.
    rows: "all" queries, or the "last" ones, as when text is written behind a prompt that was read exactly.
    fit learns from a reading of another text.  memory: layers use what the first of them found.
    """

    name: str
    system: str
    settings: tuple[float, ...]
    choose: Choose | None = None
    compute: Compute | None = None
    shipped: Callable[[Call, Tensor], Tensor] | None = None
    rows: Literal["all", "last"] = "all"
    fit: Fit | None = None
    memory: bool = False
    note: str = ""


def _by_blocks(call: Call, selector: Any, budget: Any, block: int = _BLOCK) -> Pattern:
    found = select(call.q, call.k, selector, budget, q_block=block, kv_block=block)
    return Blocks(found) & Causal()


def _window(call: Call) -> Pattern:
    width = max(round(call.setting * call.k.shape[1]), 1)
    return Sliding(width - 1, sink_tokens=_SINK)


class _Dice:
    """Scores that know nothing: what blocks are worth that nobody chose."""

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        source = torch.Generator().manual_seed(tiling.Lk)
        drawn = torch.rand(1, q.shape[2], tiling.q_blocks, tiling.kv_blocks, generator=source)
        return drawn.to(q.device)


def _random(call: Call) -> Pattern:
    return _by_blocks(call, _Dice(), Forced(TopRatio(call.setting)))


def _best(call: Call) -> Pattern:
    """Of all blocks of the layer those with most of the exact softmax, and the best one of every row."""
    mass = block_mass(call.q, call.k, Causal(), block=_BLOCK)
    visible = Tiling(call.q.shape[1], call.k.shape[1], _BLOCK, _BLOCK, True).visible(mass.device)
    count = max(round(call.setting * int(visible.sum()) * mass.shape[1]), 1)
    least = mass.masked_fill(~visible, -1.0).flatten().topk(count).values[-1]
    kept = (mass >= torch.minimum(least, mass.amax(-1, keepdim=True))) & visible
    return Blocks(BlockSelection.from_block_mask(kept, _BLOCK, _BLOCK)) & Causal()


def _pooled(call: Call) -> Pattern:
    return _by_blocks(call, Pooled(), Forced(TopRatio(call.setting)))


def _xattention(call: Call) -> Pattern:
    budget = Forced(Mass(call.setting), sinks=1, locals=1, counted=False)
    return _by_blocks(call, Antidiagonal(16), budget, 128)


def _sale(call: Call) -> Pattern:
    value = float(torch.tensor(call.setting).log())
    found = select(call.q, call.k, LowBit(), Threshold(value), q_block=64, kv_block=32)
    return Blocks(found) & Causal()


def _vertical_slash(call: Call) -> Pattern:
    slash = max(round(call.setting * call.k.shape[1]), 100)
    found = VerticalSlash(max(slash // 4, 30), slash).select(call.q, call.k)
    return Chosen(found) & Causal()


def _compressed(call: Call) -> Pattern:
    budget = Forced(TopRatio(call.setting), sinks=1, locals=2)
    found = select(call.q, call.k, Compressed(32, 16, "max"), budget, q_block=1, kv_block=_BLOCK)
    return Blocks(found) & Causal()


def _loki(call: Call) -> Pattern:
    basis = call.fitted[call.layer].to(call.q.device, call.q.dtype)
    basis = basis.repeat(call.k.shape[2] // len(basis), 1, 1)
    return loki_pattern(call.q, call.k, basis, share=call.setting)


def _bases(reading: Reading) -> dict[int, Tensor]:
    return {each.number: key_basis(each.k) for each in reading.layers}


def _squeezed(call: Call) -> Pattern:
    prefix = call.k.shape[1] - call.q.shape[1]
    source = torch.Generator().manual_seed(prefix)
    clusters = cluster(call.k[:, :prefix], max(prefix // 16, 1), steps=5, generator=source)
    return squeezed_pattern(call.q, call.k, clusters, threshold=call.setting / prefix)


def _delta(call: Call) -> Pattern:
    """The first layer finds, the others use what it found."""
    if "shares" not in call.memory:
        call.memory["shares"] = page_shares(call.q, call.k)
        return Causal()
    length = call.k.shape[1]
    pages = max(round(call.setting * length / 64), 3)
    return delta_pattern(call.memory["shares"], length, pages=pages)


def _pbs(call: Call) -> Pattern:
    return pbs_pattern(call.q, call.k, mass=call.setting)


def _pbs_as_shipped(call: Call, v: Tensor) -> Tensor:
    return attend_segments(call.q, call.k, v, mass=call.setting)


def _pyramid(call: Call, v: Tensor) -> Answer:
    a, length = call.setting, call.k.shape[1]
    levels = ((1, a), (2, min(1.5 * a, 1.0)), (8, min(3.5 * a, 1.0)))
    o = pyramid_sparse_attention(call.q, call.k, v, levels=levels, causal=True)
    # Blocks of 64 that lie wholly before the 128 queries come in shares, the diagonal ones whole.
    before = torch.arange(length).div(128, rounding_mode="floor") * 128
    far = before.double().mean() * (a + (levels[1][1] - a) / 2 + (levels[2][1] - levels[1][1]) / 8)
    near = (torch.arange(1, length + 1) - before).double().mean()
    return Answer(o, float(far + near))


def _cores(call: Call, v: Tensor) -> Answer:
    length = call.k.shape[1]
    window = max(round(call.setting * length), 16)
    o = core_context(call.q, call.k, v, group=16, window=window)
    seen = torch.arange(1, length + 1)
    far = (seen - window).clamp(min=0) // 16
    return Answer(o, float((seen - far * 16 + far).double().mean()))


SHARES = (0.025, 0.05, 0.1, 0.2, 0.4)
METHODS: tuple[Method, ...] = (
    Method("window and first tokens", "sliding_window", SHARES, _window),
    Method("random blocks", "", SHARES, _random, note="what nobody chose"),
    Method("best blocks", "", SHARES, _best, note="by the exact mass: what no selector can beat"),
    Method("mean query, mean key", "", SHARES, _pooled),
    Method("xattention", "xattention", (0.3, 0.5, 0.7, 0.9), _xattention),
    Method("minference", "minference", (0.01, 0.025, 0.05, 0.1), _vertical_slash),
    Method("pbs_attention", "pbs_attention", (0.3, 0.5, 0.7, 0.9), _pbs, shipped=_pbs_as_shipped),
    Method("sale", "sale", (0.3, 0.1, 0.03, 0.01), _sale),
    Method("compressed keys", "infllm_v2", SHARES, _compressed),
    Method("pyramid_sparse", "pyramid_sparse", (0.025, 0.05, 0.1, 0.2), compute=_pyramid),
    Method("core_context", "core_context", (0.025, 0.05, 0.1, 0.2), compute=_cores),
    Method("loki", "loki", SHARES, _loki, rows="last", fit=_bases),
    Method("squeezed_attention", "squeezed_attention", (8.0, 4.0, 2.0, 1.0), _squeezed, rows="last"),
    Method(
        "delta_token_attention", "delta_token_attention", SHARES, _delta, rows="last", memory=True
    ),
)  # fmt: skip


def of_selector(name: str, selector: Selector) -> Method:
    """Keeps the best share of blocks of 64 by a selector, the first and the own one among them."""

    def choose(call: Call) -> Pattern:
        return _by_blocks(call, selector, Forced(TopRatio(call.setting)))

    return Method(name, "", SHARES, choose)


def method(name: str) -> Method:
    """A method by name; UnknownNameError where there is none."""
    for each in METHODS:
        if each.name == name:
            return each
    raise UnknownNameError("method", name, tuple(each.name for each in METHODS))
