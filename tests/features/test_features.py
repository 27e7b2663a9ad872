"""Feature maps: products that they promise, limits, estimates without bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal import features
from foveal.layers.factorised_axes import rotate
from foveal.layers.vision_linear import grid_rotary


def normal(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def products(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("bihd,bjhd->bhij", a, b)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylor_is_the_series(order: int, source: torch.Generator) -> None:
    q, k = normal(source, 2, 7, 2, 5), normal(source, 2, 6, 2, 5)
    z = 0.3 * products(q, k)
    series = sum(z**power / math.factorial(power) for power in range(order + 1))
    found = products(*(features.taylor(x, order, 0.3) for x in (q, k)))
    torch.testing.assert_close(found, series)
    with pytest.raises(fv.errors.RuleError, match="order"):
        features.taylor(q, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_keep_their_digits_in_low_precision(
    dtype: torch.dtype, source: torch.Generator
) -> None:
    """bfloat16 has no number between 256 and 258: phases must not be formed in the dtype of x."""
    places, x = torch.arange(3000, 3040), normal(source, 1, 40, 2, 4).to(dtype)
    angles = torch.rand(2, 4, generator=source, dtype=torch.float64)
    wide = x.double()
    for found, exact in (
        (
            features.linear_relative(x, places, angles),
            features.linear_relative(wide, places, angles),
        ),
        (
            features.cosine_reweighted(x, places, 4096),
            features.cosine_reweighted(wide, places, 4096),
        ),
    ):
        # Two roundings of the dtype, and one of a phase of 3000 in float32.
        bound = (
            2 * torch.finfo(dtype).eps + 3040 * torch.finfo(torch.float32).eps
        ) * wide.abs().max()
        assert float((found.double() - exact).abs().max()) <= float(bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotations_keep_their_digits_in_low_precision(
    dtype: torch.dtype, source: torch.Generator
) -> None:
    line, image = normal(source, 1, 50, 2, 8).to(dtype), normal(source, 1, 3, 300, 2, 8).to(dtype)
    place = torch.arange(50, dtype=torch.float64) / 50
    for found, exact in (
        (rotate(line, place), rotate(line.double(), place)),
        (grid_rotary(image, 10000.0), grid_rotary(image.double(), 10000.0)),
    ):
        # Two products and a sum, each rounded once, of cosines rounded before.
        bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert float((found.double() - exact).abs().max()) <= float(bound)


def test_blocks_of_a_projection_are_orthogonal(source: torch.Generator) -> None:
    rows = features.orthogonal_projection(11, 4, generator=source, norms="fixed").double()
    assert rows.shape == (11, 4)
    for block in rows.split(4):
        torch.testing.assert_close(
            block @ block.mT, 4 * torch.eye(len(block), dtype=torch.float64), rtol=0, atol=1e-5
        )
    lengths = features.orthogonal_projection(40_000, 4, generator=source).norm(dim=-1)
    # E |g| of a Gaussian vector in four dimensions, with a standard error of 0.0025.
    assert abs(float(lengths.mean()) - math.sqrt(2) * math.gamma(2.5) / math.gamma(2)) < 0.0125


def spread(estimates: Tensor, exact: Tensor) -> Tensor:
    """Distance of the mean of estimates [n, ...] from the truth in standard errors."""
    return (estimates.mean(0) - exact) / (estimates.std(0) / len(estimates) ** 0.5)


@pytest.mark.parametrize("norms", ["chi", "iid"])
def test_positive_features_estimate_the_exponential_without_bias(
    norms: str, source: torch.Generator
) -> None:
    q, k = 0.7 * normal(source, 1, 3, 1, 6), 0.7 * normal(source, 1, 3, 1, 6)
    exact = (products(q, k) / math.sqrt(6)).exp()
    estimates = []
    for _ in range(600):
        omega = (
            features.orthogonal_projection(24, 6, generator=source)
            if norms == "chi"
            else torch.randn(24, 6, generator=source)
        )
        phi_q, phi_k = (features.positive_random(x, omega) for x in (q, k))
        assert float(phi_q.min()) > 0
        estimates.append(products(phi_q, phi_k))
    # Nine means: beyond five standard errors once in 200,000 runs.
    assert float(spread(torch.stack(estimates), exact).abs().max()) < 5


def test_many_features_are_softmax(source: torch.Generator) -> None:
    q, k, v = (0.5 * normal(source, 1, 9, 1, 4) for _ in range(3))
    omega = features.orthogonal_projection(40_000, 4, generator=source)
    phi_q, phi_k = (features.positive_random(x, omega) for x in (q, k))
    o = features.contract(phi_q, phi_k, v)
    assert float((o - fv.attend(q, k, v)).abs().max()) < 0.02


def test_shifts_cancel(source: torch.Generator) -> None:
    q, k, v = (normal(source, 2, 9, 2, 4) for _ in range(3))
    omega = features.orthogonal_projection(12, 4, generator=source)
    plain = features.contract(*(features.positive_random(x, omega) for x in (q, k)), v)
    shifted = features.contract(
        features.positive_random(q, omega, shift="token"),
        features.positive_random(k, omega, shift="sequence"),
        v,
    )
    torch.testing.assert_close(plain, shifted)
    large = features.positive_random(100 * q.float(), omega, shift="token")
    assert bool(large.isfinite().all())
    torch.testing.assert_close(large.amax(-1), torch.full_like(large[..., 0], 12**-0.5))


def test_relu_features(source: torch.Generator) -> None:
    x, omega = normal(source, 1, 3, 1, 4), torch.randn(5, 4, generator=source)
    expected = ((x / 4**0.25) @ omega.double().mT).clamp(min=0) + 1e-3
    torch.testing.assert_close(features.relu_random(x, omega), expected / 5**0.5)


def test_fourier_features_estimate_the_gaussian(source: torch.Generator) -> None:
    q, k = normal(source, 1, 3, 1, 4), normal(source, 1, 3, 1, 4)
    omega = torch.randn(200_000, 4, generator=source)
    found = products(features.fourier_random(q, omega), features.fourier_random(k, omega))
    exact = torch.exp(
        -(q.transpose(1, 2)[..., None, :] - k.transpose(1, 2)[..., None, :, :]).square().sum(-1) / 2
    )
    assert float((found - exact).abs().max()) < 6 / 200_000**0.5


def test_cosine_reweighting(source: torch.Generator) -> None:
    q, k = normal(source, 2, 7, 2, 3), normal(source, 2, 7, 2, 3)
    at = torch.arange(7, dtype=torch.float64)
    found = products(*(features.cosine_reweighted(x, at, 7) for x in (q, k)))
    cosines = torch.cos(math.pi * (at[:, None] - at) / 14)
    torch.testing.assert_close(found, products(q.relu(), k.relu()) * cosines)
    per_sample = features.cosine_reweighted(q, at.expand(2, -1), 7)
    torch.testing.assert_close(per_sample, features.cosine_reweighted(q, at, 7))


def test_linear_relative_positions(source: torch.Generator) -> None:
    q, k, theta = normal(source, 2, 7, 2, 3), normal(source, 2, 7, 2, 3), normal(source, 2, 3)
    at = torch.arange(7) + 100
    found = products(*(features.linear_relative(x, at, theta) for x in (q, k)))
    turned = torch.cos((at[:, None] - at)[..., None, None] * theta)  # [i, j, H, D]
    torch.testing.assert_close(found, torch.einsum("bihd,bjhd,ijhd->bhij", q, k, turned))


def test_directions(source: torch.Generator) -> None:
    x = normal(source, 2, 5, 2, 4)
    torch.testing.assert_close(features.unit(x).norm(dim=-1), torch.ones(2, 5, 2).double())
    assert float(features.unit(torch.zeros(1, 4)).abs().max()) == 0
    standard = features.standardised(x)
    torch.testing.assert_close(standard.mean(-1), torch.zeros(2, 5, 2).double())
    phi = features.norm_aware_q(x)
    length = x.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + length.tanh())
    torch.testing.assert_close(phi[..., :4] + phi[..., 4:], (x / length).abs() ** power)
    torch.testing.assert_close(
        features.norm_aware_k(x)[..., :4] - features.norm_aware_k(x)[..., 4:], x**3
    )


def test_norm_aware_gradients_are_finite_at_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    features.norm_aware_q(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_cosine_transform(source: torch.Generator) -> None:
    matrix = features.dct_matrix(7)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(7, dtype=torch.float64))
    at = torch.arange(7)
    row = [math.sqrt(2 / 7) * math.cos(math.pi * 3 * (2 * j + 1) / 14) for j in at.tolist()]
    torch.testing.assert_close(matrix[3], torch.tensor(row, dtype=torch.float64))
    x, weights = normal(source, 2, 7), features.gaussian_quantiles(7, source)
    expected = torch.softmax((x @ matrix.mT) * weights, dim=-1)
    torch.testing.assert_close(features.dct_softmax(x, weights), expected)


def test_learned_maps_learn(source: torch.Generator) -> None:
    x = normal(source, 1, 5, 2, 4)
    maps = [
        features.SpectralFeatures(4, 8),
        features.SpectralFeatures(4, 8, form="fourier"),
        features.SpectralFeatures(4, 8, density="generator"),
        features.FeedForwardFeatures(4, 6, widths=(5,)),
    ]
    for each in maps:
        each.double()
        phi = each(x)
        assert phi.shape[:3] == x.shape[:3]
        assert float(products(phi, phi).detach().min()) > -1e-9
        phi.sin().sum().backward()
        for name, parameter in each.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name
    for options in ({"density": "other"}, {"form": "other"}, {"features": 7, "components": 2}):
        with pytest.raises(fv.errors.RuleError):
            features.SpectralFeatures(4, **options)  # type: ignore[arg-type]


def test_standard_spectrum_is_performer(source: torch.Generator) -> None:
    learned = features.SpectralFeatures(4, 8).double()
    learned.means.data.zero_()
    x = normal(source, 1, 5, 2, 4)
    torch.testing.assert_close(learned(x), features.positive_random(x, learned.noise))


def test_contraction_is_attention_with_these_weights(source: torch.Generator) -> None:
    q, k = normal(source, 2, 5, 4, 3).abs(), normal(source, 2, 7, 2, 3).abs()
    v = normal(source, 2, 7, 2, 6)
    mask = torch.rand(2, 7, generator=source) < 0.7
    mask[:, 0] = True
    weights = products(q, k.repeat_interleave(2, 2)) * mask[:, None, None]
    repeated = v.repeat_interleave(2, 2)
    expected = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), repeated)
    torch.testing.assert_close(features.contract(q, k, v, key_mask=mask), expected)
    plain = torch.einsum("bhij,bjhd->bihd", products(q, k.repeat_interleave(2, 2)), repeated)
    torch.testing.assert_close(features.contract(q, k, v, normalised=False), plain)
    with pytest.raises(fv.errors.ShapeError):
        features.contract(q, k[..., :2], v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_toeplitz_forms_agree(causal: bool, length: int, source: torch.Generator) -> None:
    q, k = (normal(source, 2, length, 2, 3).abs() for _ in range(2))
    v, bias = normal(source, 2, length, 2, 4), normal(source, 2, 2 * length - 1)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    results = []
    for implementation in ("fft", "pairs"):
        o = features.toeplitz_contract(*leaves, causal=causal, implementation=implementation)
        weight = torch.ones_like(o).cumsum(1)
        results.append((o, *torch.autograd.grad(o, leaves, weight)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    at = torch.arange(length)
    weights = products(q, k) * bias[:, at - at[:, None] + length - 1].exp()
    weights = weights.tril() if causal else weights
    expected = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(results[0][0], expected)


def test_toeplitz_without_bias_is_the_contraction(source: torch.Generator) -> None:
    q, k, v = (normal(source, 1, 9, 2, 3).abs() for _ in range(3))
    zero = torch.zeros(2, 17, dtype=torch.float64)
    torch.testing.assert_close(
        features.toeplitz_contract(q, k, v, zero), features.contract(q, k, v)
    )
    with pytest.raises(fv.errors.ShapeError, match="bias"):
        features.toeplitz_contract(q, k, v, zero[:, 1:])
    with pytest.raises(fv.errors.RuleError, match="implementation"):
        features.toeplitz_contract(q, k, v, zero, implementation="fast")
