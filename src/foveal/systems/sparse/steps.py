"""Lists for the steps of decoding: pages that another layer found, spans that the model wrote down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import DtypeError, SelectionError
from foveal._judged import judged, need_shape
from foveal.patterns import Blocks, BlockSelection, Causal, Chosen, Pattern, Sliding, SpanSelection
from foveal.selectors import Forced, Tiling, TopK
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.sparse.shapes import qkv_shapes


def page_shares(q: Tensor, k: Tensor, *, page: int = 64) -> Tensor:
    """What a layer of full attention finds: the softmax mass of every page, summed over its heads.

    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D]; float [B, Lq, ceil(Lk / page)], no gradient.
    Cost: causal attention with one value channel per page.
    """
    with torch.no_grad():
        owner = torch.arange(k.shape[1], device=k.device) // page
        one_hot = torch.nn.functional.one_hot(owner, -(-k.shape[1] // page)).to(k.dtype)
        v = one_hot[None, :, None].expand(*k.shape[:3], -1)
        return attend(q, k, v, Causal()).sum(2)


def delta_pattern(
    shares: Tensor, Lk: int, *, page: int = 64, pages: int = 16, recent: int = 2, sinks: int = 1
) -> Pattern:
    """The pairs of `delta_token_attention`."""
    Lq = shares.shape[1]
    if recent < 1 or pages < recent + sinks:
        needed = f"at least 1 recent page, and room for it and {sinks} first ones"
        raise SelectionError("pages", (pages, recent), needed)
    tiling = Tiling(Lq, Lk, 1, page, True)
    if shares.shape[2] != tiling.kv_blocks:
        needed = f"a share for each of {tiling.kv_blocks} pages of {page} tokens"
        raise SelectionError("shares", list(shares.shape), needed)
    visible = tiling.visible(shares.device)
    scores = shares[:, None].masked_fill(~visible, -torch.inf)
    kept = Forced(TopK(pages), sinks, recent).keep(scores, tiling) & visible
    # A single query is a block of its own, however large blocks of queries are.
    return Blocks(BlockSelection.from_block_mask(kept, 64 if Lq == 1 else 1, page)) & Causal()


@judged
def delta_token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shares: Tensor | None = None,
    *,
    page: int = 64,
    pages: int = 16,
    recent: int = 2,
    sinks: int = 1,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention to the pages that an earlier layer of full attention found heaviest.

    A query keeps `pages` pages in all: the first `sinks`, its own and the `recent` - 1 before it, and of
    the others those with the largest share.  Layers up to the next one of full attention use the same
    shares; the whole cache stays, so that the next one sees all of it.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]; shares [B, Lq, ceil(Lk / page)] as
    `page_shares` returns them from the earlier layer (None: from this one).
    Options: the paper's sum over heads and choice of layers are not established; here heads are summed, and
    the caller says which layer finds.
    Equals: pages >= ceil(Lk / page) is causal attention.
    Paper: DELTA (2510.09883).
    """
    found = page_shares(q, k, page=page) if shares is None else shares
    need_shape("shares", found, (q.shape[0], q.shape[1], -1), like=q)
    pattern = delta_pattern(found, k.shape[1], page=page, pages=pages, recent=recent, sinks=sinks)
    return attend(q, k, v, pattern, implementation=implementation)


def _delta_everything(draw: Draw) -> Claim:
    length = draw.integer(5, 14)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: delta_token_attention(q, k, v, page=4, pages=4),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _delta_order(draw: Draw) -> Claim:
    """Where one page takes nearly all the mass of the finding layer, it is the one that is kept."""
    count = draw.integer(3, 5)
    length = 4 * count
    chosen = draw.integer(1, count - 2)
    shares = torch.zeros(2, length, count, dtype=torch.float64)
    shares[:, :, chosen] = 1.0

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for t in range(length):
            pages = {0, t // 4} | ({chosen} if chosen <= t // 4 else set())
            if chosen >= t // 4 or not pages - {0, t // 4}:
                free = [p for p in range(1, t // 4) if p not in pages]
                pages |= set(free[: 3 - len(pages)])
            keys = [j for j in range(t + 1) if j // 4 in pages]
            rows.append(attend(q[:, t : t + 1], k[:, keys], v[:, keys]))
        return torch.cat(rows, 1)

    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: delta_token_attention(q, k, v, shares, page=4, pages=3, recent=1, sinks=1),
        right,
    )


DELTA_TOKEN_ATTENTION = System(
    name="delta_token_attention",
    title="DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning",
    year=2025,
    paper="Zarch et al. (USC); arXiv 2510.09883",
    kind="operator",
    family="sparse",
    summary="A few layers attend fully and find the heaviest pages; the layers up to the next of them "
    "attend to those pages alone.",
    op=delta_token_attention,
    identities=(
        Identity("everything", "All pages are causal attention.", _delta_everything),
        Identity("order", "The page with the largest share is kept.", _delta_order),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (8192,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)


@judged
def self_selected_span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None = None,
    stops: Tensor | None = None,
    *,
    window: int = 256,
    sink_tokens: int = 4,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention to the runs of keys that the model named, to a window, and to the first tokens.

    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]; starts and stops int [B, Lq, n], the runs
    start <= j < stop of every query, stop <= start is none (both None: none).  `named_spans` makes them from
    what the model wrote.
    Options: window, the query's own token included.
    Equals: a run over all keys is causal attention; without runs a window with sinks.
    Paper: Self-Selected Attention Span (2404.09336).
    """
    if window < 1 or sink_tokens < 0:
        raise SelectionError("window", (window, sink_tokens), "a window of at least 1 is needed")
    near = Sliding(window - 1, sink_tokens=sink_tokens)
    if (starts is None) != (stops is None):
        missing = "starts" if starts is None else "stops"
        raise SelectionError(missing, None, "starts and stops are needed, or neither")
    if starts is None or stops is None:
        return attend(q, k, v, near, implementation=implementation)
    for name, x in (("starts", starts), ("stops", stops)):
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise DtypeError(name, x.dtype, "integers are needed")
    if starts.dim() != 3 or starts.shape != stops.shape or starts.shape[:2] != q.shape[:2]:
        needed = f"starts and stops [{q.shape[0]}, {q.shape[1]}, n] are needed"
        raise SelectionError("starts", (list(starts.shape), list(stops.shape)), needed)
    place = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1] + 1
    own = torch.stack([(place - window).clamp(min=0), torch.zeros_like(place)], dim=-1)
    ends = torch.stack([place, place.clamp(max=sink_tokens)], dim=-1)
    batch = len(starts)
    runs = torch.cat([starts.to(own), own.expand(batch, -1, -1)], -1)
    last = torch.cat([torch.minimum(stops.to(own), place[:, None]), ends.expand(batch, -1, -1)], -1)
    spans = SpanSelection(runs[:, None].to(torch.int32), last[:, None].to(torch.int32))
    return attend(q, k, v, Chosen(spans), implementation=implementation)


def named_spans(
    named: Sequence[Sequence[int]], pieces: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """starts and stops int32 [queries, n] of the pieces of text that every query names.

    named: for each query, numbers of pieces, as the model wrote them before the text that needs them;
    pieces: first and last + 1 place of each piece.  Shorter lists end in empty runs.
    """
    most = max((len(each) for each in named), default=0)
    table = torch.zeros(2, len(named), max(most, 1), dtype=torch.int32)
    for row, numbers in enumerate(named):
        for column, number in enumerate(numbers):
            if not 0 <= number < len(pieces):
                raise SelectionError("named", number, f"one of {len(pieces)} pieces is needed")
            table[:, row, column] = torch.tensor(pieces[number], dtype=torch.int32)
    return table[0], table[1]


def _span_whole(draw: Draw) -> Claim:
    length = draw.integer(4, 12)
    starts = torch.zeros(2, length, 1, dtype=torch.int64)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: self_selected_span(q, k, v, starts, starts + length, window=1),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _span_none(draw: Draw) -> Claim:
    length = draw.integer(4, 12)
    starts = torch.full((2, length, 2), 3, dtype=torch.int64)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: self_selected_span(q, k, v, starts, starts, window=3, sink_tokens=2),
        lambda q, k, v: attend(q, k, v, Sliding(2, sink_tokens=2)),
    )


SELF_SELECTED_SPAN = System(
    name="self_selected_span",
    title="Self-Selected Attention Span for Accelerating Large Language Model Inference",
    year=2024,
    paper="Jin et al.; arXiv 2404.09336",
    kind="operator",
    family="sparse",
    summary="The model names the pieces of its text that it needs next; the tokens that follow attend to "
    "them, to a window and to the first tokens.",
    op=self_selected_span,
    identities=(
        Identity("whole", "A run over all keys is causal attention.", _span_whole),
        Identity("none", "Without runs it is a window with sinks.", _span_none),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (8192,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)
