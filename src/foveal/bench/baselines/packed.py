"""Kernels that know packed documents, windows and causality: FlashAttention-2 twice, and FlashInfer."""

from __future__ import annotations

import importlib
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.bench.baselines.base import Competitor, Inputs, Prepared, plain_softmax, scale_of
from foveal.patterns import Causal, Dense, Pattern, Sliding
from foveal.patterns.documents import Packed

if TYPE_CHECKING:
    from foveal.bench.cases import Case


@dataclass(frozen=True)
class _Said:
    """What such a kernel can be told: documents, and keys i - left <= j <= i + right (-1: no limit)."""

    lengths: tuple[int, ...]
    left: int
    right: int

    @property
    def causal(self) -> bool:
        return self.right == 0

    def offsets(self, device: torch.device) -> Tensor:
        """int32 [documents + 1]"""
        ends = [*itertools.accumulate(self.lengths, initial=0)]
        return torch.tensor(ends, dtype=torch.int32, device=device)


class _Packed(Competitor, ABC):
    """Adapters of kernels on [total, H, D]."""

    def refuses(self, case: Case, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernel runs on CUDA only"
        if case.dtype not in (torch.bfloat16, torch.float16):
            return f"its kernel computes in bfloat16 and float16, not {case.dtype}"
        if case.batch != 1 or len(case.grid) != 1:
            return "it takes one sequence of packed documents"
        if case.head_dim != case.value_dim:
            return f"it needs Dv = D; here D is {case.head_dim}, Dv {case.value_dim}"
        if _said(case) is None:
            return "it has documents, windows and causality, and not this pattern"
        return plain_softmax(case)

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        said = _said(case)
        assert said is not None
        q, k, v = (x[0].contiguous() for x in inputs)
        attend, held = self._made(case, said, q.device)
        return Prepared((q, k, v), attend, lambda x: x[None], held_bytes=held)

    @abstractmethod
    def _made(
        self, case: Case, said: _Said, device: torch.device
    ) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]:
        """The call on packed tokens, and the bytes that it keeps."""


class Varlen(_Packed):
    """`torch.nn.attention.varlen`: FlashAttention-2 on packed documents."""

    name = "varlen"
    title = "varlen_attn (PyTorch)"

    def absent(self) -> str | None:
        try:
            importlib.import_module("torch.nn.attention.varlen")
        except ImportError:
            return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
        return None

    def refuses(self, case: Case, device: torch.device) -> str | None:
        reason = super().refuses(case, device)
        said = _said(case)
        if reason is not None or said is None:
            return reason
        known = self._parameters()
        if said.left >= 0 and "window_size" not in known:
            return f"PyTorch {torch.__version__} gives it no window"
        if scale_of(case) is not None and "scale" not in known:
            return f"PyTorch {torch.__version__} gives it no scale"
        return None

    def _parameters(self) -> tuple[str, ...]:
        module = importlib.import_module("torch.nn.attention.varlen")
        return tuple(inspect.signature(module.varlen_attn).parameters)

    def _made(
        self, case: Case, said: _Said, device: torch.device
    ) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]:
        module = importlib.import_module("torch.nn.attention.varlen")
        known, shared = self._parameters(), case.q_heads // case.kv_heads
        options: dict[str, Any] = {}
        if scale_of(case) is not None:
            options["scale"] = scale_of(case)
        if "window_size" in known:
            options["window_size"] = (said.left, said.right)
        else:
            options["is_causal"] = said.causal
        repeats = shared > 1 and "enable_gqa" not in known
        if "enable_gqa" in known:
            options["enable_gqa"] = shared > 1
        offsets, longest = said.offsets(device), max(said.lengths)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeats:
                k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
            out: Tensor = module.varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
            return out

        return attend, offsets.nbytes


class FlashAttention(_Packed):
    """`flash_attn_varlen_func` of the package flash-attn."""

    name = "flash_attn"
    title = "flash-attn"
    package = "flash_attn"

    def _made(
        self, case: Case, said: _Said, device: torch.device
    ) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]:
        module = importlib.import_module("flash_attn")
        offsets, longest, scale = said.offsets(device), max(said.lengths), scale_of(case)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = module.flash_attn_varlen_func(
                q,
                k,
                v,
                offsets,
                offsets,
                longest,
                longest,
                softmax_scale=scale,
                causal=said.causal,
                window_size=(said.left, said.right),
            )
            return out

        return attend, offsets.nbytes


class FlashInfer(_Packed):
    """FlashInfer's ragged prefill, planned once."""

    name = "flashinfer"
    title = "FlashInfer"
    package = "flashinfer"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        said = _said(case)
        if said is not None and said.left >= 0 and not said.causal:
            return "its windows are causal"
        return super().refuses(case, device)

    def refuses_backward(self, case: Case, device: torch.device) -> str | None:
        return "FlashInfer has no backward"

    def _made(
        self, case: Case, said: _Said, device: torch.device
    ) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]:
        module = importlib.import_module("flashinfer")
        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
        wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        offsets = said.offsets(device)
        wrapper.plan(
            offsets,
            offsets,
            case.q_heads,
            case.kv_heads,
            case.head_dim,
            causal=said.causal,
            window_left=said.left,
            sm_scale=scale_of(case),
            q_data_type=case.dtype,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = wrapper.run(q, k, v)
            return out

        return attend, workspace.nbytes


def _said(case: Case) -> _Said | None:
    pattern = case.pattern.simplify(case.extent)
    lengths: tuple[int, ...] = (case.tokens,)
    if isinstance(pattern, Packed):
        lengths = tuple(n for n in pattern.lengths if n)
        pattern = pattern.inner
    reach = _reach(pattern)
    return None if reach is None else _Said(lengths, *reach)


def _reach(pattern: Pattern) -> tuple[int, int] | None:
    if isinstance(pattern, Dense):
        return -1, -1
    if isinstance(pattern, Causal):
        return -1, 0
    if isinstance(pattern, Sliding) and not pattern.sink_tokens:
        return pattern.left, pattern.right
    return None
