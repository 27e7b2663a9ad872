"""PyTorch's FlexAttention, compiled, with the pattern's own definition as its mask function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

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

if TYPE_CHECKING:
    from foveal.bench.cases import Case


class Flex(Competitor):
    """Tokens in raster order, blocks of 128, compiled once per case with static shapes."""

    name = "flex"
    title = "FlexAttention, compiled"

    def refuses(self, case: Case) -> str | None:
        return plain_softmax(case) or small_enough_to_mask(case)

    def refuses_backward(self, case: Case, device: torch.device) -> str | None:
        if device.type == "cpu":
            return "FlexAttention has no backward on CPU"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = (heads_first(tensor) for tensor in inputs)
        extent = case.extent

        def visible(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
            return case.pattern.allows(q_pos, k_pos, extent)

        # Dynamo counts recompilations per function and stops compiling after a few shapes.
        torch.compiler.reset()
        mask = create_block_mask(visible, None, None, extent.Lq, extent.Lk, device=str(q.device))
        compiled = torch.compile(flex_attention, dynamic=False)
        scale, grouped = scale_of(case), case.q_heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
            return out

        lists = [tensor for tensor in mask.as_tuple() if isinstance(tensor, Tensor)]
        held = sum(tensor.nbytes for tensor in lists)
        return Prepared((q, k, v), attend, heads_last(case), held_bytes=held)
