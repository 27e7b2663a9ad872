"""Feature maps with weights that are trained."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import RuleError
from foveal.features.random import fourier_random, positive_random


class SpectralFeatures(nn.Module):
    """Random features whose frequencies are learned: the spectral density of an attention kernel.

    Shapes: x [B, L, H, D]; returns [B, L, H, features], or twice as many for form "fourier".
    Options: density "mixture" draws frequencies from `components` Gaussians with learned means and
    variances, in equal shares; "generator" makes them by a learned net from noise.  form "positive" is
    `positive_random`, "fourier" is `fourier_random` with 1 added to each feature, against
    negative weights.  The noise is drawn once, from `seed`; x is first divided by D^1/4.
    Paper: On Learning the Transformer Kernel (2110.08323).
    """

    noise: Tensor

    def __init__(
        self,
        dim: int,
        features: int | None = None,
        *,
        density: Literal["mixture", "generator"] = "mixture",
        form: Literal["positive", "fourier"] = "positive",
        components: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        features = dim if features is None else features
        if density not in ("mixture", "generator"):
            raise RuleError("density", density, '"mixture" or "generator" is needed')
        if form not in ("positive", "fourier"):
            raise RuleError("form", form, '"positive" or "fourier" is needed')
        if features % components:
            raise RuleError("components", components, f"a divisor of {features} is needed")
        self.density = density
        self.form = form
        source = torch.Generator().manual_seed(seed)
        self.register_buffer("noise", torch.randn(features, dim, generator=source))
        if density == "mixture":
            self.means = nn.Parameter(0.1 * torch.randn(components, dim, generator=source))
            self.log_scales = nn.Parameter(torch.zeros(components, dim))
        else:
            self.net = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def frequencies(self) -> Tensor:
        """Omega [features, D]"""
        if self.density == "generator":
            made: Tensor = self.net(self.noise)
            return made
        share = len(self.noise) // len(self.means)
        means, scales = (
            x.repeat_interleave(share, dim=0) for x in (self.means, self.log_scales.exp())
        )
        return means + scales * self.noise

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "positive":
            return positive_random(x, self.frequencies())
        return fourier_random(x * x.shape[-1] ** -0.25, self.frequencies()) + 1.0


class FeedForwardFeatures(nn.Module):
    """phi(x) = softplus(W_n relu(... relu(W_1 x))): a small net whose outputs are positive.

    Shapes: x [..., D]; returns [..., features].
    Options: widths of the hidden layers.
    Paper: Linear Self-Attention Approximation via Trainable Feedforward Kernel (2211.04076); the
    paper leaves layer sizes open.
    """

    def __init__(
        self, dim: int, features: int | None = None, *, widths: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        sizes = (dim, *widths, dim if features is None else features)
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in itertools.pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = torch.relu(layer(x))
        return F.softplus(self.layers[-1](x))
