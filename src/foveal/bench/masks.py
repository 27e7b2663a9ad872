"""The masks of the Long-Context Attention Benchmark as patterns: twelve static, two from data.

Definitions of Bu, Wang, Zeng et al. (2510.17896), with i a query and j a key; what is random there
is drawn once, from a fixed seed:

* documents have lengths of a log-normal distribution with a median of 1,100 tokens and sigma 1.07,
  which follows the published histogram of short texts within 2 %; the first has the median;
* a window reaches w = 1,024 tokens to a side, global tokens are the first w, blocks of block-causal
  documents hold w tokens.  Below 8,192 tokens, w is an eighth of the length and the median at most that;
* block lists keep a tenth of the blocks: for each key head, the key blocks with the highest of random
  scores, in blocks of 128 tokens, or of 128 to 512 in steps of 64.

Every area is counted from the pattern that is computed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from foveal.bench.cases import Case, Point, Suite
from foveal.bench.measure import Budget
from foveal.patterns import (
    Blocks,
    BlockSelection,
    Causal,
    Dense,
    Partition,
    Pattern,
    Rectangle,
    Sliding,
)
from foveal.patterns.documents import Packed

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 49152)
SMALL_LENGTHS = (512, 1024)
KEPT = 0.1
PEERS = ("masked", "cudnn", "flash2", "varlen", "flex", "flash_attn", "flashinfer")

_MEDIAN, _SIGMA = 1100, 1.07
_WINDOW = 1024
_BLOCK, _STEP = 128, 64


@dataclass(frozen=True)
class Mask:
    """A mask by its name, as a pattern on so many tokens; block lists are drawn for `kv_heads`."""

    name: str
    pattern: Callable[[int, int], Pattern]


def reach(length: int) -> int:
    """w: tokens of a window to one side."""
    return max(min(_WINDOW, length // 8), 1)


def documents(length: int) -> tuple[int, ...]:
    """Lengths of the documents packed in a sequence; the last one is cut off by its end."""
    source = random.Random(length)
    median = min(_MEDIAN, max(length // 8, 1))
    lengths = [median]
    while sum(lengths) < length:
        drawn = round(median * math.exp(source.gauss(0, _SIGMA)))
        lengths.append(min(max(drawn, 1), length - sum(lengths)))
    return tuple(lengths)


def _dense(length: int, kv_heads: int) -> Pattern:
    return Dense()


def _causal(length: int, kv_heads: int) -> Pattern:
    return Causal()


def _full_documents(length: int, kv_heads: int) -> Pattern:
    return Packed(Dense(), documents(length))


def _causal_documents(length: int, kv_heads: int) -> Pattern:
    return Packed(Causal(), documents(length))


def _window(length: int, kv_heads: int) -> Pattern:
    return Sliding(reach(length), reach(length))


def _causal_window(length: int, kv_heads: int) -> Pattern:
    return Sliding(reach(length))


def _shared_question(length: int, kv_heads: int) -> Pattern:
    """Later documents also see the whole first one."""
    lengths = documents(length)
    return Packed(Causal(), lengths) | Rectangle((lengths[0], length), (0, lengths[0]))


def _causal_blockwise(length: int, kv_heads: int) -> Pattern:
    """The last document also sees everything before it."""
    lengths = documents(length)
    last = length - lengths[-1]
    return Packed(Causal(), lengths) | Rectangle((last, length), (0, last))


def _prefix(most: int) -> Pattern:
    p = random.Random(most + 1).randint(1, most)
    return Causal() | Rectangle((0, p), (0, p))


def _prefix_causal(length: int, kv_heads: int) -> Pattern:
    return _prefix(length)


def _prefix_documents(length: int, kv_heads: int) -> Pattern:
    """One prefix length, drawn up to the length of the first document, in every document."""
    lengths = documents(length)
    return Packed(_prefix(lengths[0]), lengths)


def _global_window(length: int, kv_heads: int) -> Pattern:
    w = reach(length)
    rows, columns = Rectangle((0, w), (0, length)), Rectangle((0, length), (0, w))
    return Sliding(w, w) | rows | columns


def _block_causal_documents(length: int, kv_heads: int) -> Pattern:
    """Documents of 1 to 8 blocks; a query sees its document up to the end of its block."""
    block, source = reach(length), random.Random(length)
    lengths: list[int] = []
    while sum(lengths) < length:
        lengths.append(min(source.randint(1, 8) * block, length - sum(lengths)))
    return Packed(Partition(block, before=7 * block), tuple(lengths))


def _uniform_blocks(length: int, kv_heads: int) -> Pattern:
    side = max(min(_BLOCK, length // 64), 16)
    blocks = -(-length // side)
    scores = torch.rand(kv_heads, blocks, blocks, generator=torch.Generator().manual_seed(length))
    kept = scores.topk(max(round(KEPT * blocks), 1), dim=-1).indices.sort().values
    return Blocks(BlockSelection(kept.to(torch.int32)[None], side, side))


def _variable_blocks(length: int, kv_heads: int) -> Pattern:
    """Queries and keys cut in blocks of different sizes, lists of pairs of those."""
    step = max(min(_STEP, length // 128), 16)
    source = torch.Generator().manual_seed(length + 1)
    units = -(-length // step)
    q_owner, k_owner = (_pieces(units, source) for _ in range(2))
    rows, columns = int(q_owner[-1]) + 1, int(k_owner[-1]) + 1
    scores = torch.rand(kv_heads, rows, columns, generator=source)
    chosen = scores.topk(max(round(KEPT * columns), 1), dim=-1).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
    mask = kept[:, q_owner][:, :, k_owner]
    return Blocks(BlockSelection.from_block_mask(mask[None], step, step))


def _pieces(units: int, source: torch.Generator) -> torch.Tensor:
    """Which block each unit of tokens belongs to; blocks of 2 to 8 units.  [units]"""
    sizes = torch.randint(2, 9, (units // 2 + 1,), generator=source)
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes)[:units]


MASKS = (
    Mask("full", _dense),
    Mask("causal", _causal),
    Mask("full documents", _full_documents),
    Mask("causal documents", _causal_documents),
    Mask("window", _window),
    Mask("causal window", _causal_window),
    Mask("shared question", _shared_question),
    Mask("causal blockwise", _causal_blockwise),
    Mask("prefix, causal", _prefix_causal),
    Mask("prefix documents", _prefix_documents),
    Mask("global window", _global_window),
    Mask("block-causal documents", _block_causal_documents),
    Mask("blocks, uniform", _uniform_blocks),
    Mask("blocks, variable", _variable_blocks),
)


def masks_suite(
    device: torch.device,
    lengths: tuple[int, ...] | None = None,
    max_tokens: int | None = None,
) -> Suite:
    """Every mask at every length: 64 query heads on 8 key heads of 128 in bfloat16 on a GPU, as in the
    original; 8 on 1 of 64 in float32 on a CPU.

    lengths in tokens, by default those of the original on a GPU and two short ones on a CPU;
    max_tokens drops longer ones.
    """
    large = device.type == "cuda"
    chosen = lengths or (LENGTHS if large else SMALL_LENGTHS)
    kept = [n for n in chosen if max_tokens is None or n <= max_tokens]
    cases = tuple(_case(mask, n, large) for n in kept for mask in MASKS)
    return Suite(
        "masks",
        "the masks of the Long-Context Attention Benchmark, ours and every peer that runs",
        cases,
        PEERS,
        budget=Budget(seconds=2.0, rounds=(5, 20), warm_up=0.1),
        implementations=("hopper", "triton", "sdpa", "cpu"),
    )


def _case(mask: Mask, length: int, large: bool) -> Case:
    q_heads, kv_heads, dim = (64, 8, 128) if large else (8, 1, 64)
    heads = f"{q_heads} heads of {dim} on {kv_heads}"
    return Case(
        f"{mask.name}, {length:,} tokens",
        mask.pattern(length, kv_heads),
        (length,),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=dim,
        dtype=torch.bfloat16 if large else torch.float32,
        points=(Point("length", f"{mask.name}, {heads}", length),),
        column=mask.name,
    )
