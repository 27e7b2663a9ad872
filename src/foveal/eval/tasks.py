"""What is measured: loss and distance from exact attention, needles, recall, time and memory."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveal._errors import SelectionError
from foveal.eval.subject import Subject
from foveal.eval.variants import EXACT, Variant
from foveal.hf.fetched import Fetched

TASKS = ("loss", "needle", "recall", "speed")
_PLACES = ("harbour", "garden", "library", "station", "bakery", "theatre", "museum", "bridge")
_COLOURS = ("blue", "green", "silver", "golden", "crimson", "violet", "amber", "white")


@dataclass(frozen=True)
class Case:
    """One measurement: a task at a length, for one variant; `depth` for needles, `part` of the text."""

    task: str
    length: int
    variant: Variant
    depth: float | None = None
    part: int = 0

    @property
    def key(self) -> str:
        """What makes two cases the same one."""
        options = ",".join(f"{name}={value}" for name, value in self.variant.options)
        return f"{self.task}|{self.length}|{self.variant.label}|{options}|{self.depth}|{self.part}"


@dataclass
class Bench:
    """Runs cases on a model; what exact attention answered is kept for one length at a time.

    targets: tokens predicted behind a document; new_tokens: tokens generated where time is taken.
    """

    subject: Subject
    targets: int = 64
    new_tokens: int = 32
    exact: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    written: dict[int, list[int]] = field(default_factory=dict)

    def run(self, case: Case) -> dict[str, Any]:
        """The values of a case; raises FovealError where the variant cannot run."""
        measure = getattr(self, f"_{case.task}")
        with torch.inference_mode():
            found: dict[str, Any] = measure(case)
        return found

    def _loss(self, case: Case) -> dict[str, Any]:
        """A document of `length` tokens, then `targets` more: their loss, and distance from exact."""
        context, following = self._document(case)
        with case.variant.installed(self.subject.model):
            logits, cache = self._continued(context, following, case.variant.on_host)
        if case.variant.name == EXACT:
            self._remember(case, logits)
        exact = self._exact(case, context, following)
        ours, theirs = logits.log_softmax(-1), exact.log_softmax(-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1)
        loss = -ours[:-1].gather(-1, following[1:, None])
        return {
            "loss": float(loss.mean()),
            "divergence": float(divergence.mean()),
            "agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
            "cache_bytes": cache_bytes(cache),
            "full_layer_bytes": cache_bytes(cache, windows=False),
            "host_bytes": host_bytes(cache),
        }

    def _needle(self, case: Case) -> dict[str, Any]:
        """A fact at some depth of a long text; the share of its tokens that come first in the answer."""
        draw = random.Random(case.length * 1000 + round(100 * (case.depth or 0)) + 7 * case.part)
        return self._asked(case, [_fact(draw, 0)], [case.depth or 0.0], 0)

    def _recall(self, case: Case) -> dict[str, Any]:
        """Up to eight facts spread over a long text, one asked for."""
        draw = random.Random(case.length + 31 * case.part)
        size = len(self.subject.encode(f"\n\n{_fact(draw, 0)[0]} 12345.\n\n"))
        count = max(1, min(len(_PLACES), case.length // (2 * size)))
        facts = [_fact(draw, n) for n in range(count)]
        depths = [(n + 0.5) / len(facts) for n in range(len(facts))]
        return self._asked(case, facts, depths, case.part % len(facts))

    def _asked(
        self, case: Case, facts: list[tuple[str, str]], depths: list[float], wanted: int
    ) -> dict[str, Any]:
        subject = self.subject
        question = subject.encode("\n\n" + facts[wanted][0])
        answer = subject.ids(subject.encode(" " + facts[wanted][1]))[0]
        pieces = [subject.encode(f"\n\n{start} {number}.\n\n") for start, number in facts]
        room = case.length - len(question) - len(subject.first) - sum(map(len, pieces))
        if room < 1:
            raise SelectionError(
                "length", case.length, f"{case.length - room + 1} tokens are needed"
            )
        hay = subject.text[:room].tolist()
        for depth, piece in sorted(zip(depths, pieces, strict=True), reverse=True):
            at = round(depth * len(hay))
            hay = hay[:at] + piece + hay[at:]
        context = subject.ids([*subject.first, *hay, *question])
        following = torch.cat([context[0, -1:], answer])
        with case.variant.installed(subject.model):
            logits, cache = self._continued(context[0, :-1], following, case.variant.on_host)
        scores = logits[:-1].log_softmax(-1)
        hits = scores.argmax(-1) == answer
        return {
            "hits": float(hits.double().mean()),
            "found": float(hits.all()),
            "answer_loss": float(-scores.gather(-1, answer[:, None]).mean()),
            "cache_bytes": cache_bytes(cache),
            "host_bytes": host_bytes(cache),
        }

    def _speed(self, case: Case) -> dict[str, Any]:
        """Time to the first token, tokens per second, bytes of the cache, and what is written.

        `same_tokens` counts the tokens up to the first that exact attention would not have written,
        `fetched_bytes` what came from the host for one token.
        """
        context = self._document(case)[0]
        values, tokens = self._generated(case.variant, context)
        if case.variant.name == EXACT:
            self.written = {case.length: tokens}
        elif case.length not in self.written:
            self.written = {case.length: self._generated(Variant(EXACT), context)[1]}
        pairs = zip(tokens, self.written[case.length], strict=True)
        same = [ours == theirs for ours, theirs in pairs]
        values["same_tokens"] = (*same, False).index(False)
        values["new_tokens"] = len(tokens)
        return values

    def _generated(self, variant: Variant, context: Tensor) -> tuple[dict[str, Any], list[int]]:
        """The values of a run, and the tokens written behind the context."""
        model = self.subject.model
        with variant.installed(model):
            start = self._clock()
            out = model(self.subject.ids(context), use_cache=True, logits_to_keep=1)
            first = self._clock() - start
            cache = out.past_key_values
            held, full = cache_bytes(cache), cache_bytes(cache, windows=False)
            moved, fetched = host_bytes(cache), fetched_bytes(cache)
            written = [out.logits[:, -1:].argmax(-1)]
            start = self._clock()
            for _ in range(self.new_tokens - 1):
                out = model(written[-1], past_key_values=cache, use_cache=True)
                written.append(out.logits[:, -1:].argmax(-1))
            spent = self._clock() - start
        own = {}
        if variant.on_host:
            own["fetched_bytes"] = (fetched_bytes(cache) - fetched) / (self.new_tokens - 1)
        return {
            "first_token_seconds": first,
            "tokens_per_second": (self.new_tokens - 1) / spent,
            "cache_bytes": held,
            "full_layer_bytes": full,
            "host_bytes": moved,
            "cache_bytes_behind": cache_bytes(cache),
            **own,
        }, [int(token) for token in written]

    def _document(self, case: Case) -> tuple[Tensor, Tensor]:
        """`length` tokens of the text and the `targets` behind them; `part` moves on."""
        text, needed = self.subject.text, case.length + self.targets
        start = (case.part * needed) % max(len(text) - needed, 1)
        first = torch.tensor(self.subject.first, dtype=torch.int64)
        piece = torch.cat([first, text[start : start + needed - len(first)]])
        piece = piece.to(self.subject.device)
        return piece[: case.length], piece[case.length :]

    def _continued(
        self, context: Tensor, following: Tensor, singly: bool = False
    ) -> tuple[Tensor, Any]:
        """Logits [targets, vocabulary] behind a context that was read first, and the cache.

        singly: token by token, for a cache that fetches less than everything in such steps alone.
        """
        model = self.subject.model
        cache = model(context[None], use_cache=True, logits_to_keep=1).past_key_values
        found = []
        for piece in following.split(1 if singly else len(following)):
            out = model(piece[None], past_key_values=cache, use_cache=True)
            found.append(out.logits[0].float())
        return torch.cat(found), cache

    def _remember(self, case: Case, logits: Tensor) -> None:
        if any(length != case.length for length, _ in self.exact):
            self.exact.clear()
        self.exact[case.length, case.part] = logits

    def _exact(self, case: Case, context: Tensor, following: Tensor) -> Tensor:
        if (case.length, case.part) not in self.exact:
            with Variant(EXACT).installed(self.subject.model):
                self._remember(case, self._continued(context, following)[0])
        return self.exact[case.length, case.part]

    def _clock(self) -> float:
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _fact(draw: random.Random, number: int) -> tuple[str, str]:
    place = _PLACES[number % len(_PLACES)]
    colour = draw.choice(_COLOURS)
    return f"The secret number of the {colour} {place} is", str(draw.randint(10000, 99999))


def cache_bytes(cache: Any, windows: bool = True) -> int:
    """Bytes of keys and values that a cache of transformers holds on the device.

    windows: count the layers that see a window only, too.
    """
    total = 0
    for layer in cache.layers:
        held = getattr(layer, "held", None)
        if held is not None:
            total += held.bytes()
        elif layer.keys is not None and (windows or not layer.is_sliding):
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
    return total


def host_bytes(cache: Any) -> int:
    """Bytes of keys and values that lie on the host."""
    return sum(layer.held.host_bytes() for layer in cache.layers if hasattr(layer, "held"))


def fetched_bytes(cache: Any) -> int:
    """Bytes that ever came to the device out of caches with their old keys on the host."""
    held = [getattr(layer, "held", None) for layer in cache.layers]
    return sum(x.fetched_bytes() for x in held if isinstance(x, Fetched))
