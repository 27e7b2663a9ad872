"""A range of addresses of a GPU that gets its memory piece by piece, through the CUDA driver."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from foveal._errors import CacheError


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Properties(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of one device, without a handle to export."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_PINNED, _DEVICE, _READ_WRITE = 1, 1, 3


@functools.lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as missing:
        raise CacheError("device", "cuda", "the CUDA driver, libcuda.so.1, is needed") from missing


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else str(status)
        raise CacheError(name, reason, "a call of the CUDA driver that succeeds")


class VirtualRange:
    """`count` bytes of addresses on a device; `back` puts memory behind a part of them.

    Memory comes in pieces of `granule` bytes.  A piece stays where it is, and the address of the range
    never changes.  Unmapped addresses must not be touched.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        torch.cuda.current_stream(device).synchronize()  # the driver needs the context of PyTorch
        index = torch.cuda.current_device() if device.index is None else device.index
        self._properties = _Properties(type=_PINNED, location=_Location(_DEVICE, index))
        self._device = torch.device("cuda", index)
        self.granule = granule(device)
        self.count = -(-count // self.granule) * self.granule
        address = ctypes.c_uint64()
        size = ctypes.c_size_t(self.count)
        _call("cuMemAddressReserve", ctypes.byref(address), size, *_zeros("size_t", "u64", "u64"))
        self.address = int(address.value)
        self._pieces: dict[int, int] = {}

    @property
    def mapped(self) -> int:
        """Bytes with memory behind them."""
        return len(self._pieces) * self.granule

    def back(self, start: int, stop: int) -> None:
        """Puts memory behind bytes start to stop, where there is none yet."""
        for piece in range(start // self.granule, -(-stop // self.granule)):
            if piece not in self._pieces:
                self._pieces[piece] = self._map(piece)

    def release(self, start: int, stop: int) -> None:
        """Takes the memory of whole pieces within bytes start to stop back; waits for the device."""
        torch.cuda.synchronize(self._properties.location.id)
        first, last = -(-start // self.granule), stop // self.granule
        for piece in range(first, last):
            if piece in self._pieces:
                self._unmap(piece)

    def _map(self, piece: int) -> int:
        handle = ctypes.c_uint64()
        size = ctypes.c_size_t(self.granule)
        where = ctypes.c_uint64(self.address + piece * self.granule)
        own = ctypes.byref(self._properties)
        _call("cuMemCreate", ctypes.byref(handle), size, own, *_zeros("u64"))
        _call("cuMemMap", where, size, ctypes.c_size_t(0), handle, *_zeros("u64"))
        access = _Access(self._properties.location, _READ_WRITE)
        _call("cuMemSetAccess", where, size, ctypes.byref(access), ctypes.c_size_t(1))
        return int(handle.value)

    def _unmap(self, piece: int) -> None:
        where = ctypes.c_uint64(self.address + piece * self.granule)
        _call("cuMemUnmap", where, ctypes.c_size_t(self.granule))
        _call("cuMemRelease", ctypes.c_uint64(self._pieces.pop(piece)))

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The whole range as a tensor [count / itemsize]; it keeps the range alive."""
        bare = 0 not in self._pieces
        self.back(0, 1)  # PyTorch asks the driver where the first address lies
        found = torch.as_tensor(_Array(self, self.count // 2), device=self._device).view(dtype)
        if bare:
            self.release(0, self.granule)
        return found

    def __del__(self) -> None:
        pieces = getattr(self, "_pieces", None)
        if pieces is None or not torch.cuda.is_initialized():
            return
        torch.cuda.synchronize(self._properties.location.id)
        for piece in list(pieces):
            self._unmap(piece)
        _call("cuMemAddressFree", ctypes.c_uint64(self.address), ctypes.c_size_t(self.count))


class _Array:
    """16-bit numbers at the addresses of a range, in the form in which PyTorch takes them over."""

    def __init__(self, owner: VirtualRange, count: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "<i2",
            "data": (owner.address, False),
            "version": 3,
        }


def granule(device: torch.device) -> int:
    """Bytes that a device maps at a time."""
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = _Properties(type=_PINNED, location=_Location(_DEVICE, index))
    found = ctypes.c_size_t()
    _call(
        "cuMemGetAllocationGranularity",
        ctypes.byref(found),
        ctypes.byref(properties),
        ctypes.c_int(0),
    )
    return int(found.value)


def _zeros(*kinds: str) -> tuple[Any, ...]:
    types = {"size_t": ctypes.c_size_t, "u64": ctypes.c_uint64}
    return tuple(types[kind](0) for kind in kinds)
