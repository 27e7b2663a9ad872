# mypy: ignore-errors
"""Gluon kernels that start while the one in front of them ends (compute capability 9.0)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def follow(EARLY: gl.constexpr):
    """Lets the next kernel start, and waits for all that the one before wrote."""
    lead(EARLY)
    wait(EARLY)


@gluon.jit
def lead(EARLY: gl.constexpr):
    """Lets the next kernel start."""
    if EARLY:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;",
            "=r", [], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def wait(EARLY: gl.constexpr):
    """Waits for all that the kernel before wrote.

    Every program of every kernel in a row waits: then to wait for one is to wait for all before it.
    """
    if EARLY:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;",
            "=r", [], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
