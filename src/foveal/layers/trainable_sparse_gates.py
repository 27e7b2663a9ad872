"""Learned gates: which key blocks, keys or heads a query attends to, and how the gates are trained."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from foveal._arguments import finite, need_tensors
from foveal._attend import attend
from foveal._errors import OptionError, SelectionError, ShapeError
from foveal._judged import judged, need_dtype, need_shape
from foveal._options import check_values
from foveal.layers.trainable_sparse_blocks import ranks, spread_heads
from foveal.patterns import Blocks, BlockSelection, Causal
from foveal.scores import KeyBias, Softmax

_QUERIES_AT_ONCE = 256
"""Queries whose full attention maps are in memory at once."""


def gate_blocks(gate_q: Tensor, gate_k: Tensor, Lk: int, block: int) -> Tensor:
    """Softmax of a gate over the blocks before the one a query stands in.  [B, Hkv, Lq, blocks]

    Shapes: gate_q [B, Lq, Hkv, Dg], gate_k [B, ceil(Lk / block), Hkv, Dg]; a row without such a block is 0.
    """
    need_tensors(gate_q=gate_q, gate_k=gate_k)
    check_values(gate_blocks, {"Lk": Lk, "block": block})
    blocks = -(-Lk // block)
    need_shape("gate_q", gate_q, (-1, -1, -1, -1), like=gate_q)
    if gate_k.shape[1:2] != (blocks,):
        raise ShapeError("gate_k", list(gate_k.shape), f"one row per block, {blocks}, is needed")
    sizes = (len(gate_q), blocks, *gate_q.shape[2:])
    need_shape("gate_k", gate_k, sizes, like=gate_q)
    need_dtype(gate_q, gate_k=gate_k)
    scores = torch.einsum("bihd,bjhd->bhij", gate_q, gate_k) / math.sqrt(gate_q.shape[-1])
    own = _own_block(gate_q.shape[1], Lk, block, gate_q.device)
    hidden = torch.arange(blocks, device=gate_q.device) >= own[:, None]
    some = ~hidden.all(-1, keepdim=True)
    gates = torch.softmax(scores.masked_fill(hidden & some, -torch.inf), dim=-1)
    return gates.masked_fill(hidden, 0.0)


def _own_block(Lq: int, Lk: int, block: int, device: torch.device) -> Tensor:
    return (torch.arange(Lq, device=device) + Lk - Lq) // block


@judged
def seer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_q: Tensor,
    gate_k: Tensor,
    *,
    block: int = 64,
    budget: int = 4096,
    threshold: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Exact causal attention of every query on the key blocks that a learned gate keeps.

    a = softmax over earlier blocks of gate_q.gate_k / sqrt(Dg); kept are the block that the query
    stands in and, of the others, the largest a up to budget / block blocks in all, or all a > threshold.

    Shapes: q [B, Lq, Hq, D], k and v [B, Lk, Hkv, .], gate_q [B, Lq, Hkv, Dg], gate_k [B, ceil(Lk / block),
    Hkv, Dg]; one list per query and key head.  The last query stands on the last key.
    Options: block; budget in tokens >= block; threshold in (0, 1) takes its place.
    Cost: budget / Lk of dense, and Dg / (2 D block) of it for the gate.
    Limits: no gradient reaches the gate, which is trained by `gate_loss`.
    Equals: dense causal attention where budget >= Lk.
    Paper: SeerAttention-R (2506.08889).
    """
    if budget < block:
        raise SelectionError("budget", budget, f"at least one block of {block} tokens is needed")
    if threshold is not None and not 0 < threshold < 1:
        raise OptionError("threshold", threshold, "a number above 0 and below 1 is needed")
    _fit_gates(q, k, gate_q, gate_k, block)
    if not k.shape[1]:
        return attend(q, k, v, Causal(), implementation=implementation)
    Lq, Lk = q.shape[1], k.shape[1]
    with torch.no_grad():
        gates = gate_blocks(gate_q, gate_k, Lk, block)
        own = _own_block(Lq, Lk, block, q.device)[:, None]
        blocks = torch.arange(gates.shape[-1], device=q.device)
        earlier = blocks < own
        if threshold is None:
            place = ranks(gates.masked_fill(~earlier, -1.0))
            kept = (place < budget // block - 1) & earlier
        else:
            kept = (gates > threshold) & earlier
        mask = kept | (blocks == own)
    # A single query is a block of its own, however large blocks of queries are.
    selection = BlockSelection.from_block_mask(mask, 64 if Lq == 1 else 1, block)
    return attend(q, k, v, Blocks(selection) & Causal(), implementation=implementation)


def _fit_gates(q: Tensor, k: Tensor, gate_q: Tensor, gate_k: Tensor, block: int) -> None:
    batch, kv_heads = q.shape[0], k.shape[2]
    need_shape("gate_q", gate_q, (batch, q.shape[1], kv_heads, -1), like=q)
    blocks = -(-k.shape[1] // block)
    need_shape("gate_k", gate_k, (batch, blocks, kv_heads, gate_q.shape[-1]), like=q)
    need_dtype(gate_q, gate_k=gate_k)


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position: channel pairs (d, d + D / 2) turned by position * base ** (-2 d / D).

    Shapes: x [B, L, H, D] with even D, positions [L].
    """
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions.to(rates)[:, None] * rates)[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class SeerGate(nn.Module):
    """The gate of `seer_attention`: per key head, a projection of its queries and of pooled keys.

    gate_q = rope(norm(Wq [q of the G heads])), gate_k = rope(norm(Wk [max, min, mean of k in the block]))
    with the position of the first token of the block.  q and k are those before rotary positions.

    Shapes: forward(q [B, Lq, Hq, D], k [B, Lk, Hkv, D]) gives gate_q [B, Lq, Hkv, gate_dim] and gate_k [B,
    ceil(Lk / block), Hkv, gate_dim].
    Options: norm adds RMS norms; base of the rotary positions.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        gate_dim: int = 128,
        block: int = 64,
        norm: bool = False,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        if heads % kv_heads:
            raise ShapeError("kv_heads", kv_heads, f"a divisor of the {heads} heads is needed")
        if gate_dim < 2 or gate_dim % 2:
            raise ShapeError("gate_dim", gate_dim, "an even number from 2 on is needed")
        if not base > 0:
            raise OptionError("base", base, "a number above 0 is needed")
        groups = heads // kv_heads
        self.heads, self.head_dim = heads, head_dim
        self.kv_heads, self.block, self.base = kv_heads, block, base
        self.of_q = nn.Parameter(torch.empty(kv_heads, groups * head_dim, gate_dim))
        self.of_k = nn.Parameter(torch.empty(kv_heads, 3 * head_dim, gate_dim))
        for weight in (self.of_q, self.of_k):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.norm_q = nn.RMSNorm(gate_dim) if norm else nn.Identity()
        self.norm_k = nn.RMSNorm(gate_dim) if norm else nn.Identity()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        need_tensors(q=q, k=k)
        need_shape("q", q, (-1, -1, self.heads, self.head_dim), like=self.of_q)
        need_shape("k", k, (len(q), -1, self.kv_heads, self.head_dim), like=self.of_k)
        need_dtype(self.of_q, q=q, k=k)
        Lq, Lk = q.shape[1], k.shape[1]
        joined = q.unflatten(2, (self.kv_heads, -1)).flatten(3)
        gate_q = self.norm_q(torch.einsum("blhd,hde->blhe", joined, self.of_q))
        gate_k = self.norm_k(torch.einsum("blhd,hde->blhe", self.pool(k), self.of_k))
        q_pos = torch.arange(Lq, device=q.device) + Lk - Lq
        k_pos = torch.arange(gate_k.shape[1], device=q.device) * self.block
        return rotate(gate_q, q_pos, self.base), rotate(gate_k, k_pos, self.base)

    def pool(self, k: Tensor) -> Tensor:
        """[B, blocks, Hkv, 3 D]: largest, least and mean of every channel; the last block may be short."""
        if not k.shape[1]:
            return k.new_zeros(len(k), 0, k.shape[2], 3 * k.shape[3])
        pieces = k.split(self.block, dim=1)
        parts = [torch.cat([x.amax(1), x.amin(1), x.mean(1)], dim=-1) for x in pieces]
        return torch.stack(parts, dim=1)


def block_targets(q: Tensor, k: Tensor, block: int) -> Tensor:
    """What a gate should say: the largest weight of a block in the dense causal map, largest over the
    query heads of a key head, over the earlier blocks, made to add to 1.  [B, Hkv, Lq, blocks]

    Rows without an earlier block are 0.  The map is computed some queries at a time.
    """
    need_tensors(q=q, k=k)
    check_values(block_targets, {"block": block})
    need_shape("q", q, (-1, -1, -1, -1), like=q)
    need_shape("k", k, (len(q), -1, -1, q.shape[3]), like=q)
    need_dtype(q, k=k)
    Lq, Lk, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    blocks = -(-Lk // block)
    keys = spread_heads(k, q.shape[2])
    owner = torch.arange(Lk, device=q.device) // block
    found = []
    with torch.no_grad():
        for first in range(0, Lq, _QUERIES_AT_ONCE):
            own = q[:, first : first + _QUERIES_AT_ONCE]
            row = torch.arange(own.shape[1], device=q.device) + first + Lk - Lq
            scores = torch.einsum("bihd,bjhd->bhij", own, keys) * q.shape[-1] ** -0.5
            hidden = torch.arange(Lk, device=q.device) > row[:, None]
            weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
            largest = weights.new_zeros(*weights.shape[:-1], blocks)
            largest.scatter_reduce_(-1, owner.expand_as(weights), weights, "amax")
            largest = largest.unflatten(1, (-1, groups)).amax(2)
            earlier = torch.arange(blocks, device=q.device) < (row // block)[:, None]
            found.append(largest.masked_fill(~earlier, 0.0))
    target = torch.cat(found, dim=2)
    total = target.sum(-1, keepdim=True)
    return target / torch.where(total == 0, 1.0, total)


def gate_loss(gate_q: Tensor, gate_k: Tensor, target: Tensor, Lk: int, block: int) -> Tensor:
    """Mean over rows with a target of KL(target || gate)."""
    gates = gate_blocks(gate_q, gate_k, Lk, block)
    need_tensors(target=target)
    need_shape("target", target, tuple(gates.shape), like=gates)
    some = target > 0
    ratio = torch.where(some, target, 1.0).log() - torch.where(some, gates, 1.0).log()
    rows = some.any(-1)
    return (target * ratio).sum(-1)[rows].mean() if bool(rows.any()) else gates.sum() * 0.0


def distil_gate(
    gate: SeerGate,
    batches: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]],
    *,
    rate: float = 1e-3,
) -> list[float]:
    """Trains a gate on a frozen model; returns the loss of every batch.

    batches: (q, k before rotary positions, q, k after them), which a model hands out as it runs.
    """
    if not isinstance(gate, SeerGate):
        raise OptionError("gate", f"a {type(gate).__name__}", "a SeerGate is needed")
    if not finite(rate) or rate <= 0:
        raise OptionError("rate", rate, "a number above 0 is needed")
    optimizer = torch.optim.AdamW(gate.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for batch in batches:
        if len(batch) != 4:
            needed = "q and k before rotary positions, and after them, are needed"
            raise OptionError("batches", f"{len(batch)} tensors", needed)
        raw_q, raw_k, q, k = batch
        target = block_targets(q, k, gate.block)
        gate_q, gate_k = gate(raw_q.detach(), raw_k.detach())
        loss = gate_loss(gate_q, gate_k, target, k.shape[1], gate.block)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@judged
def nosa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    importance: Tensor,
    *,
    block: int = 64,
    budget: int = 64,
    by_query: int = 16,
    window: int = 32,
    stride: int = 16,
    local_blocks: int = 2,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention with a learned weight per key, on blocks of which most do not depend on the query.

    o_i = softmax_j(s_ij + c_j) v_j over the listed blocks: `by_query` of them by the query's scores of mean
    keys over windows (softmax per head, summed over the heads of a key head, the largest window that touches
    the block), the first and the `local_blocks` last ones among them; the rest of `budget` by the
    largest mean c over windows.  Steps that follow each other share the second part, so that a cache
    fetches little.

    Shapes: q [B, L, Hq, D], k and v [B, L, Hkv, .], importance c [B, L, Hkv], a log-weight.
    Options: budget and by_query in blocks; window a multiple of stride, block a multiple of stride.
    Equals: dense causal attention with a key bias where budget covers all blocks.
    Paper: NOSA (2510.13602).
    """
    if local_blocks < 1:
        raise SelectionError("local_blocks", local_blocks, "at least 1, the own block, is needed")
    if by_query > budget or by_query < local_blocks + 1:
        raise SelectionError(
            "by_query",
            by_query,
            f"{local_blocks + 1} (first and local blocks) to {budget} are needed",
        )
    if window < 1 or window % stride or block % stride:
        raise SelectionError("stride", stride, f"a divisor of {window} and {block} is needed")
    need_shape("importance", importance, (k.shape[0], k.shape[1], k.shape[2]), like=k)
    with torch.no_grad():
        mask = _nosa_blocks(q, k, importance, block, budget, by_query, window, stride, local_blocks)
    selection = BlockSelection.from_block_mask(mask, 64 if q.shape[1] == 1 else 1, block)
    score = Softmax() + KeyBias(importance.transpose(1, 2))
    return attend(q, k, v, Blocks(selection) & Causal(), score, implementation=implementation)


def _nosa_blocks(
    q: Tensor, k: Tensor, c: Tensor, block: int, budget: int, by_query: int,
    window: int, stride: int, local_blocks: int,
) -> Tensor:  # fmt: skip
    """bool [B, Hkv, Lq, blocks]"""
    Lq, Lk, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    blocks = -(-Lk // block)
    position = torch.arange(Lq, device=q.device) + Lk - Lq
    own = (position // block)[:, None]
    index = torch.arange(blocks, device=q.device)
    visible = index <= own
    forced = (index == 0) | (index > own - local_blocks)
    windows = max(0, (Lk - window) // stride + 1)
    touch = _touching(windows, blocks, block, window, stride, q.device)
    if windows:
        means = k.unfold(1, window, stride).mean(-1)  # [B, windows, Hkv, D]
        scores = torch.einsum(
            "bihd,bjhd->bhij", q, spread_heads(means, q.shape[2])
        ) * q.shape[-1] ** -0.5  # fmt: skip
        seen = torch.arange(windows, device=q.device) * stride + window - 1 <= position[:, None]
        weights = torch.softmax(
            scores.masked_fill(~seen, -torch.inf), dim=-1
        ).nan_to_num(0.0).unflatten(1, (-1, groups)).sum(2)  # fmt: skip
        of_c = c.unfold(1, window, stride).mean(-1).transpose(1, 2)[:, :, None]
        by_score = _largest_window(weights, touch)
        by_weight = _largest_window(of_c.masked_fill(~seen, -torch.inf), touch)
    else:
        by_score = by_weight = q.new_zeros(q.shape[0], k.shape[2], Lq, blocks)
    first = ranks(by_score.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf))
    chosen = (first < by_query) & visible
    rest = ranks(by_weight.masked_fill(chosen | ~visible, -torch.inf))
    return chosen | ((rest < budget - by_query) & visible & ~chosen)


def _touching(
    windows: int, blocks: int, block: int, window: int, stride: int, device: torch.device
) -> Tensor:
    """Whether a window shares tokens with a block.  bool [blocks, windows]"""
    start = torch.arange(windows, device=device) * stride
    begin = torch.arange(blocks, device=device)[:, None] * block
    return (start < begin + block) & (start + window > begin)


def _largest_window(x: Tensor, touch: Tensor) -> Tensor:
    """[..., blocks] of x [..., windows]; -inf where no window touches the block."""
    parts = [
        x[..., row].amax(-1) if bool(row.any()) else x.new_full(x.shape[:-1], -torch.inf)
        for row in touch
    ]
    return torch.stack(parts, dim=-1)


class NosaImportance(nn.Module):
    """c_j = A_h softplus(w_h . v_j) of the values of all heads of a token.

    Shapes: v [B, L, Hkv, Dv] gives c [B, L, Hkv].
    """

    def __init__(self, kv_heads: int, value_dim: int) -> None:
        super().__init__()
        self.of_values = nn.Linear(kv_heads * value_dim, kv_heads, bias=False)
        self.rate = nn.Parameter(torch.ones(kv_heads))

    def forward(self, v: Tensor) -> Tensor:
        c: Tensor = self.rate * torch.nn.functional.softplus(self.of_values(v.flatten(2)))
        return c


@judged
def polar_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    heads: int,
    causal: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Attention of the best heads of every sequence; the others give 0.

    Shapes: q [B, L, Hq, D], k and v [B, Lk, Hkv, .], scores [B, Hkv] of a router; query heads go with
    their key head.
    Options: heads, how many key heads are kept, 1 ... Hkv.
    Cost: heads / Hkv of dense: the tensors of the kept heads are gathered.
    Equals: dense attention at heads = Hkv.
    Paper: Polar Sparsity (2505.14884).
    """
    kv_heads = k.shape[2]
    if not 1 <= heads <= kv_heads:
        raise SelectionError("heads", heads, f"1 to {kv_heads} key heads are needed")
    need_shape("scores", scores, (q.shape[0], kv_heads), like=q)
    groups = q.shape[2] // kv_heads
    kept = (ranks(scores.detach()) < heads).nonzero()[:, 1].view(len(scores), heads)
    own = (kept[..., None] * groups + torch.arange(groups, device=q.device)).flatten(1)
    q_own, k_own, v_own = (_heads(x, index) for x, index in ((q, own), (k, kept), (v, kept)))
    pattern = Causal() if causal else None
    o = (
        attend(q_own, k_own, v_own, implementation=implementation)
        if pattern is None
        else attend(q_own, k_own, v_own, pattern, implementation=implementation)
    )
    place = own[:, None, :, None].expand(-1, o.shape[1], -1, o.shape[3])
    return o.new_zeros(*q.shape[:3], o.shape[3]).scatter(2, place, o)


def _heads(x: Tensor, index: Tensor) -> Tensor:
    """x [B, L, H, D] at heads index [B, n]"""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
