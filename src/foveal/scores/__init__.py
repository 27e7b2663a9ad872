"""How a visible pair counts: values composed with `+`."""

from foveal.scores.base import Score
from foveal.scores.bias import Alibi, Bias, KeyBias, RelativeBias
from foveal.scores.softmax import Softmax

__all__ = ["Alibi", "Bias", "KeyBias", "RelativeBias", "Score", "Softmax"]
