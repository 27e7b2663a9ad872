"""What a cache policy is: it sees what a layer has read, and says which of it stays, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from foveal._arguments import finite
from foveal._errors import SelectionError
from foveal._shares import share_of

_FROM_ZERO = {"image", "least", "recent", "seed", "sink_tokens", "top"}
_SHARES = {"core", "heavy", "recent", "secondary", "share", "text"}
_SHARES_ABOVE_ZERO = {"recovery", "retain"}


@dataclass(frozen=True)
class Counts:
    """Where a layer stands: tokens read in this call, stored per head at most, ever seen."""

    read: int
    stored: int
    seen: int


@dataclass(frozen=True)
class Reading:
    """What one layer holds behind one call, the newest token last.

    Shapes: q [B, Lq, Hq, D], the queries of the call; k [B, L, Hkv, D], v [B, L, Hkv, Dv], all stored
    tokens in order of time, each head's from the front; real bool [B, Hkv, L], False behind a head's
    last token; positions int64 [B, Hkv, L]; tokens int64 [B, seen], the token numbers, where known; memo
    int64 [B, Hkv, L], what the last decision noted per token, -1 for tokens that came since.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor
    positions: Tensor
    scale: float
    soft_cap: float | None = None
    causal: bool = True
    layer: int = 0
    layers: int = 1
    tokens: Tensor | None = None
    memo: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    @property
    def lengths(self) -> Tensor:
        """Stored tokens of every sequence and head, [B, Hkv]."""
        return self.real.sum(-1)

    @property
    def age(self) -> Tensor:
        """0 for the newest token of a head, 1 for the one before; negative behind the last."""
        places = torch.arange(self.real.shape[-1], device=self.real.device)
        return self.lengths[..., None] - 1 - places


@dataclass(frozen=True)
class Vote:
    """What a policy remembers of one layer: importance per token, [B, Hkv, L], -inf where none is."""

    scores: Tensor
    real: Tensor
    age: Tensor
    statistic: Tensor | None = None


@dataclass(frozen=True)
class Merge:
    """Tokens that one of them stands for from now on.

    owner int64 [B, Hkv, L]: the token that each one becomes part of, itself where it stays;
    weights [B, Hkv, L]: its share there; the shares of an owner sum to 1.
    """

    owner: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Decision:
    """What happens to the stored tokens of one layer; all masks bool [B, Hkv, L].

    keep: those that stay.  reduced: of these, those kept in 8 bits, or, with a `sparsity` above 0,
    without that share of the elements of k and v.  idle: of these, those that are stored and not
    attended to until the policy decides again, on the host with `host`.  memo int64 [B, Hkv, L]: a note
    per token for that occasion.
    """

    keep: Tensor
    reduced: Tensor | None = None
    idle: Tensor | None = None
    merge: Merge | None = None
    sparsity: float = 0.0
    host: bool = False
    memo: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Base class of the cache policies.

    Options: budget, tokens kept per key head (int), or the share of the prompt kept (float, 0 < b <= 1).
    A policy acts when more than that is stored: `vote` looks at one layer, `settle` turns the votes
    of all layers of its `scope` into decisions.
    """

    scope: ClassVar[str] = "layer"
    budget: int | float = 1024

    def __post_init__(self) -> None:
        if not isinstance(self.budget, int | float):
            raise SelectionError("budget", self.budget, "a number of tokens, or a share, is needed")
        for each in fields(self):
            _check_option(each.name, str(each.type), getattr(self, each.name))
        fits = self.budget >= 1 if isinstance(self.budget, int) else 0 < self.budget <= 1
        if isinstance(self.budget, bool) or not fits:
            needed = "a number of tokens of at least 1, or a share above 0 and up to 1, is needed"
            raise SelectionError("budget", self.budget, needed)

    def tokens(self, seen: int) -> int:
        """Tokens that may stay of `seen`."""
        if isinstance(self.budget, int):
            return self.budget
        return max(1, share_of(seen, self.budget))

    def due(self, counts: Counts) -> bool:
        """Whether to act now: behind a prompt (or a piece of it) that does not fit."""
        return counts.read > 1 and counts.stored > self.tokens(counts.seen)

    @abstractmethod
    def vote(self, reading: Reading) -> Vote:
        """Looks at one layer."""

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        """One decision per vote: by default the tokens of largest score, as many as the budget."""
        return [Decision(largest(vote.scores, self.tokens(seen))) for vote in votes]


def _check_option(name: str, kind: str, value: object) -> None:
    """Raises for a number of another kind, or out of range."""
    if kind == "int":
        least = 0 if name in _FROM_ZERO else 1
        odd = name == "pool"
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not fits or (odd and isinstance(value, int) and value % 2 == 0):
            needed = f"an {'odd ' * odd}integer of at least {least} is needed"
            raise SelectionError(name, value, needed)
    number = kind == "float" or (kind == "float | None" and value is not None)
    if number and (isinstance(value, bool) or not finite(value)):
        raise SelectionError(name, value, "a number is needed")
    if number:
        assert isinstance(value, int | float)
        _check_range(name, value)
    if kind == "bool" and not isinstance(value, bool):
        raise SelectionError(name, value, "True or False is needed")
    if kind == "tuple[int, ...]" and not _whole_numbers(value):
        raise SelectionError(name, value, "a tuple of whole numbers of at least 0 is needed")


def _check_range(name: str, value: float) -> None:
    if name in _SHARES and not 0 <= value <= 1:
        raise SelectionError(name, value, "a share from 0 to 1 is needed")
    if name in _SHARES_ABOVE_ZERO and not 0 < value <= 1:
        raise SelectionError(name, value, "a share above 0 and up to 1 is needed")
    if name == "sigma" and not value > 0:
        raise SelectionError(name, value, "a distance above 0 is needed")
    if name == "ratio" and not value >= 1:
        raise SelectionError(name, value, "at least 1 is needed")


def _whole_numbers(value: object) -> bool:
    return isinstance(value, tuple | list) and all(
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value
    )


def largest(scores: Tensor, count: int | Tensor) -> Tensor:
    """Marks the `count` largest scores of every head (an int, or one number per head), never -inf.

    Of equal scores the later ones come first.
    """
    limit = torch.as_tensor(count, device=scores.device)
    limit = limit if limit.dim() == 0 else limit[..., None]
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places).flip(-1)
    return (rank < limit) & (scores > -torch.inf)


def protect(scores: Tensor, always: Tensor, real: Tensor) -> Tensor:
    """Scores with +inf where a token must stay and -inf where there is none."""
    return scores.masked_fill(always, torch.inf).masked_fill(~real, -torch.inf)
