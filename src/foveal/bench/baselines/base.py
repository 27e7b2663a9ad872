"""What a competitor is: something that computes attention on a case, ours or someone else's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from foveal.patterns import Pattern
from foveal.scores import Softmax

if TYPE_CHECKING:
    from foveal.bench.cases import Case

Inputs = tuple[Tensor, ...]
MASK_LIMIT = 2**30
"""Bytes of an Lq x Lk boolean mask beyond which a competitor that needs one is not asked."""


@dataclass(frozen=True)
class Prepared:
    """A competitor ready to run on one case.

    `inputs` are leaves in the competitor's own layout, so that no competitor pays for a copy
    that its users would not make.  `attend` computes the output, in that layout.  `tokens`
    brings an output or a gradient of the i-th input back to [B, *grid, H, D].  `lse`, where the
    competitor has one, computes (output, lse [B, *grid, H]).  `held_bytes` is what it keeps
    between calls (masks, lists).
    """

    inputs: Inputs
    attend: Callable[..., Tensor]
    tokens: Callable[[Tensor], Tensor] = lambda tensor: tensor
    with_lse: Callable[..., tuple[Tensor, Tensor]] | None = None
    held_bytes: int = 0
    backward: bool = True
    _cotangent: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.attend(*self.inputs)

    def loss_and_gradients(
        self,
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], object]] | None:
        """The forward that records a graph, and the backward from its output."""
        if not self.backward:
            return None
        leaves = self.leaves()

        def forward() -> Tensor:
            return self.attend(*leaves)

        def backward(out: Tensor) -> object:
            if not self._cotangent:
                self._cotangent.append(torch.randn_like(out))
            return torch.autograd.grad(out, leaves, self._cotangent[0])

        return forward, backward

    def on(self, inputs: Inputs) -> Prepared:
        """The same on other inputs of its own layout."""
        return replace(self, inputs=inputs)

    def leaves(self) -> Inputs:
        """The inputs, asking for gradients."""
        return tuple(tensor.detach().requires_grad_() for tensor in self.inputs)


class Competitor:
    """One way to compute attention.  Subclasses say what they cannot do, in sentences."""

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str | None] = None

    def absent(self) -> str | None:
        """Why it cannot run here at all, or None."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"the package {self.package} is not installed"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot compute this case, or None."""
        return None

    def refuses_backward(self, case: Case, device: torch.device) -> str | None:
        """Why it has no backward here, or None."""
        return None

    def pattern(self, case: Case) -> Pattern:
        """The pairs that it computes; another pattern than the case's makes it a yardstick."""
        return case.pattern

    def plan(self, case: Case, device: torch.device) -> dict[str, Any]:
        """What it says about how it will run, as JSON data."""
        return {}

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Masks, lists, compilation: everything that is not part of a call."""
        raise NotImplementedError


def heads_first(tensor: Tensor) -> Tensor:
    """[B, *grid, H, D] as a contiguous [B, H, L, D]."""
    return tensor.flatten(1, -3).transpose(1, 2).contiguous()


def heads_last(case: Case) -> Callable[[Tensor], Tensor]:
    """The way back: [B, H, L, D] as [B, *grid, H, D]."""

    def back(tensor: Tensor) -> Tensor:
        tokens = tensor.transpose(1, 2)
        return tokens.view(tokens.shape[0], *case.grid, *tokens.shape[2:])

    return back


def plain_softmax(case: Case) -> str | None:
    """The refusal of those who know a scale and nothing else."""
    score = case.score
    if isinstance(score, Softmax) and score.soft_cap is None and score.sink is None:
        return None
    return f"it computes a scaled softmax only, not {score.key}"


def small_enough_to_mask(case: Case) -> str | None:
    """The refusal of those who need a dense mask, when it is too large."""
    size = case.tokens**2 * (case.q_heads if case.pattern.depends_on_data else 1)
    if size <= MASK_LIMIT:
        return None
    return (
        f"the mask alone takes {size / 1e9:.1f} GB; this benchmark gives a mask "
        f"up to {MASK_LIMIT / 1e9:.1f} GB"
    )


def scale_of(case: Case) -> float | None:
    return case.score.scale if isinstance(case.score, Softmax) else None
