"""Attention over selected blocks, columns, spans and keys, chosen by rules or learned."""

from foveal.systems.base import System
from foveal.systems.sparse.blocks import INFLLM_V2, LEMO, REPRESENTATION_SHIFT
from foveal.systems.sparse.grids import SPARSE_VDIT, VGGT_BLOCK_SPARSE
from foveal.systems.sparse.heads import (
    Head,
    Mode,
    attend_planned,
    heads_of,
    plan_of,
    search_heads,
)
from foveal.systems.sparse.learned import LEARNED
from foveal.systems.sparse.lives import NATS, SEA
from foveal.systems.sparse.modal import MMINFERENCE
from foveal.systems.sparse.native import FLASH_SPARSE_ATTENTION, NSA
from foveal.systems.sparse.prefill import MINFERENCE, PBS_ATTENTION, SALE, XATTENTION
from foveal.systems.sparse.steps import DELTA_TOKEN_ATTENTION, SELF_SELECTED_SPAN
from foveal.systems.sparse.tokens import LOKI, SPATTEN, SQUEEZED_ATTENTION, SUPERLINEAR

__all__ = [
    "SYSTEMS",
    "Head",
    "Mode",
    "attend_planned",
    "heads_of",
    "plan_of",
    "search_heads",
]

SYSTEMS: tuple[System, ...] = (
    NSA,
    FLASH_SPARSE_ATTENTION,
    MINFERENCE,
    XATTENTION,
    PBS_ATTENTION,
    SALE,
    VGGT_BLOCK_SPARSE,
    SPARSE_VDIT,
    SQUEEZED_ATTENTION,
    LOKI,
    SUPERLINEAR,
    SPATTEN,
    *LEARNED,
    INFLLM_V2,
    MMINFERENCE,
    DELTA_TOKEN_ATTENTION,
    SELF_SELECTED_SPAN,
    SEA,
    NATS,
    LEMO,
    REPRESENTATION_SHIFT,
)
