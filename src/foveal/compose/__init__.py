"""Attention made of several calls of `attend`: what one call cannot say, by an identity."""

from foveal.compose.context import attend_with_context
from foveal.compose.finer import attend_finer
from foveal.compose.merge import merge
from foveal.compose.padding import padding_bias
from foveal.compose.weighted import attend_weighted

__all__ = ["attend_finer", "attend_weighted", "attend_with_context", "merge", "padding_bias"]
