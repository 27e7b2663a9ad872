"""How a visible pair counts: values composed with `+`."""

from foveal.scores.base import Score
from foveal.scores.bias import Alibi, Bias, KeyBias, RelativeBias
from foveal.scores.entmax import Entmax
from foveal.scores.local_linear import LocalLinear, Parallax
from foveal.scores.softmax import Softmax

__all__ = [
    "Alibi",
    "Bias",
    "Entmax",
    "KeyBias",
    "LocalLinear",
    "Parallax",
    "RelativeBias",
    "Score",
    "Softmax",
]
