"""Names of Gluon that moved between Triton 3.6 and 3.9."""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon import language as _language
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy as _async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma as _tma

from foveal.engines.tile import compiling

_names: Any = _tma
_copies: Any = _async_copy

# 3.9 keeps the old names as functions that raise, so the new ones are asked for first.
load_box = getattr(_names, "async_load", None) or _names.async_copy_global_to_shared
store_box = getattr(_names, "async_store", None) or _names.async_copy_shared_to_global
store_wait = _names.store_wait
load_elements = getattr(_copies, "async_load", None) or _copies.async_copy_global_to_shared

_gluon: Any = _language
thread_barrier = getattr(_gluon, "thread_barrier", None) or _gluon.barrier


@builtin
def _add_box(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


# 3.6 compiles the instruction, yet has no name for it.
add_box = getattr(_names, "async_atomic_add", None) or _add_box


@builtin
def traced(_semantic: Any = None) -> None:
    """The last of what a long kernel says: nothing to the device, and to `compiling` that it is traced."""
    compiling.traced()
