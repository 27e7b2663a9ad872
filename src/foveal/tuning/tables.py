"""Shipped sizes of the portable tile kernels, by device class, data type class and kernel.

Device classes: "sm_80" (A100), "sm_86" (NVIDIA devices with 99 KiB of shared memory: RTX 30 to 50, L4, L40),
"sm_90" (H100, H200), "sm_100" (B200), "gfx942" (MI300).  Rows hold for the larger of head_dim and value_dim,
up to the size they name, and for all patterns but those that EXCEPTIONS names.

Classes of patterns: DENSE and CAUSAL; WINDOW: other products of intervals (sliding windows, neighborhoods,
partitions); DOCUMENTS: packed ones; LISTS: what is walked by lists of blocks.
"""

from __future__ import annotations

from foveal.tuning.config import Config

FORWARD, BACKWARD_Q, BACKWARD_KV = "forward", "backward_q", "backward_kv"
HALF, FLOAT32 = "half", "float32"
DENSE, CAUSAL, WINDOW, LISTS, DOCUMENTS = PATTERNS = (
    "dense",
    "causal",
    "window",
    "lists",
    "documents",
)

Rows = tuple[tuple[int, Config], ...]

_HALF: dict[str, dict[str, Rows]] = {
    "sm_80": {
        FORWARD: (
            (64, Config(128, 64, 4, 3)),
            (128, Config(128, 64, 8, 3)),
            (256, Config(64, 32, 4, 2)),
        ),
        BACKWARD_Q: (
            (64, Config(128, 64, 8, 2)),
            (128, Config(64, 64, 8, 2)),
            (256, Config(32, 32, 4, 1)),
        ),
        BACKWARD_KV: (
            (64, Config(64, 128, 8, 2)),
            (128, Config(64, 64, 8, 2)),
            (256, Config(32, 32, 4, 1)),
        ),
    },
    "sm_86": {
        FORWARD: (
            (64, Config(128, 64, 4, 2)),
            (128, Config(64, 64, 4, 2)),
            (256, Config(64, 32, 4, 1)),
        ),
        BACKWARD_Q: (
            (64, Config(64, 64, 4, 2)),
            (128, Config(64, 32, 4, 1)),
            (256, Config(32, 32, 4, 1)),
        ),
        BACKWARD_KV: (
            (64, Config(64, 64, 4, 1)),
            (128, Config(32, 64, 4, 1)),
            (256, Config(16, 32, 4, 1)),
        ),
    },
    "sm_90": {
        FORWARD: (
            (64, Config(64, 128, 4, 3)),
            (128, Config(64, 64, 4, 3)),
            (256, Config(128, 64, 8, 2)),
        ),
        BACKWARD_Q: (
            (64, Config(64, 64, 4, 3)),
            (128, Config(64, 64, 4, 2)),
            (256, Config(64, 32, 8, 1)),
        ),
        BACKWARD_KV: (
            (64, Config(64, 64, 4, 2)),
            (128, Config(64, 128, 8, 2)),
            (256, Config(32, 64, 8, 1)),
        ),
    },
    "sm_100": {
        FORWARD: (
            (64, Config(128, 128, 8, 3)),
            (128, Config(128, 64, 8, 3)),
            (256, Config(128, 64, 8, 2)),
        ),
        BACKWARD_Q: (
            (64, Config(128, 128, 8, 2)),
            (128, Config(128, 64, 8, 2)),
            (256, Config(64, 32, 8, 1)),
        ),
        BACKWARD_KV: (
            (64, Config(64, 128, 8, 2)),
            (128, Config(64, 128, 8, 2)),
            (256, Config(32, 64, 8, 1)),
        ),
    },
    "gfx942": {
        FORWARD: (
            (64, Config(128, 64, 4, 2)),
            (128, Config(128, 64, 4, 1)),
            (256, Config(64, 32, 4, 1)),
        ),
        BACKWARD_Q: (
            (64, Config(64, 64, 4, 1)),
            (128, Config(64, 64, 4, 1)),
            (256, Config(32, 32, 4, 1)),
        ),
        BACKWARD_KV: (
            (64, Config(64, 64, 4, 1)),
            (128, Config(64, 64, 4, 1)),
            (256, Config(32, 32, 4, 1)),
        ),
    },
}
_PLAIN: Rows = (
    (64, Config(64, 32, 4, 2)),
    (128, Config(32, 32, 4, 2)),
    (256, Config(16, 32, 4, 1)),
)

EXCEPTIONS: dict[tuple[str, str, str, int, str], Config] = {
    ("sm_90", HALF, BACKWARD_KV, 64, DENSE): Config(128, 64, 4, 2),
    ("sm_90", HALF, BACKWARD_KV, 64, CAUSAL): Config(128, 64, 4, 2),
    ("sm_90", HALF, BACKWARD_Q, 64, DENSE): Config(64, 128, 4, 3),
    ("sm_90", HALF, BACKWARD_Q, 64, CAUSAL): Config(64, 128, 4, 3),
    ("sm_90", FLOAT32, FORWARD, 128, DENSE): Config(32, 64, 8, 2),
    ("sm_90", FLOAT32, FORWARD, 128, CAUSAL): Config(32, 64, 8, 2),
    ("sm_90", FLOAT32, FORWARD, 128, DOCUMENTS): Config(32, 64, 8, 2),
    ("sm_90", FLOAT32, BACKWARD_KV, 128, DENSE): Config(32, 32, 4, 1),
    ("sm_90", FLOAT32, BACKWARD_KV, 128, CAUSAL): Config(32, 32, 4, 1),
}
"""Sizes of one class of patterns, by device class, data type class, stage, size of its row and pattern.

An entry needs records of `scripts/gpu_search.py confirm`: 5 % less time on held-out problems of its
patterns, and no problem that loses 1 %.  `scripts/gpu_search.py propose` writes it.
"""


def rows(architecture: str, kind: str, stage: str) -> Rows:
    """Sizes by head_dim of a stage (FORWARD, ...) for a kind of data type (HALF, FLOAT32)."""
    return _PLAIN if kind == FLOAT32 else _HALF[architecture][stage]


def architectures() -> tuple[str, ...]:
    """The device classes."""
    return tuple(_HALF)
