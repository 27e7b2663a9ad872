"""What a compiled Triton kernel is, read off the artefact: storage, residency, copies, matrix products."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHAPE = re.compile(r"(?:mma|wgmma|tcgen05\.mma|mfma)[\w.:]*?m?(\d+)[nx](\d+)[kx](\d+)")
_PTX_MATRIX = re.compile(
    r"^\s*(?:@%p\d+ )?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", re.MULTILINE
)
_PTX_FMA = re.compile(r"^\s*(?:@%p\d+ )?fma\.rn(?:\.ftz)?\.(f32x2|f32|f16x2|bf16x2)", re.MULTILINE)
_GCN_MATRIX = re.compile(r"\bv_s?mfma_\w+?_(\d+)x(\d+)x(\d+)")
_GCN_FMA = re.compile(r"\bv_(pk_)?(?:fma|fmac|mad|mac)_f32")
_WARP, _WARPS_TOGETHER = 32, 4


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share: bytes of shared memory, registers, threads, programs; lanes of a warp."""

    shared: int
    registers: int
    threads: int
    programs: int
    lanes: int = 32


MULTIPROCESSORS: Mapping[str, Multiprocessor] = {
    "sm_80": Multiprocessor(164 << 10, 1 << 16, 2048, 32),
    "sm_86": Multiprocessor(100 << 10, 1 << 16, 1536, 16),
    "sm_90": Multiprocessor(228 << 10, 1 << 16, 2048, 32),
    "sm_100": Multiprocessor(228 << 10, 1 << 16, 2048, 32),
    "gfx942": Multiprocessor(64 << 10, 4 * 512 * 64, 2048, 32, 64),
}
"""By device class; on gfx942 a compute unit, with the vector and accumulation registers of its four SIMDs."""

MOST_SHARED: Mapping[str, int] = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
"""Bytes of shared memory that one program may have."""


def facts_of(compiled: Any, architecture: str) -> dict[str, float]:
    """Facts about a kernel that Triton compiled for a class of devices, whether it is here or not.

    shared: of what a program may have; resident: programs that a multiprocessor holds at once; copies: 0
    plain loads, 1 asynchronous copies, 2 bulk copies, 3 bulk copies by warps of their own; matrix_share:
    FLOPs of matrix instructions over those and multiply-adds, as they stand in the text; registers of a
    thread; spills: bytes of a thread.
    """
    unit = MULTIPROCESSORS[architecture]
    threads = unit.lanes * int(compiled.metadata.num_warps)
    shared = int(compiled.metadata.shared)
    amd = architecture.startswith("gfx")
    registers, spills = _gcn_registers(compiled.asm["amdgcn"]) if amd else _registers(compiled)
    limits = [unit.threads // threads, unit.programs]
    if shared:
        limits.append(unit.shared // shared)
    if registers:
        limits.append(unit.registers // (threads * -(-registers // 8) * 8))
    return {
        "shared": shared / MOST_SHARED[architecture],
        "resident": float(min(limits)),
        "copies": float(_copies(compiled.asm, amd)),
        "matrix_share": _matrix_share(compiled.asm, amd),
        "registers": float(registers),
        "spills": float(spills),
    }


def _copies(asm: Mapping[str, Any], amd: bool) -> int:
    if amd:
        return int(
            bool(re.search(r"\b(?:buffer|global)_load\w*_lds|\blds$", asm["amdgcn"], re.MULTILINE))
        )
    bulk = "cp.async.bulk" in asm["ptx"]
    if bulk and "ttg.warp_specialize" in str(asm.get("ttgir", "")):
        return 3
    return 2 if bulk else int("cp.async." in asm["ptx"])


def _matrix_share(asm: Mapping[str, Any], amd: bool) -> float:
    matrix = 0.0
    if amd:
        text = asm["amdgcn"]
        matrix += sum(2 * int(m) * int(n) * int(k) for m, n, k in _GCN_MATRIX.findall(text))
        plain = sum(2 * 64 * (2 if packed else 1) for packed in _GCN_FMA.findall(text))
    else:
        text = asm["ptx"]
        for found in _PTX_MATRIX.findall(text):
            shape = _SHAPE.search(found.replace(".", ""))
            m, n, k = (int(side) for side in shape.groups()) if shape else (16, 8, 16)
            matrix += 2 * m * n * k / (_WARPS_TOGETHER if "mma_async" in found else 1)
        plain = sum(2 * _WARP * (2 if "x2" in kind else 1) for kind in _PTX_FMA.findall(text))
    return matrix / (matrix + plain) if matrix else 0.0


def _registers(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of spills of a thread, asked of the driver where the kernel is loaded."""
    known = getattr(compiled, "n_regs", None)
    if known is not None:
        return int(known), int(compiled.n_spills)
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except OSError:
            return 0, 0
    usage = done.stdout
    found = [re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")]
    registers, stack = (int(each[1]) if each else 0 for each in found)
    return registers, stack


def _gcn_registers(text: str) -> tuple[int, int]:
    found = [re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")]
    registers, spills = (int(each[1]) if each else 0 for each in found)
    return registers, 4 * spills
