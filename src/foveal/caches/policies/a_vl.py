"""A-VL: image tokens in three classes, text tokens in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveal._errors import SelectionError
from foveal._shares import share_of
from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote, largest
from foveal.caches.policies.statistics import attention_sums, per_kv_head, window_weights


@dataclass(frozen=True, kw_only=True)
class AVL(Policy):
    """Attends to the core of an image, stores a second class of it, drops the rest.

    Image tokens are ranked by the attention of the last query, mean over all heads: the share `core` is
    attended to, the next `secondary` is stored and attended to only when the core is chosen again,
    every `period` generated tokens; the rest goes behind the prompt.  Of the text the share `text` of
    largest accumulated attention stays, half of it the newest.
    Options: image, the number of the token that stands for a piece of an image; the shares, by default
    those of the budget: text all of it, core two fifths and secondary three.
    Limits: needs to know the tokens of the prompt.
    Paper: A-VL: Adaptive Attention for Large Vision-Language Models (2409.14846).
    """

    budget: int | float = 0.5
    image: int = 0
    core: float | None = None
    secondary: float | None = None
    text: float | None = None
    period: int = 16

    def due(self, counts: Counts) -> bool:
        if counts.stored <= self.tokens(counts.seen):
            return False
        return counts.read > 1 or counts.seen % self.period == 0

    def vote(self, reading: Reading) -> Vote:
        if reading.tokens is None:
            raise SelectionError("tokens", None, "A-VL needs token numbers, not embeddings")
        own = reading.tokens.to(reading.q.device)[:, None].expand(-1, reading.k.shape[2], -1)
        image = own.gather(-1, reading.positions.clamp(min=0)) == self.image
        last = window_weights(reading, 1)[:, :, 0].mean(1, keepdim=True).expand(image.shape)
        prompt = reading.q.shape[1] > 1
        used = per_kv_head(attention_sums(reading), reading.groups) if prompt else last
        behind = torch.full_like(last, float(prompt))
        return Vote(last, reading.real, reading.age, torch.stack([image.float(), used, behind]))

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        stored = max(int(vote.real.sum(-1).amax()) for vote in votes)
        share = min(self.tokens(seen) / stored, 1.0)
        given = (self.core, 0.4), (self.secondary, 0.6), (self.text, 1.0)
        shares = [part * share if own is None else own for own, part in given]
        return [_classes(vote, *shares) for vote in votes]


def _classes(vote: Vote, core_share: float, secondary: float, text_share: float) -> Decision:
    """What is attended to, stored, and dropped."""
    assert vote.statistic is not None
    image, used, behind = vote.statistic
    of_image, of_text = (image > 0) & vote.real, (image == 0) & vote.real
    ranked = vote.scores.masked_fill(~of_image, -torch.inf)
    count = of_image.sum(-1)
    if not bool(behind.any()):
        core = largest(ranked, share_of(count, core_share / (core_share + secondary)))
        return Decision(vote.real, idle=of_image & ~core)
    stored = largest(ranked, share_of(count, core_share + secondary))
    core = largest(ranked, share_of(count, core_share))
    newest = of_text & (vote.age < share_of(of_text.sum(-1), text_share / 2)[..., None])
    heavy = used.masked_fill(~of_text, -torch.inf).masked_fill(newest, torch.inf)
    text = largest(heavy, share_of(of_text.sum(-1), text_share))
    return Decision(stored | text | (of_text & (vote.age == 0)), idle=stored & ~core)
