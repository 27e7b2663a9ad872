"""What is kept between calls serves training, whoever called first."""

import pytest
import torch

import foveal as fv

CASES = [
    (fv.Sphere(0.61), (11, 22)),
    (fv.Tree(torch.arange(468)[None] % 4), (468,)),
    (fv.Axial(0), (7, 9)),
    (fv.Neighborhood((3, 3), dilation=2), (9, 11)),
    (fv.Axial(0) | fv.Axial(1), (11, 13)),
    (fv.Scales((1, 3, 6), window=3), (46,)),
    (fv.Neighborhood((5, 4)), (17, 11)),
]


@pytest.mark.parametrize(("pattern", "grid"), CASES, ids=lambda x: str(x))
def test_training_after_inference(
    pattern: fv.Pattern, grid: tuple[int, ...], source: torch.Generator
) -> None:
    q, k, v = (torch.randn(1, *grid, 1, 4, generator=source) for _ in range(3))
    with torch.inference_mode():
        before = fv.attend(q, k, v, pattern, implementation="cpu")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    after = fv.attend(*leaves, pattern, implementation="cpu")
    assert torch.equal(after.detach(), before)
    assert all(g.isfinite().all() for g in torch.autograd.grad(after.sum(), leaves))
