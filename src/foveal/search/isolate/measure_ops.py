"""What one call does: operators, bytes that they read and write, FLOPs, share of products."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.autograd import profiler

FACTS = ("operators", "bytes", "flops", "product_share", "largest")
"""What is told about a call."""

_FREE = (
    "view", "reshape", "expand", "slice", "select", "transpose", "permute", "t", "detach", "alias",
    "unsqueeze", "squeeze", "as_strided", "split", "unbind", "_unsafe_view", "empty", "empty_like",
    "empty_strided", "resolve_conj", "resolve_neg", "numpy_T", "narrow", "chunk", "unflatten",
)  # fmt: skip
_PRODUCTS = (
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "convolution", "mkldnn_convolution",
    "_convolution", "_scaled_dot_product_flash_attention_for_cpu", "thnn_conv2d", "einsum",
)  # fmt: skip


def facts_of(run: Callable[[], object], itemsize: int) -> dict[str, float]:
    """operators; bytes read and written; flops; product_share (of the bytes); largest (bytes of a result).

    Bytes are those of the tensors that operators take and of the memory that they ask for, elements counted
    as `itemsize` bytes: what would move if no cache kept anything.
    """
    with profiler.profile(record_shapes=True, with_flops=True, profile_memory=True) as record:
        run()
    operators = moved = flops = products = largest = 0.0
    for event in record.function_events or ():
        name = event.name.removeprefix("aten::")
        inner = [child for child in event.cpu_children if child.name.startswith("aten::")]
        if not event.name.startswith("aten::") or name in _FREE or _works(inner):
            continue
        asked = max(float(event.cpu_memory_usage), 0.0)
        size = itemsize * sum(math.prod(shape) for shape in event.input_shapes or () if shape)
        operators += 1
        moved += size + asked
        flops += float(event.flops or 0)
        largest = max(largest, asked)
        if name in _PRODUCTS:
            products += size + asked
    return {
        "operators": operators,
        "bytes": moved,
        "flops": flops,
        "product_share": products / moved if moved else 0.0,
        "largest": largest,
    }


def _works(events: list[profiler.FunctionEvent]) -> bool:
    """Whether an operator only hands its work to others."""
    return any(event.name.removeprefix("aten::") not in (*_FREE, "to") for event in events)
