"""Shipped sizes of the portable tile kernels, by device class, data type class and kernel.

Device classes: "sm_80" (A100), "sm_86" (NVIDIA devices with 99 KiB of shared memory: RTX 30 to 50, L4, L40),
"sm_90" (H100, H200), "sm_100" (B200), "gfx942" (MI300).  Rows hold for the larger of head_dim and value_dim,
up to the size they name.
"""

from __future__ import annotations

from foveal.tuning.config import Config

FORWARD, BACKWARD_Q, BACKWARD_KV = "forward", "backward_q", "backward_kv"
HALF, FLOAT32 = "half", "float32"

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


def rows(architecture: str, kind: str, stage: str) -> Rows:
    """Sizes by head_dim of a stage (FORWARD, ...) for a kind of data type (HALF, FLOAT32)."""
    return _PLAIN if kind == FLOAT32 else _HALF[architecture][stage]
