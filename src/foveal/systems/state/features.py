"""Linear attention by feature maps, causal and over all keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._judged import judged
from foveal._scan import scan
from foveal.features import FeedForwardFeatures, SpectralFeatures, contract, positive_random, taylor
from foveal.layers import (
    AdvisorAttention,
    BasedAttention,
    CosFormerAttention,
    CottentionLayer,
    DiJiangAttention,
    FastAttention,
    FeedForwardKernelAttention,
    KernelisedRelativeAttention,
    L2ViTAttention,
    NaLaAttention,
    PerformerAttention,
    SpectralAttention,
)
from foveal.layers.feature_attention import (
    advised,
    cosformer,
    cottention,
    dijiang,
    dijiang_decays,
    fastmax,
    kernelised,
    performer,
)
from foveal.layers.relative import kernelised_relative
from foveal.layers.vision_linear import l2vit, nala
from foveal.rules import Additive
from foveal.scores import Softmax
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.state.recurrences import lightning, tokens


@judged
def based(q: Tensor, k: Tensor, v: Tensor, *, implementation: str | None = None) -> Tensor:
    """o_i = sum_j<=i w_ij v_j / sum_j<=i w_ij, w = 1 + z + z^2 / 2, z = q_i . k_j / sqrt(D)."""
    return scan(
        taylor(q), taylor(k), v, Additive(normalised=True), scale=1.0, implementation=implementation
    )


@judged
def spectral(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: SpectralFeatures | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j w_ij v_j / sum_j w_ij, w_ij = phi(q_i) . phi(k_j), phi with learned frequencies.

    Shapes: q, k, v [B, L, H, .].
    Options: feature_map is a `SpectralFeatures`, by default one as it is before training.
    """
    if feature_map is None:
        components = 2 if q.shape[-1] % 2 == 0 else 1
        feature_map = SpectralFeatures(q.shape[-1], components=components).to(q)
        feature_map.requires_grad_(False)
    return kernelised(
        q, k, v, feature_map=feature_map, causal=causal, implementation=implementation
    )


@judged
def feed_forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeedForwardFeatures | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j w_ij v_j / sum_j w_ij, w_ij = phi(q_i) . phi(k_j), phi a small net.

    Shapes: q, k, v [B, L, H, .].
    Options: feature_map is a `FeedForwardFeatures`; by default one layer whose map is the identity,
    so that phi(x) = log(1 + exp(x)).
    """
    if feature_map is None:
        feature_map = FeedForwardFeatures(q.shape[-1]).to(q).requires_grad_(False)
        torch.nn.init.eye_(feature_map.layers[0].weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(feature_map.layers[0].bias)  # type: ignore[arg-type]
    return kernelised(
        q, k, v, feature_map=feature_map, causal=causal, implementation=implementation
    )


def _by_weights(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)


def _second_order(draw: Draw) -> Claim:
    q, k, v = tokens(draw)

    def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return _by_weights((1 + z + z.square() / 2).tril(), v)

    return Claim((q, k, v), based, quadratic)


def _constant_keys(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    return Claim(
        (v,),
        lambda v: performer(q, k[:, :1].expand_as(k), v, epsilon=0.0),
        lambda v: v.mean(1, keepdim=True).expand_as(v),
    )


def _performer_causal(draw: Draw) -> Claim:
    """The state form with causality is the quadratic form with the same features."""
    q, k, v = tokens(draw)
    projection = draw.normal(7, 3)

    def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b = (positive_random(x, projection) for x in (q, k))
        return _by_weights(torch.einsum("bihd,bjhd->bhij", a, b).tril(), v)

    return Claim(
        (q, k, v),
        lambda *qkv: performer(*qkv, projection=projection, causal=True, epsilon=0.0),
        quadratic,
    )


def _cosines(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    q, k = q.abs(), k.abs()  # a row whose weights vanish has no normaliser

    def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(v.shape[1], dtype=v.dtype)
        cosines = torch.cos(math.pi * (at[:, None] - at) / (2 * len(at)))
        weights = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu()) * cosines
        return _by_weights(weights.tril(), v)

    return Claim((q, k, v), cosformer, quadratic)


def _no_reweighting(draw: Draw) -> Claim:
    """With a limit far beyond the length the cosines are 1."""
    q, k, v = tokens(draw)
    q, k = q.abs(), k.abs()
    return Claim(
        (q, k, v),
        lambda *qkv: cosformer(*qkv, limit=10**12, causal=False),
        lambda q, k, v: contract(q.relu(), k.relu(), v),
    )


def _first_key(draw: Draw) -> Claim:
    """Divided by a count of 1, both places of the norm agree on the first token."""
    q, k, v, power = *tokens(draw), draw.normal(2)
    return Claim(
        (q, k, v, power),
        lambda *inputs: cottention(*inputs, norm_at="key")[:, :1],
        lambda *inputs: cottention(*inputs)[:, :1],
    )


def _all_keys(draw: Draw) -> Claim:
    """The last token with causality is the last one without."""
    q, k, v, power = *tokens(draw), draw.normal(2)
    return Claim(
        (q, k, v, power),
        lambda *inputs: cottention(*inputs)[:, -1:],
        lambda *inputs: cottention(*inputs, causal=False)[:, -1:],
    )


def _uniform_features(draw: Draw) -> Claim:
    """Weights of 0 make all features equal: a decayed mean without attention."""
    q, k, v = tokens(draw)
    zero = torch.zeros(3, dtype=torch.float64)

    same, decays = torch.full_like(q, 1 / 3), dijiang_decays(2).to(v)
    return Claim(
        (v,),
        lambda v: dijiang(q, k, v, weights=zero),
        lambda v: lightning(same, same, v, decays),
    )


def _series(order: int) -> object:
    def draw_claim(draw: Draw) -> Claim:
        q, k, v = tokens(draw)

        def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (q, k))
            z = torch.einsum("bihd,bjhd->bhij", q, k)
            weights = 1 + z + (z.square() / 2 if order == 2 else 0)
            return _by_weights(weights, v)

        return Claim(
            (q, k, v),
            lambda *qkv: fastmax(*qkv, order=order, causal=False, normalise="unit"),
            quadratic,
        )

    return draw_claim


def _nala_plain(draw: Draw) -> Claim:
    """Without rotation it is attention by positive weights that sum to 1: constants stay."""
    q, k, v = tokens(draw)
    return Claim(
        (v,),
        lambda v: nala(q, k, v[:, :1].expand_as(v), rotary_base=None),
        lambda v: v[:, :1].expand_as(v),
    )


def _nala_shift(draw: Draw) -> Claim:
    """Turning depends on distances: a blank row in front changes nothing but its place."""
    q, k, v = draw.qkv((3, draw.integer(2, 5)))

    def later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blank = torch.zeros_like(q[:, :1])
        q, k = (torch.cat([blank, x], dim=1) for x in (q, k))
        v = torch.cat([torch.zeros_like(v[:, :1]), v], dim=1)
        return nala(q, k, v)[:, 1:]

    return Claim((q, k, v), later, nala)


def _l2_small(draw: Draw) -> Claim:
    """Below the floor nothing is normalised."""
    q, k, v = tokens(draw)
    q, k = 0.1 * q, 0.1 * k
    return Claim(
        (q, k, v),
        l2vit,
        lambda q, k, v: contract(q.relu(), k.relu(), v, normalised=False) * 3**-0.5 / 100,
    )


def _l2_large(draw: Draw) -> Claim:
    """Above the floor the size of q does not matter."""
    q, k, v = tokens(draw)
    q, k = q.abs() + 1, 100 * (k.abs() + 1)
    return Claim((q, k, v), l2vit, lambda q, k, v: l2vit(7 * q, k, v))


def _standard_spectrum(draw: Draw) -> Claim:
    """Frequencies with mean 0 and variance 1 are Performer's."""
    q, k, v = tokens(draw)
    features = SpectralFeatures(3, 6, components=1).double().requires_grad_(False)
    features.means.zero_()
    noise = features.noise
    return Claim(
        (q, k, v),
        lambda *qkv: spectral(*qkv, feature_map=features),
        lambda *qkv: performer(*qkv, projection=noise, epsilon=0.0),
    )


def _order_of_keys(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    order = draw.permutation(k.shape[1])
    return Claim(
        (q, k, v),
        lambda q, k, v: feed_forward_kernel(q, k[:, order], v[:, order]),
        feed_forward_kernel,
    )


def _forms(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    bias = draw.normal(2, 2 * q.shape[1] - 1)
    return Claim(
        (q, k, v, bias),
        lambda *inputs: kernelised_relative(*inputs, implementation="fft"),
        lambda *inputs: kernelised_relative(*inputs, implementation="pairs"),
    )


def _constant_bias(draw: Draw) -> Claim:
    """A bias that is the same for all distances cancels."""
    q, k, v = tokens(draw)
    same = torch.full((2, 2 * q.shape[1] - 1), 1.5, dtype=torch.float64)
    return Claim(
        (q, k, v),
        lambda q, k, v: kernelised_relative(q, k, v, same),
        lambda *qkv: kernelised_relative(*qkv, implementation="pairs"),
    )


def _advisors_are_tokens(draw: Draw) -> Claim:
    q, k, v = tokens(draw)
    projection = draw.normal(5, 3)
    return Claim(
        (q, k, v, draw.normal(4, 2, 3), draw.normal(4, 2, 4)),
        lambda *inputs: advised(*inputs, projection=projection),
        lambda q, k, v, a, b: performer(
            q,
            torch.cat([a.expand(2, -1, -1, -1), k], dim=1),
            torch.cat([b.expand(2, -1, -1, -1), v], dim=1),
            projection=projection,
        ),
    )


def _one_value(draw: Draw) -> Claim:
    """Softmax and its estimate agree where all values are the same."""
    q, k, v = tokens(draw)
    return Claim(
        (v,),
        lambda v: performer(q, k, v[:, :1].expand_as(v), epsilon=0.0),
        lambda v: attend(q, k, v[:, :1].expand_as(v), score=Softmax()),
    )


def _shape(length: int, heads: int, head_dim: int) -> tuple[dict[str, object], ...]:
    return ({"grid": (length,), "heads": heads, "kv_heads": heads, "head_dim": head_dim},)


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
    reference_shapes=_shape(4096, 16, 16),
    family="state",
    engine="state",
)

PERFORMER = System(
    name="performer",
    title="Rethinking Attention with Performers",
    year=2020,
    paper="Choromanski et al., ICLR 2021; arXiv 2009.14794",
    kind="operator",
    summary="Softmax attention estimated by positive orthogonal random features, linear in the length.",
    op=performer,
    layer=PerformerAttention,
    identities=(
        Identity("equal_keys", "Equal keys give the mean of the values.", _constant_keys),
        Identity("one_value", "Equal values come out, as from softmax.", _one_value),
        Identity("causal", "With causality it is the masked quadratic form.", _performer_causal),
    ),
    reference_shapes=_shape(4096, 8, 64),
    family="state",
    engine="state",
)

COSFORMER = System(
    name="cosformer",
    title="cosFormer: Rethinking Softmax in Attention",
    year=2022,
    paper="Qin et al., ICLR; arXiv 2202.08791",
    kind="operator",
    summary="Linear attention of rectified q and k whose weights fall with the cosine of the distance.",
    op=cosformer,
    layer=CosFormerAttention,
    identities=(
        Identity("cosines", "The weights are relu(q) . relu(k) cos(pi (i - j) / 2M).", _cosines),
        Identity("far_limit", "With a far limit positions do not count.", _no_reweighting),
    ),
    reference_shapes=_shape(4096, 8, 64),
    family="state",
    engine="state",
)

COTTENTION = System(
    name="cottention",
    title="Cottention: Linear Transformers With Cosine Attention",
    year=2024,
    paper="Mongaras, Dohm, Larson; arXiv 2409.18747",
    kind="operator",
    summary="Attention by cosines of q and k without softmax, divided by a learned power of the count.",
    op=cottention,
    layer=CottentionLayer,
    identities=(
        Identity("first_token", "On the first token both norms agree.", _first_key),
        Identity("last_token", "The last token sees all keys in both forms.", _all_keys),
    ),
    reference_shapes=_shape(4096, 12, 64),
    family="state",
    engine="state",
)

DIJIANG = System(
    name="dijiang",
    title="DiJiang: Efficient Large Language Models through Compact Kernelization",
    year=2024,
    paper="Chen, Liu, Wang, Tian, Wang; arXiv 2403.19928",
    kind="operator",
    summary="Decayed linear attention of softmaxed, weighted cosine-transform coefficients.",
    op=dijiang,
    layer=DiJiangAttention,
    identities=(
        Identity(
            "flat", "With weights of 0 all features are equal: a decayed mean.", _uniform_features
        ),
    ),
    reference_shapes=_shape(4096, 16, 64),
    family="state",
    engine="state",
)

FASTMAX = System(
    name="fastmax",
    title="FAST: Factorizable Attention for Speeding up Transformers",
    year=2024,
    paper="Gerami, Hoover, Dulepet, Duraiswami; arXiv 2402.07901",
    kind="operator",
    summary="Normalised q and k with the exponential up to first or second order, factorised.",
    op=fastmax,
    layer=FastAttention,
    identities=(
        Identity("order_1", "With order 1 the weights are 1 + z.", _series(1)),  # type: ignore[arg-type]
        Identity("order_2", "With order 2 they are 1 + z + z^2 / 2.", _series(2)),  # type: ignore[arg-type]
    ),
    reference_shapes=_shape(4096, 16, 32),
    family="state",
    engine="state",
)

NALA = System(
    name="nala",
    title="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
    year=2025,
    paper="Meng et al.; arXiv 2506.21137",
    kind="operator",
    summary="Linear attention whose features keep the sign of q and sharpen with its length.",
    op=nala,
    layer=NaLaAttention,
    identities=(
        Identity("constants", "Without rotation equal values come out.", _nala_plain),
        Identity("shift", "Rotation acts on distances only.", _nala_shift),
    ),
    reference_shapes=({"grid": (56, 56), "heads": 2, "kv_heads": 2, "head_dim": 32},),
    family="state",
    engine="torch",
)

L2VIT = System(
    name="l2vit",
    title="The Linear Attention Resurrection in Vision Transformer",
    year=2025,
    paper="Zheng; arXiv 2501.16182",
    kind="model",
    summary="Linear attention of rectified q and k with a large floor below the normaliser, then local "
    "convolutions.",
    op=l2vit,
    layer=L2ViTAttention,
    identities=(
        Identity("below_the_floor", "Small weights are divided by the floor.", _l2_small),
        Identity("above_the_floor", "Beyond it the length of q does not matter.", _l2_large),
    ),
    reference_shapes=({"grid": (56, 56), "heads": 3, "kv_heads": 3, "head_dim": 32},),
    family="state",
    engine="torch",
)

KERNELIZED_TRANSFORMER = System(
    name="kernelized_transformer",
    title="On Learning the Transformer Kernel",
    year=2021,
    paper="Chowdhury, Solomou, Dubey, Sachan; arXiv 2110.08323",
    kind="operator",
    summary="Linear attention by random features whose frequencies are learned.",
    op=spectral,
    layer=SpectralAttention,
    identities=(
        Identity(
            "standard", "With a standard normal spectrum it is Performer.", _standard_spectrum
        ),
    ),
    reference_shapes=_shape(4096, 8, 64),
    family="state",
    engine="torch",
)

FF_KERNEL_ATTENTION = System(
    name="ff_kernel_attention",
    title="Linear Self-Attention Approximation via Trainable Feedforward Kernel",
    year=2022,
    paper="Yorsh, Kovalenko; arXiv 2211.04076",
    kind="operator",
    summary="Linear attention whose feature map is a trained feed-forward net with positive outputs.",
    op=feed_forward_kernel,
    layer=FeedForwardKernelAttention,
    identities=(Identity("order", "The order of the keys does not matter.", _order_of_keys),),
    reference_shapes=_shape(4096, 8, 64),
    family="state",
    engine="torch",
)

NPRF_RPE = System(
    name="nprf_rpe",
    title="Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
    year=2021,
    paper="Luo et al., NeurIPS; arXiv 2106.12566",
    kind="operator",
    summary="Random-feature attention of unit q and k with a weight for every distance, by Fourier "
    "transforms.",
    op=kernelised_relative,
    layer=KernelisedRelativeAttention,
    identities=(
        Identity("forms", "Fourier transforms give what all pairs give.", _forms),
        Identity("constant", "One bias for all distances is none.", _constant_bias),
    ),
    reference_shapes=_shape(1024, 4, 16),
    family="state",
    engine="torch",
)

KERNEL_ATTENTION_ADVISOR = System(
    name="kernel_attention_advisor",
    title="C3D-AD: Toward Continual 3D Anomaly Detection via Kernel Attention with Learnable Advisor",
    year=2025,
    paper="Lu et al.",
    kind="model",
    summary="Random-feature attention over the tokens and a bank of learned keys and values.",
    op=advised,
    layer=AdvisorAttention,
    identities=(
        Identity(
            "tokens", "Advisors are keys and values that all sequences share.", _advisors_are_tokens
        ),
    ),
    reference_shapes=_shape(1024, 4, 64),
    family="state",
    engine="torch",
)
