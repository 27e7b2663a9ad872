"""PyTorch's scaled_dot_product_attention: with a boolean mask, and dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveal.bench.baselines.base import (
    Competitor,
    Inputs,
    Prepared,
    heads_first,
    heads_last,
    plain_softmax,
    scale_of,
    small_enough_to_mask,
)
from foveal.patterns import Causal, Dense, Pattern

if TYPE_CHECKING:
    from foveal.bench.cases import Case

_ROWS_AT_ONCE = 4096


class MaskedSdpa(Competitor):
    """The pattern as a boolean mask [L, L], made once and kept."""

    name = "masked"
    title = "SDPA with a mask"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        return plain_softmax(case) or small_enough_to_mask(case)

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        q, k, v = (heads_first(tensor) for tensor in inputs)
        mask = _mask(case, q.device)
        scale, shared = scale_of(case), case.q_heads // case.kv_heads
        # On CUDA no kernel takes a mask and fewer key heads; PyTorch would form the matrix of scores.
        repeats, grouped = q.is_cuda and shared > 1, not q.is_cuda and shared > 1

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeats:
                k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
            )

        return Prepared((q, k, v), attend, heads_last(case), held_bytes=mask.nbytes)


def _mask(case: Case, device: torch.device) -> Tensor:
    """bool [L, L], or [B or 1, q_heads, L, L] where it differs."""
    if case.pattern.depends_on_data:
        mask = case.pattern.dense_mask(case.grid, case.grid).to(device)
        shared = 1 if mask.shape[1] == 1 else case.q_heads // mask.shape[1]
        return mask.repeat_interleave(shared, dim=1)
    extent = case.extent
    k_pos = extent.k_positions().to(device)[None]
    rows = extent.q_positions().to(device)[:, None].split(_ROWS_AT_ONCE)
    return torch.cat([case.pattern.allows(q_pos, k_pos, extent) for q_pos in rows])


class DenseSdpa(Competitor):
    """No mask: every query sees every key (or every earlier one, where the case is causal).

    On other patterns it computes another result, and is the yardstick that speed-ups over
    dense attention are measured by.
    """

    name = "dense"
    title = "SDPA, dense"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        return plain_softmax(case)

    def pattern(self, case: Case) -> Pattern:
        return Causal() if _is_causal(case) else Dense()

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        q, k, v = (heads_first(tensor) for tensor in inputs)
        scale, causal, grouped = scale_of(case), _is_causal(case), case.q_heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
            )

        return Prepared((q, k, v), attend, heads_last(case))


def _is_causal(case: Case) -> bool:
    return isinstance(case.pattern.simplify(case.extent), Causal)
