"""Blocks of FLUX, built from their configuration, whose attention is replaced in one line.

block.attn.set_processor(GridAttention((64, 64), fv.Neighborhood((24, 24), stride=8)))

Image tokens then see their neighborhood and the whole text, text tokens see everything: what
Generalized Neighborhood Attention (2504.16922) does to FLUX.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

import foveal as fv
from foveal.compose import attend_with_context
from foveal.errors import MissingDependencyError

Kind = Literal["double", "single"]


def diffusers_models() -> tuple[Any, Any]:
    """The module of FLUX's blocks and the one of its embeddings; needs the extra `diffusion`."""
    try:
        from diffusers.models import embeddings
        from diffusers.models.transformers import transformer_flux
    except ImportError as error:
        raise MissingDependencyError("diffusers", "the block of FLUX", "diffusion") from error
    return transformer_flux, embeddings


def flux_block(kind: Kind = "double", heads: int = 24, head_dim: int = 128) -> nn.Module:
    """A block of FLUX.1 with random weights: separate streams ("double") or one ("single")."""
    flux, _ = diffusers_models()
    name = "FluxTransformerBlock" if kind == "double" else "FluxSingleTransformerBlock"
    block: nn.Module = getattr(flux, name)(heads * head_dim, heads, head_dim)
    return block


class GridAttention:
    """An attention processor: image tokens on a grid see a pattern of it, and all of the text.

    Options: grid of the image tokens, which stand behind the text in raster order; pattern on that
    grid.
    Equals: the library's own processor with pattern Dense().
    """

    def __init__(self, grid: tuple[int, ...], pattern: fv.Pattern) -> None:
        self.grid = grid
        self.pattern = pattern

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("attention_mask: the pattern says who sees whom; pass none")
        q, k, v = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), attn)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = _heads(attn, encoder_hidden_states, added, attn, "added_")
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            _, embeddings = diffusers_models()
            rotate = embeddings.apply_rotary_emb
            q, k = (rotate(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        o = attend_image_and_text(q, k, v, self.grid, self.pattern).flatten(2)
        if encoder_hidden_states is None:
            return o
        words = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](o[:, words:]))
        return image, attn.to_add_out(o[:, :words])


def _heads(
    attn: Any, tokens: Tensor, maps: tuple[Any, Any, Any], norms: Any, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, L, heads, head_dim], q and k normalised."""
    q, k, v = (project(tokens).unflatten(-1, (-1, attn.head_dim)) for project in maps)
    return getattr(norms, f"norm_{prefix}q")(q), getattr(norms, f"norm_{prefix}k")(k), v


def attend_image_and_text(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], pattern: fv.Pattern
) -> Tensor:
    """Image tokens see `pattern` on their grid and the text, text tokens see everything.

    Shapes: q, k, v and o [B, words + prod(grid), H, D], text first.
    """
    words = q.shape[1] - math.prod(grid)
    if words < 0:
        raise ValueError(f"grid: got {grid}; at most {q.shape[1]} tokens are there")
    text = fv.attend(q[:, :words], k, v)
    image = (x[:, words:].unflatten(1, grid) for x in (q, k, v))
    near = attend_with_context(*image, k[:, :words], v[:, :words], pattern) if words else None
    if near is None:
        near = fv.attend(*(x.unflatten(1, grid) for x in (q, k, v)), pattern)
    return torch.cat([text, near.flatten(1, -3)], dim=1)
