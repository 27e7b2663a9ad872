"""Names of Gluon that moved between Triton 3.6 and 3.9."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language.nvidia.hopper import tma as _tma

_names: Any = _tma

# 3.9 keeps the old names as functions that raise, so the new ones are asked for first.
load_box = getattr(_names, "async_load", None) or _names.async_copy_global_to_shared
store_box = getattr(_names, "async_store", None) or _names.async_copy_shared_to_global
store_wait = _names.store_wait
