"""Attention made of several calls of `attend`: what one call cannot say, by an identity."""

from foveal.compose.chosen_heads import attend_heads, decode_heads
from foveal.compose.context import attend_with_context
from foveal.compose.decode_selected import decode_selected
from foveal.compose.finer import attend_finer
from foveal.compose.louis_cache import LouisCache
from foveal.compose.merge import merge
from foveal.compose.native_sparse import (
    SparseBranches,
    compress_mean,
    native_sparse,
    selected_blocks,
)
from foveal.compose.native_sparse_cache import NativeSparseCache
from foveal.compose.nosa_cache import NosaCache
from foveal.compose.padding import padding_bias
from foveal.compose.retrieval_cache import RetrievalCache
from foveal.compose.segments import attend_segments
from foveal.compose.selected import attend_selected
from foveal.compose.weighted import attend_weighted

__all__ = [
    "LouisCache",
    "NativeSparseCache",
    "NosaCache",
    "RetrievalCache",
    "SparseBranches",
    "attend_finer",
    "attend_heads",
    "attend_segments",
    "attend_selected",
    "attend_weighted",
    "attend_with_context",
    "compress_mean",
    "decode_heads",
    "decode_selected",
    "merge",
    "native_sparse",
    "padding_bias",
    "selected_blocks",
]
