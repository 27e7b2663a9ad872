"""PoNet: tokens mix by pooling at three ranges."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import ShapeError
from foveal._judged import judged_alone, need_shape


@judged_alone
def ponet(
    q: Tensor,
    k: Tensor,
    o: Tensor,
    segment: Tensor,
    local: Tensor,
    *,
    segments: Tensor | None = None,
    segment_length: int = 64,
    key_mask: Tensor | None = None,
) -> Tensor:
    """y_t = (g + s_t) * o_t + l_t: a global, a segment and a local summary.

    g = sum_j softmax_j(mean(q) . k_j / sqrt(D)) k_j; s_t is the maximum of `segment` over the segment of
    t, l_t that of `local` over t - 1, t, t + 1, for each channel.
    Shapes: all [B, L, H, D]; segments int64 [L] or [B, L], the number of each token's segment, by
    default runs of `segment_length` tokens; key_mask bool [B, L], False leaves a token out of all
    summaries (its own y included: 0).
    Cost: linear in L, no products between tokens.
    Paper: PoNet (2110.02442).
    """
    for name, x in (("q", q), ("k", k), ("o", o), ("segment", segment), ("local", local)):
        need_shape(name, x, tuple(q.shape) if q.dim() == 4 else (-1, -1, -1, -1), like=q)
    batch, length = q.shape[:2]
    if segments is None:
        segments = torch.arange(length, device=q.device) // segment_length
    segments = segments.expand(batch, -1)
    if segments.shape[1] != length:
        raise ShapeError("segments", list(segments.shape), f"[{length}] or [B, {length}] is needed")
    mask = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    mask = mask if key_mask is None else key_mask
    if mask.shape != (batch, length) or mask.dtype != torch.bool:
        needed = f"bool {[batch, length]} is needed"
        raise ShapeError("key_mask", f"{mask.dtype} {list(mask.shape)}", needed)
    inside = mask[..., None, None]
    mean = (q * inside).sum(1) / inside.sum(1).clamp(min=1)
    logits = torch.einsum("bhd,blhd->bhl", mean, k) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~mask[:, None], _LOW).softmax(-1)
    everywhere = torch.einsum("bhl,blhd->bhd", weights, k)[:, None]
    lowest = torch.finfo(segment.dtype).min
    kept = segment.masked_fill(~inside, lowest)
    index = segments[..., None, None].expand_as(segment)
    count = int(segments.amax()) + 1 if segments.numel() else 0
    maxima = segment.new_full((batch, count, *segment.shape[2:]), lowest)
    maxima = maxima.scatter_reduce(1, index, kept, "amax", include_self=False)
    near = F.pad(local.masked_fill(~inside, lowest), (0, 0, 0, 0, 1, 1), value=lowest)
    nearest = torch.stack([near[:, :-2], near[:, 1:-1], near[:, 2:]]).amax(0)
    return ((everywhere + maxima.gather(1, index)) * o + nearest).masked_fill(~inside, 0.0)


_LOW = -1e4


class PoNetMixer(nn.Module):
    """y = ponet(W_q x, W_k x, W_o x, W_s x, W_l x): PoNet's layer in place of attention.

    Shapes: x and y [B, L, dim]; segments and key_mask as for `ponet`.
    Paper: PoNet (2110.02442).
    """

    def __init__(self, dim: int, heads: int = 1, *, segment_length: int = 64) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads
        self.segment_length = segment_length
        self.maps = nn.Linear(dim, 5 * dim)

    def forward(
        self, x: Tensor, segments: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        parts = self.maps(x).unflatten(-1, (5, self.heads, -1)).unbind(-3)
        y = ponet(*parts, segments=segments, segment_length=self.segment_length, key_mask=key_mask)
        return y.flatten(-2)
