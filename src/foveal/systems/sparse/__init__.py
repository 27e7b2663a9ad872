"""Attention over selected blocks, columns, spans and keys, chosen by rules or learned."""

from foveal.systems.base import System
from foveal.systems.sparse.grids import SPARSE_VDIT, VGGT_BLOCK_SPARSE
from foveal.systems.sparse.learned import LEARNED
from foveal.systems.sparse.native import FLASH_SPARSE_ATTENTION, NSA
from foveal.systems.sparse.prefill import MINFERENCE, PBS_ATTENTION, SALE, XATTENTION
from foveal.systems.sparse.tokens import LOKI, SPATTEN, SQUEEZED_ATTENTION, SUPERLINEAR

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
)
