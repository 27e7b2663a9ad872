"""How a state changes with each token."""

from foveal.rules.additive import Additive
from foveal.rules.base import Rule
from foveal.rules.delta import Delta
from foveal.rules.mlstm import MLSTM
from foveal.rules.two_state import TwoState

__all__ = ["MLSTM", "Additive", "Delta", "Rule", "TwoState"]
