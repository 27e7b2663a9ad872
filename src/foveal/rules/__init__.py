"""How a state changes with each token."""

from foveal.rules.additive import Additive
from foveal.rules.base import Rule
from foveal.rules.delta import Delta
from foveal.rules.mlstm import MLSTM

__all__ = ["MLSTM", "Additive", "Delta", "Rule"]
