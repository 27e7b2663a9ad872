"""What the full-attention layers of a model see while it reads a text with a planted fact."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal._errors import RefusedError, SelectionError
from foveal.eval.subject import Subject

_NAME = "foveal_tap"
_PLACES = ("harbour", "garden", "library", "station", "bakery", "theatre", "museum", "bridge")
_COLOURS = ("blue", "green", "silver", "golden", "crimson", "violet", "amber", "white")

Tap = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""tap(layer, q, k, v): attention of a full-attention layer, q times sqrt(D) times the layer's scale."""


@dataclass(frozen=True)
class Document:
    """A text of `length` tokens: real text, a fact at `depth` of it, the question, the answer.

    needle: first and last + 1 place of the fact's number; asking: first query that predicts a token of
    the answer; text: first query whose next token is judged, up to the question.
    """

    tokens: Tensor
    part: int
    depth: float
    needle: tuple[int, int]
    asking: int
    text: tuple[int, int]

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Layer:
    """q [1, L, Hq, D], k and v [1, L, Hkv, .] of one layer; attention is softmax(q . k / sqrt(D)) v."""

    number: int
    q: Tensor
    k: Tensor
    v: Tensor

    def repeated(self, copies: int) -> Layer:
        """The same heads, `copies` times beside each other."""
        q, k, v = (x.repeat(1, 1, copies, 1) for x in (self.q, self.k, self.v))
        return Layer(self.number, q, k, v)


@dataclass(frozen=True)
class Reading:
    """A document, and what every full-attention layer saw of it."""

    document: Document
    layers: tuple[Layer, ...]

    def to(self, device: torch.device, dtype: torch.dtype) -> Reading:
        """The tensors on a device, in a dtype."""
        moved = tuple(
            Layer(each.number, *(x.to(device, dtype) for x in (each.q, each.k, each.v)))
            for each in self.layers
        )
        return replace(self, layers=moved)

    def save(self, path: Path) -> None:
        about = self.document
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "tokens": about.tokens, "part": about.part, "depth": about.depth,
            "needle": list(about.needle), "asking": about.asking, "text": list(about.text),
            "layers": [[each.number, each.q, each.k, each.v] for each in self.layers],
        }  # fmt: skip
        torch.save(found, path)

    @classmethod
    def load(cls, path: Path) -> Reading:
        found = torch.load(path, map_location="cpu", weights_only=True)
        document = Document(
            found["tokens"], found["part"], found["depth"], tuple(found["needle"]),
            found["asking"], tuple(found["text"]),
        )  # fmt: skip
        return cls(document, tuple(Layer(*each) for each in found["layers"]))


def document(subject: Subject, length: int, part: int, depth: float, judged: int = 256) -> Document:
    """A document of exactly `length` tokens from part `part` of the subject's text.

    `judged` next tokens of the text before the question count for the agreement.
    """
    draw = random.Random(1000 * length + 100 * part + round(100 * depth))
    colour, place = draw.choice(_COLOURS), draw.choice(_PLACES)
    fact, number = f"The secret number of the {colour} {place} is", draw.randint(10000, 99999)
    before, answer = subject.encode(f"\n\n{fact}"), subject.encode(f" {number}")
    after, question = subject.encode(".\n\n"), subject.encode(f"\n\n{fact}")
    planted = len(before) + len(answer) + len(after)
    room = length - planted - len(question) - len(answer) - len(subject.first)
    if room < 1:
        raise SelectionError("length", length, f"at least {length - room + 1} tokens are needed")
    start = part * length % max(len(subject.text) - room, 1)
    hay = subject.text[start : start + room].tolist()
    if len(hay) < room:
        raise SelectionError("length", length, f"a text of {length} tokens is needed")
    at = round(depth * room)
    front = [*subject.first, *hay[:at]]
    tokens = [*front, *before, *answer, *after, *hay[at:], *question, *answer]
    needle = len(front) + len(before)
    end = length - len(answer) - len(question)
    first = max(end - judged, len(front) + planted if depth < 1 else 0, 0)
    return Document(
        torch.tensor(tokens), part, depth, (needle, needle + len(answer)),
        length - len(answer) - 1, (min(first, end - 1), end - 1),
    )  # fmt: skip


def read(subject: Subject, about: Document) -> Reading:
    """Reads a document with the model's own attention."""
    found: list[Layer] = []

    def tap(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from foveal._attend import attend
        from foveal.patterns import Causal

        found.append(Layer(number, q.clone(), k.clone(), v.clone()))
        return attend(q, k, v, Causal())

    with torch.inference_mode(), tapped(subject.model, tap):
        subject.model(subject.ids(about.tokens), use_cache=False, logits_to_keep=1)
    return Reading(about, tuple(found))


def predict(subject: Subject, about: Document, tap: Tap) -> Tensor:
    """Logits [n, vocabulary] at the judged queries of the text, then at those of the answer."""
    rows = torch.cat([torch.arange(*about.text), torch.arange(about.asking, about.length - 1)])
    with torch.inference_mode(), tapped(subject.model, tap):
        ids = subject.ids(about.tokens)
        out = subject.model(ids, use_cache=False, logits_to_keep=rows.to(ids.device))
    logits: Tensor = out.logits[0].float()
    return logits


@contextlib.contextmanager
def tapped(model: Any, tap: Tap) -> Iterator[None]:
    """The model with `tap` in place of the attention of its full-attention layers; as before behind."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from foveal import hf
    from foveal.hf.masks import visibility
    from foveal.hf.use import chosen_layers

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, visibility)
    modules = chosen_layers(model, "full")
    with hf.using(model):
        model.set_attn_implementation(_NAME)
        for module in modules:
            module._foveal_tap = tap
        try:
            yield
        finally:
            for module in modules:
                module.__dict__.pop("_foveal_tap", None)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer of a tapped model."""
    from foveal.hf.attention import attention

    tap: Tap | None = module.__dict__.get("_foveal_tap")
    if tap is None:
        return attention(module, query, key, value, mask, **options)
    _refuse(mask, options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = options.get("scaling")
    factor = 1.0 if scale is None else scale * q.shape[-1] ** 0.5
    q = q if abs(factor - 1) < 1e-9 else q * factor
    return tap(module.layer_idx, q, k, v).to(query.dtype).contiguous(), None


def _refuse(mask: Tensor | None, options: Mapping[str, Any]) -> None:
    if mask is not None:
        raise RefusedError(_NAME, "one sequence without padding is read at a time")
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise RefusedError(
                _NAME, f"methods that choose keys are given plain scores, not {name}"
            )
