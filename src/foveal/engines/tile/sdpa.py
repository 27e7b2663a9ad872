"""PyTorch's own fused attention, where the problem is plain dense or causal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from foveal._problem import Problem
from foveal.engines.tile import cpu
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Causal, Dense
from foveal.scores.base import Geometry
from foveal.scores.normal import NormalForm

_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def refuses(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    if not isinstance(pattern, Dense | Causal):
        # The key of lists is a digest of what they hold, which would have to come from the device.
        what = "holds lists" if pattern.depends_on_data else f"is {pattern.key}"
        return f"it computes dense and causal attention only; the pattern {what}"
    if not score.plain:
        return "it has no soft cap, sink or additive term"
    if score.scale <= 0:
        # It hides pairs, and finds the largest score of a row, before it scales.
        return f"it needs a positive scale; here it is {score.scale}"
    if problem.return_lse:
        return "it does not return lse"
    if problem.head_dim != problem.value_dim:
        return (
            f"its fused kernels need Dv = D; here D is {problem.head_dim}, Dv {problem.value_dim}"
        )
    if isinstance(pattern, Causal) and problem.extent.Lq != problem.extent.Lk:
        return "its causal mask is aligned to the first key; Lq differs from Lk"
    if 0 in (problem.batch, problem.extent.Lq, problem.extent.Lk):
        return "it does not take empty tensors"
    if problem.device == "cuda" and problem.dtype == torch.float64:
        return "its fused CUDA kernels do not take float64"
    return None


def attend(
    problem: Problem,
    pattern: Pattern,
    score: NormalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """o [B, Lq, Hq, D] of q [B, Lq, Hq, D], k and v [B, Lk, Hkv, D]; lse is None."""
    causal = isinstance(pattern, Causal)
    if causal and problem.device == "cpu" and not (k.isfinite().all() and v.isfinite().all()):
        # The fused kernel multiplies hidden values by 0, which spreads NaN to earlier rows.
        return cpu.attend(problem, pattern, score, geometry, q, k, v)
    # The fused kernels read rows of D neighbouring elements only.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_FUSED):
        o = scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=score.scale, enable_gqa=problem.groups > 1
        )
    return o.transpose(1, 2), None
