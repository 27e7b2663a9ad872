"""Recurrences with decays: the delta rule, Lightning Attention, xLSTM, TransNormer, Titans."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._errors import ShapeError
from foveal._judged import judged_alone
from foveal._scan import scan
from foveal.features import alibi_slopes, linear_relative
from foveal.layers import (
    GatedDeltaNet,
    KimiDeltaAttention,
    LightningAttention,
    MLSTMLayer,
    TitansMemory,
    TransNormerBlock,
    TransNormerLLMBlock,
)
from foveal.layers.lightning import norm_attention
from foveal.rules import MLSTM, Additive, Delta, TwoState
from foveal.systems.base import Claim, Draw, Identity, System


@judged_alone
def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    *,
    unit: bool = True,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """o [B, L, Hv, Dv] by the delta rule; `unit` first divides q and k by their norms."""
    if unit:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return scan(
        q,
        k,
        v,
        Delta(),
        log_decay=log_decay,
        write_gate=write_gate,
        scale=scale,
        implementation=implementation,
    )


@judged_alone
def lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Tensor:
    """o [B, L, H, Dv] with a fixed decay per head, by default `alibi_slopes`."""
    if log_decay is None:
        log_decay = alibi_slopes(v.shape[2]).to(v)
    return scan(
        q, k, v, Additive(), log_decay=log_decay, scale=scale, implementation=implementation
    )


@judged_alone
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor | None = None,
    write: Tensor | None = None,
    *,
    rule: MLSTM = MLSTM(),
    implementation: str | None = None,
) -> Tensor:
    """o [B, L, H, Dv]; forget and write are pre-activations [B, L, H] of the gates, 0 by default."""
    zero = torch.zeros_like(v[..., 0])
    return scan(
        q,
        k,
        v,
        rule,
        log_decay=F.logsigmoid(zero if forget is None else forget),
        write_gate=zero if write is None else write,
        implementation=implementation,
    )


@judged_alone
def transnormer_llm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor:
    """o_t = sum_j exp(log_decay (t - j)) sum_d q_td k_jd cos((t - j) angles_d) v_j, causal.

    Shapes: q and k [B, L, H, D], v [B, L, H, Dv]; angles [H, D], by default 10000^(-2 d / D);
    log_decay [H], by default `alibi_slopes`.
    """
    if q.dim() != 4 or k.shape != q.shape:
        needed = f"the shape of q, {list(q.shape)}, is needed, [B, L, H, D]"
        raise ShapeError("k", list(k.shape), needed)
    if angles is None:
        dim = q.shape[-1]
        speeds = 10000.0 ** (-2 * torch.arange(dim, dtype=torch.float64) / dim)
        angles = speeds.to(q).expand(q.shape[2], -1)
    places = torch.arange(q.shape[1], device=q.device)
    q, k = (linear_relative(x, places, angles) for x in (q, k))
    return lightning(q, k, v, log_decay, implementation=implementation)


@judged_alone
def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    log_momentum: Tensor | None = None,
    *,
    chunk: int = 1,
    unit: bool = True,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Tensor:
    """o [B, L, H, Dv] of a linear memory that learns v under k by descent with momentum: `TwoState`.

    Shapes: gates [B, L, H], in logarithms but for write_gate, twice the step size.
    Options: chunk tokens take their gradients at one memory; `unit` first divides q and k by their norms.
    """
    if unit:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return scan(
        q,
        k,
        v,
        TwoState(chunk),
        log_decay=log_decay,
        write_gate=write_gate,
        log_momentum=log_momentum,
        scale=scale,
        implementation=implementation,
    )


def tokens(draw: Draw, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return draw.qkv((draw.integer(3, 70),), heads=heads)


def _equal_channels(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    decay, gate = -draw.normal(*v.shape[:3]).abs(), draw.normal(*v.shape[:3]).sigmoid()
    return Claim(
        (q, k, v, decay, gate),
        lambda q, k, v, g, b: delta_attention(q, k, v, g[..., None].expand_as(k), b),
        delta_attention,
    )


def _no_decay(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    return Claim(
        (q, k, v),
        lambda q, k, v: delta_attention(q, k, v, torch.zeros_like(v[..., 0])),
        delta_attention,
    )


def _stored(draw: Draw) -> Claim:
    basis = torch.linalg.qr(draw.normal(6, 6)).Q
    k = torch.cat([basis, basis])[None, :, None]

    def read(v: Tensor) -> Tensor:
        gate = torch.cat([torch.ones(6, dtype=v.dtype), torch.zeros(6, dtype=v.dtype)])
        twice = torch.cat([v, v], dim=1)
        return delta_attention(k, k, twice, None, gate[None, :, None], scale=1.0)[:, 6:]

    return Claim((draw.normal(1, 6, 1, 4),), read, lambda v: v)


def _lightning_quadratic(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    steps = torch.arange(v.shape[1])
    between = (steps[:, None] - steps).clamp(min=0)

    def quadratic(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        weights = torch.exp(slopes[:, None, None] * between).tril()
        return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k) * weights, v)

    return Claim((q, k, v, -draw.normal(2).abs()), lightning, quadratic)


def _mlstm_quadratic(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    forget, write = draw.normal(*v.shape[:3]), draw.normal(*v.shape[:3]) - 2

    def quadratic(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor) -> Tensor:
        sums = F.logsigmoid(forget).cumsum(1).transpose(1, 2)
        rows = sums[..., :, None] - sums[..., None, :] + write.transpose(1, 2)[..., None, :]
        hidden = torch.ones_like(rows[0, 0], dtype=torch.bool).triu(1)
        weights = torch.exp(rows.masked_fill(hidden, -torch.inf))
        weights = weights * torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        total = weights.sum(-1, keepdim=True).abs().clamp(min=1.0)
        return torch.einsum("bhij,bjhd->bihd", weights / total, v)

    return Claim((q, k, v, forget, write), mlstm, quadratic)


def _sigmoid_quadratic(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    forget, write = draw.normal(*v.shape[:3]), draw.normal(*v.shape[:3])
    rule = MLSTM("sigmoid", normalised=False)

    def quadratic(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor) -> Tensor:
        sums = F.logsigmoid(forget).cumsum(1).transpose(1, 2)
        rows = sums[..., :, None] - sums[..., None, :]
        rows = rows + F.logsigmoid(write).transpose(1, 2)[..., None, :]
        hidden = torch.ones_like(rows[0, 0], dtype=torch.bool).triu(1)
        weights = torch.exp(rows.masked_fill(hidden, -torch.inf))
        weights = weights * torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    return Claim((q, k, v, forget, write), lambda *inputs: mlstm(*inputs, rule=rule), quadratic)


def _tiled(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    decay = -draw.normal(2).abs()
    return Claim(
        (q, k, v, decay),
        lightning,
        lambda *inputs: lightning(*inputs, implementation="reference"),
    )


def _norm_quadratic(draw: Draw) -> Claim:
    q, k, v = tokens(draw)

    def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bihd,bjhd->bhij", 1 + F.elu(q), 1 + F.elu(k)).tril()
        o = torch.einsum("bhij,bjhd->bihd", weights, v)
        return o / (o.square().mean((-2, -1), keepdim=True) + 1e-6).sqrt()

    return Claim((q, k, v), norm_attention, quadratic)


def _length_of_q(draw: Draw) -> Claim:
    """Without features the norm makes o independent of the size of v, up to what it adds."""
    q, k, v = tokens(draw)
    v = 1e6 * v
    return Claim(
        (q, k), lambda q, k: norm_attention(q, k, v), lambda q, k: norm_attention(q, k, 3 * v)
    )


def _no_angles(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    return Claim((q, k, v), lambda q, k, v: transnormer_llm(q, k, v, zero), lightning)


def _offset(draw: Draw) -> Claim:
    """Angles act on distances: tokens before that hold nothing change nothing."""
    q, k, v = tokens(draw)
    extra = draw.integer(1, 9)

    def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shifted = (F.pad(x, (0, 0, 0, 0, extra, 0)) for x in (q, k, v))
        return transnormer_llm(*shifted)[:, extra:]

    return Claim((q, k, v), late, transnormer_llm)


def _titans_is_delta(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    gate = draw.normal(*v.shape[:3]).sigmoid()
    return Claim(
        (q, k, v, gate),
        lambda q, k, v, b: titans(q, k, v, None, b),
        lambda q, k, v, b: delta_attention(q, k, v, None, b, scale=1.0),
    )


def _titans_is_linear(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    shape = v.shape[:3]
    decay, momentum = -draw.normal(*shape).abs(), -draw.normal(*shape).abs()

    def quadratic(q: Tensor, k: Tensor, v: Tensor, a: Tensor, e: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)

        def products(x: Tensor) -> Tensor:
            sums = x.cumsum(1).transpose(1, 2)
            return (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()

        weights = (products(a) @ products(e)) * torch.einsum("bihd,bjhd->bhij", q, k)
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    return Claim(
        (q, k, v, decay, momentum),
        lambda q, k, v, a, e: titans(q, k, v, a, None, e, chunk=q.shape[1]),
        quadratic,
    )


LONG = {"grid": (32768,), "heads": 16, "kv_heads": 16, "head_dim": 128}

KDA = System(
    name="kda",
    title="Kimi Linear: An Expressive, Efficient Attention Architecture",
    year=2025,
    paper="Kimi Team; arXiv 2510.26692",
    kind="operator",
    summary="The delta rule with a decay per channel: a key replaces what was stored under it.",
    op=delta_attention,
    layer=KimiDeltaAttention,
    identities=(
        Identity("equal_channels", "Equal channels are Gated DeltaNet.", _equal_channels),
        Identity("stored", "What was written under an orthonormal key is read back.", _stored),
    ),
    reference_shapes=(LONG,),
    family="state",
    engine="state",
)

GATED_DELTANET = System(
    name="gated_deltanet",
    title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    year=2024,
    paper="Yang, Kautz, Hatamizadeh; arXiv 2412.06464",
    kind="operator",
    summary="The delta rule with one decay per head and token.",
    op=delta_attention,
    layer=GatedDeltaNet,
    identities=(
        Identity("no_decay", "A log decay of 0 is DeltaNet, the rule without decay.", _no_decay),
        Identity("stored", "What was written under an orthonormal key is read back.", _stored),
    ),
    reference_shapes=(LONG,),
    family="state",
    engine="state",
)

LIGHTNING_ATTENTION = System(
    name="lightning_attention",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    year=2024,
    paper="Qin et al.; arXiv 2405.17381. The layer: TransNormerLLM; arXiv 2307.14995",
    kind="operator",
    summary="Linear attention with a fixed decay per head and no normaliser.",
    op=lightning,
    layer=LightningAttention,
    identities=(
        Identity(
            "quadratic",
            "It is (q k^T * exp(log_decay (i - j))) v below the diagonal.",
            _lightning_quadratic,
        ),
    ),
    reference_shapes=(LONG,),
    family="state",
    engine="state",
)

MLSTM_SYSTEM = System(
    name="mlstm",
    title="xLSTM: Extended Long Short-Term Memory",
    year=2024,
    paper="Beck et al.; arXiv 2405.04517",
    kind="operator",
    summary="A matrix memory with forget gate, exponential or sigmoid input gate and a normaliser.",
    op=mlstm,
    layer=MLSTMLayer,
    identities=(
        Identity(
            "quadratic",
            "It is attention with weights q k^T exp(F_i - F_j + x_j) over max(|their sum|, 1).",
            _mlstm_quadratic,
        ),
    ),
    reference_shapes=(LONG,),
    family="state",
    engine="state",
)

LIGHTNING_ATTENTION_2 = System(
    name="lightning_attention_2",
    title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large "
    "Language Models",
    year=2024,
    paper="Qin, Sun, Li, Shen, Sun, Zhong; arXiv 2401.04658",
    kind="operator",
    summary="Linear attention with a fixed decay per head, exact inside blocks, by a state between.",
    op=lightning,
    layer=LightningAttention,
    identities=(Identity("blocks", "In blocks it is the recurrence token by token.", _tiled),),
    reference_shapes=(LONG,),
    family="state",
    engine="state",
)

TFLA = System(
    name="tfla",
    title="Tiled Flash Linear Attention: More Efficient Linear RNN and xLSTM Kernels",
    year=2025,
    paper="Beck et al.; arXiv 2503.14376",
    kind="operator",
    summary="The mLSTM in large chunks that are tiled again inside, also with a sigmoid input gate.",
    op=mlstm,
    layer=MLSTMLayer,
    identities=(
        Identity(
            "sigmoid_quadratic",
            "With a sigmoid gate and no normaliser it is attention with weights "
            "q k^T exp(F_i - F_j) sigmoid(x_j).",
            _sigmoid_quadratic,
        ),
    ),
    reference_shapes=(LONG,),
    family="state",
    engine="state",
)

TRANSNORMER = System(
    name="transnormer",
    title="The Devil in Linear Transformer",
    year=2022,
    paper="Qin et al., EMNLP; arXiv 2210.10340",
    kind="operator",
    summary="Linear attention whose denominator is replaced by a norm of the output; softmax inside "
    "blocks in early layers.",
    op=norm_attention,
    layer=TransNormerBlock,
    identities=(
        Identity("quadratic", "It is RMSNorm(tril(phi(q) phi(k)^T) v).", _norm_quadratic),
        Identity("sizes", "The size of v does not matter.", _length_of_q),
    ),
    reference_shapes=({"grid": (4096,), "heads": 8, "kv_heads": 8, "head_dim": 64},),
    family="state",
    engine="state",
)

TRANSNORMER_LLM = System(
    name="transnormer_llm",
    title="Scaling TransNormer to 175 Billion Parameters",
    year=2023,
    paper="Qin et al.; arXiv 2307.14995",
    kind="model",
    summary="Linear attention with fixed decays and learned angles of relative position, simple norms "
    "and gates.",
    op=transnormer_llm,
    layer=TransNormerLLMBlock,
    identities=(
        Identity("no_angles", "With angles of 0 it is Lightning Attention.", _no_angles),
        Identity("offset", "Positions count as distances only.", _offset),
    ),
    reference_shapes=({"grid": (8192,), "heads": 16, "kv_heads": 16, "head_dim": 128},),
    family="state",
    engine="state",
)

TITANS_MEMORY = System(
    name="titans_memory",
    title="Titans: Learning to Memorize at Test Time",
    year=2025,
    paper="Behrouz, Zhong, Mirrokni; arXiv 2501.00663. Layers: also TitansMAC, TitansMAG, TitansMAL",
    kind="operator",
    summary="A linear memory that learns, while it reads, to recall values under keys, by descent with "
    "momentum and forgetting.",
    op=titans,
    layer=TitansMemory,
    identities=(
        Identity("delta", "Without momentum and decay it is DeltaNet.", _titans_is_delta),
        Identity(
            "one_chunk",
            "With all gradients at the empty memory it is linear attention, its weights those of two "
            "recurrences one behind the other.",
            _titans_is_linear,
        ),
    ),
    reference_shapes=({"grid": (4096,), "heads": 16, "kv_heads": 16, "head_dim": 64},),
    family="state",
    engine="state",
)
