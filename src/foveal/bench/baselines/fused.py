"""PyTorch's fused kernels by name: cuDNN and FlashAttention-2, dense and causal."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from foveal.bench.baselines.base import (
    Competitor,
    Inputs,
    Prepared,
    heads_first,
    heads_last,
    plain_softmax,
    scale_of,
)
from foveal.patterns import Causal, Dense

if TYPE_CHECKING:
    from foveal.bench.cases import Case


class _Fused(Competitor):
    """One kernel of `scaled_dot_product_attention`, and no other in its place."""

    kernel: ClassVar[SDPBackend]

    def refuses(self, case: Case, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernel runs on CUDA only"
        if case.dtype not in (torch.bfloat16, torch.float16):
            return f"its kernel computes in bfloat16 and float16, not {case.dtype}"
        pattern = case.pattern.simplify(case.extent)
        if not isinstance(pattern, Dense | Causal):
            return f"it has no {_short(pattern.key)}"
        return plain_softmax(case)

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        causal = isinstance(case.pattern.simplify(case.extent), Causal)
        scale, grouped = scale_of(case), case.q_heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel([self.kernel]):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
                )

        q, k, v = (heads_first(tensor) for tensor in inputs)
        return Prepared((q, k, v), attend, heads_last(case))


class Cudnn(_Fused):
    """cuDNN's fused attention as PyTorch calls it."""

    name = "cudnn"
    title = "cuDNN (PyTorch)"
    kernel = SDPBackend.CUDNN_ATTENTION


class Flash2(_Fused):
    """FlashAttention-2 as PyTorch ships it."""

    name = "flash2"
    title = "FlashAttention-2 (PyTorch)"
    kernel = SDPBackend.FLASH_ATTENTION


def _short(key: str) -> str:
    return key if len(key) < 80 else f"{key[:77]}..."
