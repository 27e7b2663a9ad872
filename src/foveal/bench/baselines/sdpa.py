"""PyTorch's scaled_dot_product_attention: with a boolean mask, and dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


class MaskedSdpa(Competitor):
    """The pattern as a boolean mask [L, L], made once and kept."""

    name = "masked"
    title = "SDPA with a mask"

    def refuses(self, case: Case) -> str | None:
        return plain_softmax(case) or small_enough_to_mask(case)

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        q, k, v = (heads_first(tensor) for tensor in inputs)
        mask = case.pattern.dense_mask(case.grid, case.grid).to(q.device)
        scale, grouped = scale_of(case), case.q_heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
            )

        return Prepared((q, k, v), attend, heads_last(case), held_bytes=mask.nbytes)


class DenseSdpa(Competitor):
    """No mask: every query sees every key (or every earlier one, where the case is causal).

    On other patterns it computes another result, and is the yardstick that speed-ups over
    dense attention are measured by.
    """

    name = "dense"
    title = "SDPA, dense"

    def refuses(self, case: Case) -> str | None:
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
