"""The attention of a FLUX block, replaced in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from examples.diffusion.block import GridAttention, attend_image_and_text, flux_block

pytest.importorskip("diffusers", reason="the block comes with diffusers, extra diffusion")

GRID, WORDS, HEADS, DIM = (5, 6), 4, 2, 16


def run(kind: Any, processor: GridAttention | None) -> tuple[Tensor, ...]:
    """Outputs and gradients of a block on fixed inputs."""
    torch.manual_seed(3)
    block = flux_block(kind, HEADS, DIM).double()
    if processor is not None:
        block.attn.set_processor(processor)  # type: ignore[union-attr, operator]
    image = torch.randn(2, 30, HEADS * DIM, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, WORDS, HEADS * DIM, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(2, HEADS * DIM, dtype=torch.float64)
    angle = torch.randn(30 + WORDS, DIM // 2, dtype=torch.float64).repeat_interleave(2, 1)
    outputs = block(image, text, condition, (angle.cos(), angle.sin()))
    loss = sum((o.sin().sum() for o in outputs), torch.zeros((), dtype=torch.float64))
    parameters = [p for p in block.parameters() if p.requires_grad]
    return (*outputs, *torch.autograd.grad(loss, [image, text, *parameters], allow_unused=True))


@pytest.mark.parametrize("kind", ["double", "single"])
def test_dense_is_the_library_s_own(kind: str) -> None:
    own, ours = run(kind, None), run(kind, GridAttention(GRID, fv.Dense()))
    for a, b in zip(own, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # Rotary embedding runs in float32 there, whatever the model.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_image_tokens_see_their_neighborhood_and_the_text(source: torch.Generator) -> None:
    q, k, v = (
        torch.randn(2, WORDS + 30, HEADS, 8, generator=source, dtype=torch.float64)
        for _ in range(3)
    )
    pattern = fv.Neighborhood((3, 4), stride=2)
    visible = torch.ones(WORDS + 30, WORDS + 30, dtype=torch.bool)
    visible[WORDS:, WORDS:] = pattern.dense_mask(GRID, GRID)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(attend_image_and_text(q, k, v, GRID, pattern), expected)
    alone = attend_image_and_text(*(x[:, WORDS:] for x in (q, k, v)), GRID, pattern)
    image = [x[:, WORDS:].unflatten(1, GRID) for x in (q, k, v)]
    torch.testing.assert_close(alone, fv.attend(*image, pattern).flatten(1, 2))


def test_neighborhoods_change_the_block_and_train(source: torch.Generator) -> None:
    results = run("double", GridAttention(GRID, fv.Neighborhood((3, 3))))
    assert not torch.allclose(results[1], run("double", None)[1])
    assert all(g is None or bool(g.isfinite().all()) for g in results)


def test_masks_are_not_taken_twice() -> None:
    block = flux_block("single", HEADS, DIM)
    block.attn.set_processor(GridAttention(GRID, fv.Dense()))  # type: ignore[union-attr, operator]
    x = torch.zeros(1, 30, HEADS * DIM)
    with pytest.raises(ValueError, match="attention_mask"):
        block.attn(x, attention_mask=torch.ones(1, 30))  # type: ignore[operator]
