"""The channel mixer with a gate."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class GatedUnits(nn.Module):
    """y = W_3 (activation(W_1 x) * W_2 x), without activation by default.

    Shapes: x and y [..., dim]; hidden is the width between.
    Paper: GLU Variants Improve Transformer (2002.05202); without activation, TransNormerLLM
    (2307.14995).
    """

    def __init__(
        self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        y: Tensor = self.down(
            (gate if self.activation is None else self.activation(gate)) * self.up(x)
        )
        return y
