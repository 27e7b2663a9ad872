"""Attention on tokens that learned scores keep: cores of groups, top-k keys, lifetimes of keys."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import SelectionError, ShapeError
from foveal._judged import judged, need_shape, need_square
from foveal._shares import share_of
from foveal.compose.merge import merge
from foveal.layers.trainable_sparse_blocks import ranks, spread_heads
from foveal.patterns import Rows, Sliding

GateOn = Literal["k", "v", "both"]
_QUERIES_AT_ONCE = 128


@judged
def core_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int = 16,
    window: int = 1024,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention to recent tokens and to one core token per group of older ones, in one softmax.

    A group's core key and value are sums with the weights softmax_{j in group}(s(q_last, k_j)) of its last
    token, per query head.  Token t (from 1) sees the cores of groups 1 ... floor((t - window) / group) and
    every token after them, so that each visible token counts exactly once.

    Shapes: q [B, L, Hq, D], k and v [B, L, Hkv, .].
    Cost: about (window + L / group) / L of causal, twice.
    Equals: causal attention at group = 1, and where window >= L.
    Paper: CCA-Attention (2412.12465).
    """
    length, heads = q.shape[1], q.shape[2]
    if group < 1 or window < 1:
        raise SelectionError("group", (group, window), "group and window of at least 1 are needed")
    need_square(q, k)
    token = torch.arange(length)
    cores = ((token + 1 - window).clamp_min(0) // group).clamp(max=length // group)
    near = Rows(cores * group, token + 1)
    o, lse = attend(q, k, v, near, return_lse=True, implementation=implementation)
    count = int(cores[-1]) if length else 0
    if count == 0:
        return o
    inside = slice(0, count * group)
    last = q[:, group - 1 : count * group : group]  # [B, count, Hq, D]
    k_groups, v_groups = (
        spread_heads(x, heads)[:, inside].unflatten(1, (count, group)) for x in (k, v)
    )
    scores = torch.einsum("bnhd,bnghd->bnhg", last, k_groups) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, dim=-1)
    k_core, v_core = (
        torch.einsum("bnhg,bnghd->bnhd", weights, x).to(q.dtype) for x in (k_groups, v_groups)
    )
    far = Rows(torch.zeros_like(cores), cores)
    o_far, lse_far = attend(q, k_core, v_core, far, return_lse=True, implementation=implementation)
    return merge((o, o_far), (lse, lse_far))[0]


class _SparseK(torch.autograd.Function):
    """clip(u - tau, 0, 1) with sum k over the last axis; -inf entries are not there."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: int) -> Tensor:
        p = torch.where(u == -torch.inf, 0.0, u)
        order = torch.sort(u, dim=-1, descending=True).values
        count = (u > -torch.inf).sum(-1, keepdim=True)
        # tau lies between two of the places where an entry reaches 0 or 1: bisection over them.
        low, high = order[..., -1:], order[..., :1]
        low = torch.where(low == -torch.inf, p.amin(-1, keepdim=True), low) - 1
        for _ in range(80):
            middle = (low + high) / 2
            total = (u - middle).clamp(0.0, 1.0).sum(-1, keepdim=True)
            low, high = torch.where(total >= k, middle, low), torch.where(total < k, middle, high)
        inner = ((u - low) > 0) & ((u - low) < 1)
        ones = ((u - low) >= 1).sum(-1, keepdim=True)
        many = inner.sum(-1, keepdim=True)
        exact = (torch.where(inner, u, 0.0).sum(-1, keepdim=True) - (k - ones)) / many.clamp_min(1)
        tau = torch.where(many > 0, exact, low)
        p = torch.where(count <= k, (u > -torch.inf).to(u.dtype), (u - tau).clamp(0.0, 1.0))
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        inner = ((p > 0) & (p < 1)).to(p.dtype)
        total = inner.sum(-1, keepdim=True)
        mean = (inner * dp).sum(-1, keepdim=True) / total.clamp_min(1.0)
        return inner * (dp - mean), None


def sparse_k(u: Tensor, k: int) -> Tensor:
    """argmin of |p - u|^2 over 0 <= p <= 1 with sum p = k, over the last axis: clip(u - tau, 0, 1).

    Entries of -inf are not there; where at most k are, p is 1 on them.
    Jacobian: diag(r) - r r^T / sum r with r = 1 where 0 < p < 1.
    Equals: hard top-k where the k-th and next score differ by at least 1.
    Paper: SPARSEK attention (2406.16747).
    """
    if k < 1:
        raise SelectionError("k", k, "at least 1 is needed")
    p: Tensor = _SparseK.apply(u, k)  # type: ignore[no-untyped-call]
    return p


@judged
def sparsek_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    keys: int = 256,
    window: int = 0,
    gate_on: GateOn = "v",
    implementation: str | None = None,
) -> Tensor:
    """Causal attention on the `keys` best keys so far by a learned score per key, and on a window.

    At step t, p_t = sparse_k(u_1 ... u_t), and softmax runs over the keys with p_tj > 0 outside the window
    and all keys inside it; keys or values (or both) are multiplied by p_tj, which is how u learns.

    Shapes: q [B, L, Hq, D], k and v [B, L, Hkv, .], scores u [B, L, Hkv].
    Options: keys >= 1; window, the query's own token included, whose keys always count, with factor 1.
    Cost: that of causal attention, some queries at a time: the set differs from query to query.
    Equals: causal attention where keys >= L or window >= L.
    Paper: SPARSEK attention (2406.16747).
    """
    if gate_on not in ("k", "v", "both"):
        raise SelectionError("gate_on", gate_on, '"k", "v" or "both" is needed')
    need_square(q, k)
    need_shape("scores", scores, (k.shape[0], k.shape[1], k.shape[2]), like=k)
    length, heads = q.shape[1], q.shape[2]
    k_all, v_all = spread_heads(k, heads), spread_heads(v, heads)
    # Scores may come from a router in float32; tau is found in at least that.
    u = scores.to(torch.promote_types(scores.dtype, torch.float32)).transpose(1, 2)
    u = u.repeat_interleave(heads // scores.shape[2], dim=1)  # [B, Hq, L]
    token = torch.arange(length, device=q.device)
    parts = []
    for first in range(0, length, _QUERIES_AT_ONCE):
        row = token[first : first + _QUERIES_AT_ONCE, None]
        stop = first + len(row)
        seen = token[:stop] <= row
        near = seen & (token[:stop] > row - window)
        p = sparse_k(u[:, :, None, :stop].masked_fill(~seen, -torch.inf), keys)
        p = torch.where(near, 1.0, p)
        hidden = ~((p > 0) & seen)
        p = p.to(q.dtype)
        s = torch.einsum("bihd,bjhd->bhij", q[:, first:stop], k_all[:, :stop])
        s = s * q.shape[-1] ** -0.5
        s = s * p if gate_on != "v" else s
        weights = torch.softmax(s.masked_fill(hidden, -torch.inf), dim=-1)
        weights = weights * p if gate_on != "k" else weights
        parts.append(torch.einsum("bhij,bjhd->bihd", weights, v_all[:, :stop]))
    return torch.cat(parts, dim=1)


def kept_tokens(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B, H, n] of the true entries of keep [B, H, L], ascending, and how many there are [B, H].

    Shorter lists are filled with tokens that are not kept.
    """
    counts = keep.sum(-1)
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
    return order[..., : int(counts.max()) if counts.numel() else 0], counts


class _StraightThrough(torch.autograd.Function):
    """v, with the gradient of v * score for the score: dL/dscore_j = dL/dv_j . v_j."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor, Tensor]:
        (v,) = ctx.saved_tensors
        return dv, (dv * v).sum(-1)


@judged
def learnable_token_eviction(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    window: int = 512,
    sink_tokens: int = 4,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention to a window, to the first tokens, and to every token with a score above 0.

    Shapes: q [B, L, Hq, D], k and v [B, L, Hkv, .], scores [B, L, Hkv], of which only the sign counts in
    the forward; its gradient is dL/dscore_j = dL/dv_j . v_j, as if v_j were multiplied by it.
    Options: window, the query's own token included; sink_tokens.
    Cost: (window + kept) / L of dense; kept keys are gathered and the two parts merged by their lse.
    Equals: dense causal attention where every score is above 0, a window with sinks where none is.
    Paper: learnable token eviction (2510.20787).
    """
    if window < 1:
        raise SelectionError("window", window, "at least 1 is needed")
    need_square(q, k)
    need_shape("scores", scores, (k.shape[0], k.shape[1], k.shape[2]), like=k)
    length = k.shape[1]
    v = _StraightThrough.apply(v, scores)  # type: ignore[no-untyped-call]
    near = Sliding(window - 1, 0)
    o, lse = attend(q, k, v, near, return_lse=True, implementation=implementation)
    if length <= window:
        return o
    token = torch.arange(length, device=q.device)
    keep = (scores > 0) | (token < sink_tokens)[:, None]
    far = _attend_kept(q, k, v, keep.transpose(1, 2), window, implementation)
    return o if far is None else merge((o, far[0]), (lse, far[1]))[0]


def _attend_kept(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, window: int, implementation: str | None
) -> tuple[Tensor, Tensor] | None:
    """Attention on kept tokens at least `window` back, batch by batch and head by head; None: none is.

    The kept tokens of a head ascend, so that a query sees the first few of them: an interval.
    """
    batch, length, kv_heads = k.shape[:3]
    groups = q.shape[2] // kv_heads
    index, counts = kept_tokens(keep)
    if index.numel() == 0:
        return None
    token = torch.arange(length, device=q.device)
    outputs, lses = [], []
    for n in range(batch):
        rows, row_lses = [], []
        for h in range(kv_heads):
            own = index[n, h, : int(counts[n, h])].contiguous()
            upper = torch.searchsorted(own, token - window, right=True)
            heads = slice(h * groups, (h + 1) * groups)
            o, lse = attend(
                q[n : n + 1, :, heads],
                k[n : n + 1, own, h : h + 1],
                v[n : n + 1, own, h : h + 1],
                Rows(torch.zeros_like(upper), upper),
                return_lse=True,
                implementation=implementation,
            )
            rows.append(o)
            row_lses.append(lse)
        outputs.append(torch.cat(rows, dim=2))
        lses.append(torch.cat(row_lses, dim=2))
    return torch.cat(outputs), torch.cat(lses)


class EvictionRouter(nn.Module):
    """Scores of `learnable_token_eviction`: three convolutions along the tokens, per key head.

    Shapes: forward(k before rotary positions [B, L, Hkv, D], v [B, L, Hkv, Dv]) gives scores [B, L, Hkv].
    Each has width 3 and sees one token ahead, so that the score of a token is known 3 tokens later;
    channels halve from one to the next.  The last bias is 0.5, so that training starts with all kept.
    Options: score, what becomes of the last number z: "relu" max(z, 0), so that a token which is dropped
    teaches nothing, or "sigmoid" sigmoid(z) - 1/2; both are above 0 where z is.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        score: Literal["relu", "sigmoid"] = "relu",
    ) -> None:
        super().__init__()
        if score not in ("relu", "sigmoid"):
            raise SelectionError("score", score, '"relu" or "sigmoid" is needed')
        self.score = score
        width = head_dim + value_dim
        if width % 4:
            raise ShapeError("head_dim", head_dim, "head_dim + value_dim divisible by 4 is needed")
        self.kv_heads = kv_heads
        sizes = (width, width // 2, width // 4, 1)
        self.steps = nn.ModuleList(
            nn.Conv1d(kv_heads * a, kv_heads * b, 3, padding=1, groups=kv_heads)
            for a, b in itertools.pairwise(sizes)
        )
        last = self.steps[-1]
        assert isinstance(last, nn.Conv1d)
        assert last.bias is not None
        nn.init.constant_(last.bias, 0.5)

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        x = torch.cat([k, v], dim=-1).flatten(2).transpose(1, 2)
        for number, step in enumerate(self.steps):
            x = step(x if number == 0 else torch.nn.functional.silu(x))
        z = x.transpose(1, 2)
        return torch.relu(z) if self.score == "relu" else torch.sigmoid(z) - 0.5


@judged
def monarch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: int,
    columns: int,
) -> Tensor:
    """Attention between tiles of rows x columns tokens, factored over rows and columns in one step.

    With tiles a (queries), f (keys), R[a,f,r,j,:] = softmax_l(s(q[a,r,j], k[f,r,l])), K = R k, Y = R v,
    eta = sum R ln R:  o[a,i,j] = sum_{f,r} softmax_{f,r}(s(q[a,i,j], K[a,f,r,j]) - eta) Y[a,f,r,j].

    Shapes: q, k, v [B, tiles * rows * columns, H, .]; tokens of a tile are consecutive, row by row.
    Cost: rows * columns * (rows + columns) pairs per two tiles instead of (rows * columns)^2.
    Equals: dense attention at rows = 1 or columns = 1.
    Paper: MonarchRT (2602.12271).
    """
    size = rows * columns
    if min(rows, columns) < 1 or q.shape[1] % size or k.shape[1] % size:
        raise ShapeError("q", list(q.shape), f"whole tiles of {rows} x {columns} tokens are needed")
    heads, scale = q.shape[2], q.shape[-1] ** -0.5
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    q, k, v = (x.unflatten(1, (-1, rows, columns)).movedim(4, 1) for x in (q, k, v))
    outputs = []
    for own in q.unbind(2):  # [B, H, rows, columns, D]
        r_logits = torch.einsum("bhrjd,bhfrld->bhfrjl", own, k) * scale
        r_log = torch.log_softmax(r_logits, dim=-1)
        r = r_log.exp()
        eta = (r * r_log).sum(-1)
        keys = torch.einsum("bhfrjl,bhfrld->bhfrjd", r, k)
        values = torch.einsum("bhfrjl,bhfrld->bhfrjd", r, v)
        logits = torch.einsum("bhijd,bhfrjd->bhijfr", own, keys) * scale
        logits = logits - eta.permute(0, 1, 4, 2, 3)[:, :, None]
        weights = torch.softmax(logits.flatten(4), dim=-1).unflatten(4, logits.shape[4:])
        outputs.append(torch.einsum("bhijfr,bhfrjd->bhijd", weights, values))
    return torch.stack(outputs, dim=2).movedim(1, 4).flatten(1, 3)


def representation_shift(before: Tensor, after: Tensor) -> Tensor:
    """How far a layer moved each token: ||F(x)_i - x_i||_2.  [B, L] of x and F(x) [B, L, dim]

    Needs no attention map, and so goes with every kernel.
    Paper: representation shift (2508.00367).
    """
    shift: Tensor = (after - before).norm(dim=-1)
    return shift


def drop_tokens(x: Tensor, shift: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The tokens of x [B, L, dim] that moved most, in their order, and their indices [B, n].

    Options: keep in (0, 1], share of the tokens, rounded up.
    """
    if not 0 < keep <= 1:
        raise SelectionError("keep", keep, "a share in (0, 1] is needed")
    count = max(1, share_of(x.shape[1], keep))
    kept = (ranks(shift.detach()) < count).nonzero()[:, 1].view(len(x), count)
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), kept
