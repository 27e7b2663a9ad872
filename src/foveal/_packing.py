"""Where documents end, as numbers on the host."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

from torch import Tensor

from foveal._capture import capturing
from foveal._errors import PackingError
from foveal._recent import Recent

_READ: Recent[tuple[weakref.ref[Tensor], int, Hashable]] = Recent(64)


def document_ends(cu_seqlens: Tensor) -> Hashable:
    """The numbers of `cu_seqlens`, to tell calls apart.

    Reading them from a device waits for all of its work, so they are read once per tensor and per write
    to it that PyTorch counts: the replay of a graph, for one, is none.
    """
    if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference():
        return _read(cu_seqlens)
    known = _READ.get(id(cu_seqlens))
    if known is not None and known[0]() is cu_seqlens and known[1] == cu_seqlens._version:
        return known[2]
    if capturing(cu_seqlens):
        raise PackingError(
            "cu_seqlens",
            "a tensor that was not read before the capture of a graph",
            "one earlier call with the same tensor is needed",
        )
    ends = _read(cu_seqlens)
    _READ.put(id(cu_seqlens), (weakref.ref(cu_seqlens), cu_seqlens._version, ends))
    return ends


def _read(cu_seqlens: Tensor) -> Hashable:
    return cu_seqlens.shape, cu_seqlens.dtype, *cu_seqlens.flatten().tolist()
