"""Linear attention and recurrent states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._scan import scan
from foveal.features import alibi_slopes, taylor
from foveal.layers.recurrent import (
    BasedAttention,
    GatedDeltaNet,
    KimiDeltaAttention,
    LightningAttention,
    MLSTMLayer,
)
from foveal.rules import MLSTM, Additive, Delta
from foveal.systems.base import Claim, Draw, Identity, System


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


def based(q: Tensor, k: Tensor, v: Tensor, *, implementation: str | None = None) -> Tensor:
    """o_i = sum_j<=i w_ij v_j / sum_j<=i w_ij, w = 1 + z + z^2 / 2, z = q_i . k_j / sqrt(D)."""
    return scan(
        taylor(q), taylor(k), v, Additive(normalised=True), scale=1.0, implementation=implementation
    )


def _tokens(draw: Draw, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return draw.qkv((draw.integer(3, 70),), heads=heads)


def _equal_channels(draw: Draw) -> Claim:
    q, k, v = _tokens(draw)
    decay, gate = -draw.normal(*v.shape[:3]).abs(), draw.normal(*v.shape[:3]).sigmoid()
    return Claim(
        (q, k, v, decay, gate),
        lambda q, k, v, g, b: delta_attention(q, k, v, g[..., None].expand_as(k), b),
        delta_attention,
    )


def _no_decay(draw: Draw) -> Claim:
    q, k, v = _tokens(draw)
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
    q, k, v = _tokens(draw)
    steps = torch.arange(v.shape[1])
    between = (steps[:, None] - steps).clamp(min=0)

    def quadratic(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        weights = torch.exp(slopes[:, None, None] * between).tril()
        return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k) * weights, v)

    return Claim((q, k, v, -draw.normal(2).abs()), lightning, quadratic)


def _mlstm_quadratic(draw: Draw) -> Claim:
    q, k, v = _tokens(draw)
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


def _second_order(draw: Draw) -> Claim:
    q, k, v = _tokens(draw)

    def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        weights = (1 + z + z.square() / 2).tril()
        return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)

    return Claim((q, k, v), based, quadratic)


_LONG = {"grid": (32768,), "heads": 16, "kv_heads": 16, "head_dim": 128}

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
    reference_shapes=(_LONG,),
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
    reference_shapes=(_LONG,),
    family="state",
    engine="state",
)

LIGHTNING_ATTENTION = System(
    name="lightning_attention",
    title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths",
    year=2024,
    paper="Qin et al.; arXiv 2401.04658. The layer: TransNormerLLM; arXiv 2307.14995",
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
    reference_shapes=(_LONG,),
    family="state",
    engine="state",
)

MLSTM_SYSTEM = System(
    name="mlstm",
    title="Tiled Flash Linear Attention: More Efficient Linear RNN and xLSTM Kernels",
    year=2025,
    paper="Beck et al.; arXiv 2503.14376. The cell: xLSTM; arXiv 2405.04517",
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
    reference_shapes=(_LONG,),
    family="state",
    engine="state",
)

BASED = System(
    name="based",
    title="Simple linear attention language models balance the recall-throughput tradeoff",
    year=2024,
    paper="Arora et al.; arXiv 2402.18668",
    kind="operator",
    summary="Linear attention whose weights are the exponential up to second order.",
    op=based,
    layer=BasedAttention,
    identities=(
        Identity("second_order", "The weights are 1 + z + z^2 / 2, normalised.", _second_order),
    ),
    reference_shapes=({"grid": (4096,), "heads": 16, "kv_heads": 16, "head_dim": 16},),
    family="state",
    engine="state",
)

SYSTEMS: tuple[System, ...] = (KDA, GATED_DELTANET, LIGHTNING_ATTENTION, MLSTM_SYSTEM, BASED)
