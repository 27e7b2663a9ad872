"""A stack of tiles as one call of PyTorch's fused attention, which keeps no score matrix.

The call holds no lock of the interpreter, for which chains of small products wait.
"""

from __future__ import annotations

from torch import Tensor
from torch.backends.cuda import flash_sdp_enabled
from torch.nn.functional import scaled_dot_product_attention

from foveal.engines.tile.cpu_scores import Scorer
from foveal.engines.tile.stacks import Stack


def fuses(scorer: Scorer, q: Tensor, v: Tensor) -> bool:
    """Whether the fused call computes what the scorer asks for, of q [..., D] and v [..., Dv]."""
    plain = scorer.task.score.plain and not scorer.with_lse and not scorer.careful
    # PyTorch's switch, which `sdpa_kernel` of a caller may have turned off, holds on the CPU too.
    return plain and flash_sdp_enabled() and 0 < q.shape[-1] == v.shape[-1]


def fused_attention(
    scorer: Scorer, stack: Stack, q: Tensor, k: Tensor, v: Tensor, o: Tensor
) -> None:
    """Writes the rows of o [M, G, R, D] that the stack covers, of q [M, G, R, D], k and v [M, C, D]."""
    groups, mask = q.shape[1], stack.tiles[0].mask
    hidden = None if mask is None else scorer.fit(mask.additive).to(q.dtype)
    if hidden is not None and hidden.dim() > 2:
        hidden = hidden.expand(-1, groups, -1, -1).flatten(0, 1)[None]
    found = scaled_dot_product_attention(
        stack.queries(q).flatten(1, 2),
        stack.keys(k),
        stack.keys(v),
        attn_mask=hidden,
        scale=scorer.task.score.scale,
        enable_gqa=groups > 1,
    )
    rows = stack.queries(o)
    rows.copy_(found.view(rows.shape))
    if mask is not None and mask.blind is not None:
        rows.masked_fill_(scorer.fit(mask.blind), 0.0)
