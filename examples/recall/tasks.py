"""Two tasks: recall of what stood behind a key, and the next character of Python's documentation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HIDDEN = -100
"""A target that does not count."""


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall: pairs of a key and a value, then keys; what stood behind them?

    A sequence has `pairs` different keys, each followed by a value, then keys drawn from them up to
    `length` tokens.  Tokens below `words` are keys, the others values.
    """

    pairs: int
    length: int
    words: int
    name = "recall"
    measure = "share of keys answered rightly"

    @property
    def vocabulary(self) -> int:
        return 2 * self.words

    def batch(
        self, count: int, source: torch.Generator, held_out: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Tokens and targets, int64 [count, length] on the device of the source.

        For training, a sequence has all, half, a quarter or an eighth of the pairs: few are learned
        first.  held_out, all have all.
        """
        device = source.device

        def drawn(limit: int, *shape: int) -> Tensor:
            return torch.randint(limit, shape, generator=source, device=device)

        keys = torch.rand(count, self.words, generator=source, device=device).argsort(-1)
        keys = keys[:, : self.pairs]
        values = self.words + drawn(self.words, *keys.shape)
        shares = torch.zeros_like(keys[:, :1]) if held_out else drawn(4, count, 1)
        pairs = (self.pairs >> shares).clamp(min=1)
        chance = torch.rand(count, self.length, generator=source, device=device)
        asked = (chance * pairs).long()
        place = torch.arange(self.length, device=device)
        told = torch.stack([keys, values], dim=-1).flatten(1)
        told = told[:, place.clamp(max=2 * self.pairs - 1)]
        telling = place < 2 * pairs
        tokens = torch.where(telling, told, keys.gather(1, asked))
        targets = torch.where(telling, HIDDEN, values.gather(1, asked))
        return tokens, targets

    def score(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The share of right answers."""
        counted = targets != HIDDEN
        right: Tensor = (logits.argmax(-1) == targets)[counted].double().mean()
        return right


@dataclass(frozen=True)
class Text:
    """The next character of Python's own documentation; its last tenth is held out."""

    length: int
    name = "text"
    measure = "bits per character"

    @cached_property
    def _content(self) -> tuple[Tensor, int]:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        alphabet = sorted(set(text))
        numbers = {character: number for number, character in enumerate(alphabet)}
        return torch.tensor([numbers[character] for character in text]), len(alphabet)

    @property
    def vocabulary(self) -> int:
        return self._content[1]

    def batch(
        self, count: int, source: torch.Generator, held_out: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, int64 [count, length] on the device of the source."""
        text = self._content[0]
        border = len(text) * 9 // 10
        text = (text[border:] if held_out else text[:border]).to(source.device)
        starts = torch.randint(
            len(text) - self.length, (count, 1), generator=source, device=source.device
        )
        places = starts + torch.arange(self.length + 1, device=source.device)
        tokens = text[places]
        return tokens[:, :-1], tokens[:, 1:]

    def score(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Bits per character."""
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten())
        return loss / torch.log(torch.tensor(2.0, dtype=torch.float64))


Task = Recall | Text
