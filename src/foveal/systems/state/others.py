"""Linear without a recurrence of features: landmarks, sets, pooling, chunk summaries, condensed histories."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.layers import (
    InducedSetAttention,
    PoNetMixer,
    RATAttention,
    SOFTAttention,
    TLinFormerBlock,
)
from foveal.layers.condensed import tlinformer
from foveal.layers.inducing import set_attention
from foveal.layers.landmarks import soft
from foveal.layers.pooling import ponet
from foveal.layers.rat import rat
from foveal.patterns import Causal, Dense
from foveal.scores import Softmax
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.state.recurrences import tokens


def _dense_gaussian(draw: Draw) -> Claim:
    # Far apart, so that the kernel is easy to invert.
    far = 2 * torch.eye(4, 3, dtype=torch.float64)[:, None]
    x, v = far + 0.3 * draw.normal(2, 4, 2, 3), draw.normal(2, 4, 2, 4)

    def converged(x: Tensor, v: Tensor) -> Tensor:
        return soft(x, v, x, ridge=0.0, iterations=60, scale=1.0)

    def dense(x: Tensor, v: Tensor) -> Tensor:
        squares = (x[:, :, None] - x[:, None]).square().sum(-1)
        return torch.einsum("bijh,bjhd->bihd", torch.exp(-squares / 2), v)

    return Claim((x, v), converged, dense)


def _linear_in_values(draw: Draw) -> Claim:
    x, v, w = (draw.normal(2, 9, 2, 3) for _ in range(3))
    return Claim(
        (x, v, w),
        lambda x, v, w: soft(x, v + 2 * w, ratio=2, ridge=1.0),
        lambda x, v, w: soft(x, v, ratio=2, ridge=1.0) + 2 * soft(x, w, ratio=2, ridge=1.0),
    )


def _members(draw: Draw) -> Claim:
    q, k, _ = tokens(draw)
    v, order = draw.normal(*k.shape), draw.permutation(k.shape[1])
    return Claim(
        (q, k, v), lambda q, k, v: set_attention(q, k[:, order], v[:, order]), set_attention
    )


def _residual(draw: Draw) -> Claim:
    q, k, _ = tokens(draw)
    v = draw.normal(*k.shape)
    return Claim(
        (q, k, v),
        set_attention,
        lambda q, k, v: q + attend(q, k, v, Dense(), Softmax(scale=6**-0.5)),
    )


def _parts(draw: Draw) -> tuple[Tensor, ...]:
    length = draw.integer(1, 12)
    return tuple(draw.normal(2, length, 2, 3) for _ in range(5))


def _one_token_segments(draw: Draw) -> Claim:
    """Segments of one token leave each token its own `segment`."""
    q, k, o, segment, local = _parts(draw)

    def without(q: Tensor, k: Tensor, o: Tensor, segment: Tensor, local: Tensor) -> Tensor:
        blank = torch.full_like(segment, 0.0)
        return ponet(q, k, o, blank, local) + segment * o

    return Claim((q, k, o, segment, local), lambda *parts: ponet(*parts, segment_length=1), without)


def _reversed_sequence(draw: Draw) -> Claim:
    """Pooling has no direction."""
    parts = _parts(draw)
    length = parts[0].shape[1]
    segments = torch.arange(length) // 3
    return Claim(
        parts,
        lambda *parts: ponet(*(x.flip(1) for x in parts), segments=segments.flip(0)).flip(1),
        lambda *parts: ponet(*parts, segments=segments),
    )


def _chunks_of_one(draw: Draw) -> Claim:
    q, k, _ = tokens(draw)
    v, gate = draw.normal(*k.shape), draw.normal(*k.shape).sigmoid()
    return Claim(
        (q, k, v, gate),
        lambda *inputs: rat(*inputs, chunk=1),
        lambda q, k, v, g: attend(q, (1 - g) * k, (1 - g) * v, Causal()),
    )


def _one_chunk(draw: Draw) -> Claim:
    """Chunks as long as the sequence are a recurrence."""
    q, k, _ = tokens(draw)
    v, gate = draw.normal(*k.shape), draw.normal(*k.shape).sigmoid()

    def recurrence(v: Tensor, g: Tensor) -> Tensor:
        rows, state = [], torch.zeros_like(v[:, 0])
        for t in range(v.shape[1]):
            state = g[:, t] * state + (1 - g[:, t]) * v[:, t]
            rows.append(state)
        return torch.stack(rows, dim=1)

    return Claim((v, gate), lambda v, g: rat(q, k, v, g, chunk=len(q[0])), recurrence)


def _no_history(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    return Claim(
        (q, k, v),
        lambda q, k, v: tlinformer(q, k, v, window=q.shape[1]),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _two_softmaxes(draw: Draw) -> Claim:
    """The window sees the history as if it were alone, and itself as if there were none."""
    q, k, v = tokens(draw)
    window = draw.integer(1, q.shape[1] - 1)
    past = q.shape[1] - window

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = attend(q[:, past:], k[:, :past], v[:, :past])
        near = attend(q[:, past:], k[:, past:], v[:, past:], Causal())
        return torch.cat([attend(q[:, past - 1 : past], k[:, :past], v[:, :past]), far + near], 1)

    return Claim((q, k, v), lambda *qkv: tlinformer(*qkv, window=window, observed=1), apart)


SOFT = System(
    name="soft",
    title="Softmax-free Linear Transformers",
    year=2022,
    paper="Lu et al., NeurIPS 2021 (arXiv 2110.11945), IJCV; arXiv 2207.03341",
    kind="operator",
    summary="Gaussian-kernel attention of tokens to themselves, by landmarks and a Newton inverse.",
    op=soft,
    layer=SOFTAttention,
    identities=(
        Identity(
            "all_landmarks",
            "With all tokens as landmarks it is dense Gaussian attention.",
            _dense_gaussian,
        ),
        Identity("linear", "It is linear in the values.", _linear_in_values),
    ),
    reference_shapes=({"grid": (56, 56), "heads": 2, "kv_heads": 2, "head_dim": 32},),
    family="state",
    engine="torch",
)

SET_TRANSFORMER = System(
    name="set_transformer",
    title="Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks",
    year=2019,
    paper="Lee et al., ICML; arXiv 1810.00825. Layers: also SetAttentionBlock, SetPooling",
    kind="operator",
    summary="Attention between sets with the query as residual; learned points make it linear.",
    op=set_attention,
    layer=InducedSetAttention,
    identities=(
        Identity("members", "The order of the keys does not matter.", _members),
        Identity("residual", "It is q plus attention with the scale of all heads.", _residual),
    ),
    reference_shapes=({"grid": (1024,), "heads": 4, "kv_heads": 4, "head_dim": 32},),
    family="state",
    engine="tile",
)

PONET = System(
    name="ponet",
    title="PoNet: Pooling Network for Efficient Token Mixing in Long Sequences",
    year=2021,
    paper="Tan et al., ICLR 2022; arXiv 2110.02442",
    kind="operator",
    summary="A global, a segment and a local summary by pooling, fused with the token.",
    op=ponet,
    layer=PoNetMixer,
    identities=(
        Identity("segments", "In segments of one token each keeps its own.", _one_token_segments),
        Identity("direction", "Pooling has no direction.", _reversed_sequence),
    ),
    reference_shapes=({"grid": (4096,), "heads": 1, "kv_heads": 1, "head_dim": 768},),
    family="state",
    engine="torch",
)

RAT = System(
    name="rat",
    title="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
    year=2025,
    paper="Wei et al.; arXiv 2507.04416",
    kind="operator",
    summary="A gated recurrence inside chunks; softmax over the ends of earlier chunks and the own "
    "summary.",
    op=rat,
    layer=RATAttention,
    identities=(
        Identity("attention", "Chunks of one token are causal attention.", _chunks_of_one),
        Identity("recurrence", "One chunk is the recurrence alone.", _one_chunk),
    ),
    reference_shapes=({"grid": (4096,), "heads": 16, "kv_heads": 16, "head_dim": 128},),
    family="state",
    engine="tile",
)

TLINFORMER = System(
    name="tlinformer",
    title="Rethinking Transformer Connectivity: TLinFormer, A Path to Exact, Full Context-Aware "
    "Linear Attention",
    year=2025,
    paper="Tang; arXiv 2508.20407",
    kind="operator",
    summary="The end of the history condenses all of it by exact softmax; new tokens see that and "
    "themselves.",
    op=tlinformer,
    layer=TLinFormerBlock,
    identities=(
        Identity("no_history", "Without a history it is causal attention.", _no_history),
        Identity("two_softmaxes", "The window adds two softmaxes of their own.", _two_softmaxes),
    ),
    reference_shapes=({"grid": (4096,), "heads": 8, "kv_heads": 8, "head_dim": 64},),
    family="state",
    engine="tile",
)
