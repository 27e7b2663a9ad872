"""Kernels in CUDA C++, compiled in the process by the library that comes with PyTorch (NVRTC)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from foveal._errors import DeviceError

_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def missing() -> str | None:
    """Why no kernel can be compiled here, or None."""
    return None if _compiler() is not None else "PyTorch brought no NVRTC, the compiler of CUDA C++"


class Kernel:
    """The function `name` of a source with macros, for one device.

    `structure` is the only argument of the kernel, by value.
    """

    def __init__(
        self, source: Path, name: str, macros: Mapping[str, int], device: torch.device
    ) -> None:
        binary = _compiled(source, tuple(sorted(macros.items())), _architecture(device))
        self._device = device.index or 0
        _enter(self._device)
        self._function = ctypes.c_void_p()
        module = ctypes.c_void_p()
        _drive("cuModuleLoadData", ctypes.byref(module), binary)
        _drive("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())

    def launch(
        self, blocks: int, threads: int, shared: int, stream: int, structure: ctypes.Structure
    ) -> None:
        """Runs on a stream with `shared` bytes of shared memory per block."""
        _enter(self._device)
        one = ctypes.c_uint(1)
        sizes = ctypes.c_uint(blocks), one, one, ctypes.c_uint(threads), one, one
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
        memory = ctypes.c_uint(shared)
        handle = ctypes.c_void_p(stream)
        _drive("cuLaunchKernel", self._function, *sizes, memory, handle, arguments, None)

    def allow(self, shared: int) -> None:
        """Permits so many bytes of shared memory per block."""
        _drive("cuFuncSetAttribute", self._function, _SHARED_MEMORY, ctypes.c_int(shared))


@functools.lru_cache(maxsize=8)
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _compiled(source: Path, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """The binary of a source file, from Triton's cache on disk if it was compiled before."""
    from triton.runtime.cache import get_cache_manager

    text = source.read_bytes()
    described = f"{text!r} {macros} {architecture} {torch.version.cuda}"
    kept = get_cache_manager(hashlib.sha256(described.encode()).hexdigest())
    name = f"{source.stem}.cubin"
    found = kept.get_file(name)
    if found is not None:
        return Path(found).read_bytes()
    binary = _compile(source.name, text, macros, architecture)
    kept.put(binary, name, binary=True)
    return binary


def _compile(
    name: str, text: bytes, macros: tuple[tuple[str, int], ...], architecture: str
) -> bytes:
    compiler = _compiler()
    if compiler is None:
        raise DeviceError("device", "cuda", str(missing()))
    program = ctypes.c_void_p()
    status = compiler.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None)
    _check(status, "nvrtcCreateProgram")
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{macro}={value}" for macro, value in macros]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = compiler.nvrtcCompileProgram(program, len(options), given)
    if status:
        log = _read(compiler, program, "ProgramLog").decode(errors="replace")
        raise DeviceError("device", architecture, f"a compiler that takes {name} is needed: {log}")
    binary = _read(compiler, program, "CUBIN")
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return binary


def _read(compiler: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(compiler, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(compiler, f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _check(status: int, name: str) -> None:
    if status:
        raise DeviceError(
            "device", "cuda", f"a call of {name} that succeeds is needed, not {status}"
        )


@functools.lru_cache(maxsize=1)
def _compiler() -> Any:
    """The library, wherever PyTorch's packages put it, or None."""
    version = torch.version.cuda
    if version is None:
        return None
    name = f"libnvrtc.so.{version.split('.')[0]}"
    packages = Path(torch.__file__).parent.parent
    places = [Path(torch.__file__).parent / "lib" / name]
    places += sorted(packages.glob(f"nvidia/*/lib/{name}"))
    for place in [*(str(p) for p in places if p.exists()), name]:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    return None


def _enter(device: int) -> None:
    """Makes the context of PyTorch that of this thread, where it has none yet."""
    context = ctypes.c_void_p()
    _drive("cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        _drive("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(device))
        _drive("cuCtxSetCurrent", context)


@functools.lru_cache(maxsize=1)
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _drive(name: str, *arguments: Any) -> None:
    _check(getattr(_driver(), name)(*arguments), name)
