"""Feature maps: functions of q and k whose products are the weights of linear attention."""

from foveal.features.contraction import contract, toeplitz_contract
from foveal.features.cosine_transform import dct_matrix, dct_softmax, gaussian_quantiles
from foveal.features.directions import norm_aware_k, norm_aware_q, standardised, unit
from foveal.features.learned import FeedForwardFeatures, SpectralFeatures
from foveal.features.positional import cosine_reweighted, linear_relative
from foveal.features.random import (
    fourier_random,
    orthogonal_projection,
    positive_random,
    relu_random,
)
from foveal.features.slopes import alibi_slopes, linear_slopes
from foveal.features.taylor import taylor

__all__ = [
    "FeedForwardFeatures",
    "SpectralFeatures",
    "alibi_slopes",
    "contract",
    "cosine_reweighted",
    "dct_matrix",
    "dct_softmax",
    "fourier_random",
    "gaussian_quantiles",
    "linear_relative",
    "linear_slopes",
    "norm_aware_k",
    "norm_aware_q",
    "orthogonal_projection",
    "positive_random",
    "relu_random",
    "standardised",
    "taylor",
    "toeplitz_contract",
    "unit",
]
