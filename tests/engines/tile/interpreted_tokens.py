"""What a process with Triton's interpreter runs: lists of blocks per token, and their choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import foveal as fv
from foveal.engines.tile import column_attend, cpu_tokens, rows, select, token_attend
from foveal.engines.tile.token_lists import TokenLists, block_spans, counted_segments, segments
from foveal.engines.tile.windows import windows
from foveal.selectors import VerticalSlash

LN2 = 0.6931471805599453
Sizes = tuple[int, int, int, int, int, int, int, int, bool]


def problem(sizes: Sizes, seed: int) -> tuple[list[Tensor], TokenLists]:
    """q, k, v, do, dlse in float32 and lists in which some tokens list nothing."""
    batch, Lq, Lk, heads, kv_heads, dim, value_dim, block, causal = sizes
    source = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, Lq, heads, dim), (batch, Lk, kv_heads, dim), (batch, Lk, kv_heads, value_dim),
        (batch, Lq, heads, value_dim), (batch, heads, Lq),
    )  # fmt: skip
    tensors = [torch.randn(shape, generator=source) for shape in shapes]
    starts, stops = block_spans(Lk, block, torch.device("cpu"))
    drawn = torch.rand(batch, kv_heads, Lq, len(starts), generator=source) < 0.4
    own = (torch.arange(Lq) + Lk - Lq) // block
    if causal:
        drawn &= torch.arange(len(starts)) <= own[:, None]
    place = torch.where(drawn, torch.arange(len(starts)), len(starts)).sort(-1).values
    indices = torch.where(place == len(starts), -1, place).to(torch.int32)
    return tensors, TokenLists(indices, starts, stops, block, causal, Lk - Lq)


def errors(sizes: Sizes, seed: int, small: bool) -> list[float]:
    """Largest differences from float64 of o, lse, dq, dk, dv, by key and by token."""
    if small:  # several rounds and segments
        _make_small()
    (q, k, v, do, dlse), lists = problem(sizes, seed)
    scale = sizes[5] ** -0.5
    exact = cpu_tokens.forward(q.double(), k.double(), v.double(), lists, scale)
    dlse = dlse.masked_fill(exact[1] == -torch.inf, 0.0)
    wide = (*(x.double() for x in (q, k, v)), *exact)
    right = (*exact, *cpu_tokens.backward(wide, lists, scale, do.double(), dlse.double()))
    found: list[float] = []
    for by_key in (True, False):
        o, lse = token_attend.forward(q, k, v, lists, scale, by_key)
        gradients = token_attend.backward((q, k, v, o, lse), lists, scale, do, dlse)
        for a, b in zip((o, lse * LN2, *gradients), right, strict=True):
            same = torch.where(a == b, 0.0, a - b)  # both -inf
            found.append(float(same.abs().max()))
    return found


def tile_errors(sizes: Sizes, seed: int) -> list[float]:
    """Largest differences from float64 of o, lse and o under gates along the unions of lists, and of o
    where keys and values are not finite; inf where a row is finite that should not be, or the other way."""
    (q, k, v, *_), lists = problem(sizes, seed)
    scale = sizes[5] ** -0.5
    assert token_attend.has_tiles(q, k, v, lists)
    exact = cpu_tokens.forward(q.double(), k.double(), v.double(), lists, scale)
    o, lse = token_attend.forward(q, k, v, lists, scale, False)
    source = torch.Generator().manual_seed(seed)
    others = (torch.randn(o.shape, generator=source), torch.randn(o.shape, generator=source))
    pairs = [(o, exact[0]), (lse * LN2, exact[1])]
    for heads in (1, q.shape[2]):
        gates = torch.rand(*q.shape[:2], heads, 3, generator=source)
        for some in (others, others[:1]):
            wanted = gates[..., 1:2] * exact[0]
            for n, other in enumerate(some):
                wanted = wanted + gates[..., 2 * n, None] * other
            gated = token_attend.Gated(gates, some)
            pairs.append((token_attend.forward_gated(q, k, v, lists, scale, gated), wanted))
    k[0, 5, 0, 3], v[0, 3, 0, 1], v[-1, 6, 0, 2] = torch.inf, torch.nan, -torch.inf
    wanted, _ = cpu_tokens.forward(q.double(), k.double(), v.double(), lists, scale)
    pairs.append((token_attend.forward(q, k, v, lists, scale, False)[0], wanted))
    return [_furthest(*pair) for pair in pairs]


def _furthest(found: Tensor, exact: Tensor) -> float:
    same = (found == exact) | (found.isnan() & exact.isnan())
    return float(torch.where(same, 0.0, (found - exact).abs()).nan_to_num(torch.inf).max())


def _make_small() -> None:
    token_attend._PART_BYTES = token_attend._GRADIENT_BYTES = 400
    token_attend._CHUNK_BYTES = token_attend._GRADIENT_CHUNK_BYTES = 640
    token_attend._SEGMENT = 3


def near_errors(sizes: tuple[int, ...], seed: int, small: bool) -> list[float]:
    """Largest differences from float64 where what is near to a token is computed with the sums."""
    if small:
        _make_small()
    Lq, Lk, heads, kv_heads, block, *near = sizes
    source = torch.Generator().manual_seed(seed)
    shapes = ((2, Lq, heads, 16), (2, Lk, kv_heads, 16), (2, Lk, kv_heads, 16))
    q, k, v = (torch.randn(shape, generator=source) for shape in shapes)
    starts, stops = block_spans(Lk, block, torch.device("cpu"))
    own = (torch.arange(Lq) + Lk - Lq)[:, None] // block
    number = torch.arange(len(starts))
    mask = torch.rand(2, kv_heads, Lq, len(starts), generator=source) < 0.4
    mask = (mask | (number < near[0]) | (number > own - near[1])) & (number <= own)
    place = torch.where(mask, number, len(starts)).sort(-1).values
    indices = torch.where(place == len(starts), -1, place).to(torch.int32)
    lists = TokenLists(indices, starts, stops, block, True, Lk - Lq, (near[0], near[1]))
    exact = cpu_tokens.forward(q.double(), k.double(), v.double(), lists, 0.25)
    found = []
    for by_key in (True, False):
        o, lse = token_attend.forward(q, k, v, lists, 0.25, by_key)
        pairs = zip((o, lse * LN2), exact, strict=True)
        found += [float((a - b).abs().max()) for a, b in pairs]
    return found


def counted_differ(far: bool, seed: int) -> bool:
    """Whether listings that are counted lie in other segments than those that are sorted."""
    sizes = (2, 40, 50, 4, 2, 16, 16, 4, True)
    lists = replace(problem(sizes, seed)[1], near=(1, 2))
    sorted_, counted = (f(lists, 5, 13, far) for f in (segments, counted_segments))
    names = ("cell", "first", "stop", "of_cell")
    same = all(torch.equal(getattr(sorted_, n), getattr(counted, n)) for n in names)
    used = sorted_.cell < sorted_.cells
    for first, stop in zip(sorted_.first[used], sorted_.stop[used], strict=True):
        own = sorted_.order[first:stop]
        same &= bool((own.diff() > 0).all())
    for cell in sorted_.cell[used].unique():
        mine = sorted_.cell == cell
        first, stop = int(sorted_.first[mine].min()), int(sorted_.stop[mine].max())
        ours = (x.order[first:stop].long().sort().values for x in (sorted_, counted))
        same &= torch.equal(*ours)
    return not same


def best_of_rows_differ(kind: str, used: int, best: int, seed: int) -> int:
    """Rows whose best columns the kernel finds otherwise than a stable sort."""
    from foveal.engines.tile.select_kernel import token_best

    source = torch.Generator().manual_seed(seed)
    x = torch.rand(3, used, generator=source)
    if kind == "ties":
        x = (x * 4).round() / 4
    if kind == "cluster":
        x[:, 30:110] += 5
    if kind == "forced":
        x[:, :1], x[:, -2:] = torch.inf, torch.inf
    bits = torch.full((3, used + 3), 2**31 - 1, dtype=torch.int32)
    bits[:, :used] = x.view(torch.int32)
    few = torch.empty(3, select._FEW, dtype=torch.int32)
    found = torch.empty(3, best, dtype=torch.int32)
    first = torch.full((3,), 7, dtype=torch.int32)
    token_best[(3,)](
        bits, few, found, first, first + used - 1, 3, 0, 3, used + 3,
        BEST=best, BEST_PAD=1 << (best - 1).bit_length(), FEW=select._FEW, num_warps=1,
    )  # fmt: skip
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :best].sort(-1).values
    wanted = torch.nn.functional.pad(order + 7, (0, best - order.shape[1]), value=-1)
    return int((found != wanted).any(-1).sum())


def rows_differ(width: int, seed: int) -> list[str]:
    """What the kernels of rows find otherwise than sorts."""
    source = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 7, width, generator=source).round(decimals=1)
    scores[0, 0, 0], scores[..., -1] = -torch.inf, -torch.inf
    scores[0, 1, 2, : width // 2] = torch.inf
    counts = torch.randint(0, width + 2, (2, 3, 7, 1), generator=source).float()
    mask = torch.rand(2, 3, 7, width, generator=source) < 0.3
    states = torch.randint(0, 3, (2, 3, 7, width), generator=source).to(torch.uint8)
    calls: dict[str, Callable[[], Tensor]] = {
        "best": lambda: rows.best(scores, counts),
        "places": lambda: rows.places(mask),
        "walk": lambda: rows.walk_words(states, 3),
        **{f"mass {m}": lambda m=m: rows.heaviest(shares(scores), m) for m in (0.0, 0.4, 1.0)},
    }
    ours = {name: call() for name, call in calls.items()}
    kept, rows._has_kernels = rows._has_kernels, lambda x: False
    differ = [name for name, call in calls.items() if not torch.equal(call(), ours[name])]
    rows._has_kernels = kept
    return differ


def shares(scores: Tensor) -> Tensor:
    """Small whole numbers, whose sums are exact, with what is always and what is never kept."""
    whole = (4 * scores).round().clamp(min=0)
    return whole.masked_fill(scores == -torch.inf, -torch.inf)


def key_errors(kind: str, block: int, heads: int, sizes: tuple[int, ...], seed: int) -> list[float]:
    """Largest differences of o, lse and gradients from float64 along keys, runs and columns."""
    Lq, Lk, q_heads, kv_heads = sizes
    source = torch.Generator().manual_seed(seed)
    shapes = ((2, Lq, q_heads, 16), (2, Lk, kv_heads, 16), (2, Lk, kv_heads, 8))
    q, k, v = (torch.randn(shape, generator=source) for shape in shapes)
    listed = fv.Chosen(key_lists(kind, block, (2, heads, -(-Lq // block)), Lk, source))
    column_attend._PAIRS = 700

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o, lse = fv.attend(*leaves, listed & fv.Causal(), return_lse=True, implementation=name)
        seen = torch.where(lse.isfinite(), lse, 0.0)
        gradients = torch.autograd.grad(o.sin().sum() + seen.cos().sum(), leaves)
        return [o.detach(), lse.detach(), *gradients]

    pairs = zip(run("triton", torch.float32), run("reference", torch.float64), strict=True)
    return [float(torch.where(a == b, 0.0, a - b).abs().max()) for a, b in pairs]


def key_lists(
    kind: str, block: int, shape: tuple[int, int, int], keys: int, source: torch.Generator
) -> fv.TokenSelection | fv.SpanSelection | fv.ColumnSelection:
    """Lists of each kind; the first is empty, runs overlap, columns lie in blocks."""
    if kind == "spans":
        starts = torch.randint(0, keys, (*shape, 5), generator=source)
        stops = starts + torch.randint(-keys // 4, keys // 2, starts.shape, generator=source)
        stops[0, 0, 0] = -1
        return fv.SpanSelection(starts, stops, block)
    drawn = torch.rand(*shape, keys, generator=source) < 0.1
    drawn[0, 0, 0] = False
    tokens = fv.TokenSelection.from_mask(drawn, block)
    if kind == "tokens":
        return tokens
    drawn = torch.rand(*shape, keys, generator=source) < 0.03
    starts = fv.TokenSelection.from_mask(drawn, block).indices
    return fv.ColumnSelection(starts, tokens.indices, block, 12)


def column_errors(length: int, options: tuple[int, ...], seed: int) -> list[float]:
    """Largest differences of o and lse from float64 along unaligned blocks and columns."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, h, 16, generator=source) for h in (4, 2, 2))
    pattern = fv.Chosen(VerticalSlash(*options).select(q, k)) & fv.Causal()
    found = fv.attend(q, k, v, pattern, return_lse=True, implementation="triton")
    wide_q, wide_k, wide_v = (x.double() for x in (q, k, v))
    exact = fv.attend(wide_q, wide_k, wide_v, pattern, return_lse=True, implementation="reference")
    return [float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)]


def lists_differ(
    Lq: int, Lk: int, heads: int, kv_heads: int, sizes: tuple[int, ...], seed: int
) -> int:
    """Lists of the kernel that are not those of the CPU edition, in float32."""
    length, stride, block, best, cut = sizes
    source = torch.Generator().manual_seed(seed)
    cuts = torch.tensor([0, cut, cut, Lk]) if cut else None
    table = windows(Lq, Lk, length, stride, block, torch.device("cpu"), cuts)
    q = torch.randn(2, Lq, heads, 16, generator=source)
    keys = torch.randn(2, table.count, kv_heads, 16, generator=source)
    window = torch.arange(table.count)
    hidden = (window < table.first[:, None] * table.step) | (window >= table.seen[:, None])
    s = torch.einsum("bthd,bwhd->bthw", q, keys.repeat_interleave(heads // kv_heads, 2)) / 4
    lse = torch.logsumexp(s.masked_fill(hidden[:, None], -torch.inf), -1)
    choice = select.Choice(best, 1, 2)
    ours = select._on_gpu(q, keys, lse, table, choice, 0.25)
    return int((ours != select.select(q, keys, lse, table, choice, 0.25)).any(-1).sum())


def gated_error(sizes: Sizes, near: bool, small: bool, seed: int) -> float:
    """The largest difference from float64 of o under gates that the sums of parts apply."""
    if small:
        _make_small()
    (q, k, v, *_), lists = problem(sizes, seed)
    scale = sizes[5] ** -0.5
    if near:
        indices = torch.arange(lists.blocks, dtype=torch.int32).expand(*lists.indices.shape[:3], -1)
        own = (torch.arange(sizes[1], dtype=torch.int32) + lists.shift)[:, None] // lists.block
        lists = replace(lists, indices=torch.where(indices <= own, indices, -1), near=(1, 2))
    assert token_attend.takes_gates(q, k, v, lists)
    assert not token_attend.has_tiles(q, k, v, lists)
    exact, _ = cpu_tokens.forward(q.double(), k.double(), v.double(), lists, scale)
    source = torch.Generator().manual_seed(seed)
    others = tuple(torch.randn(exact.shape, generator=source) for _ in range(2))
    found = []
    for heads, some in ((1, others[:1]), (q.shape[2], others)):
        gates = torch.rand(*q.shape[:2], heads, 3, generator=source)
        wanted = gates[..., 1:2] * exact
        for n, other in enumerate(some):
            wanted = wanted + gates[..., 2 * n, None] * other
        gated = token_attend.Gated(gates, some)
        found.append(
            (token_attend.forward_gated(q, k, v, lists, scale, gated) - wanted).abs().max()
        )
    return float(max(found))
