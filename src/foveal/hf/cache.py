"""A policy, or a cache with its old keys on the host, behind the cache interface of transformers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveal._errors import CacheError
from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote
from foveal.caches.policies.held import Held
from foveal.hf.fetched import Fetched, Fetching
from foveal.hf.layer_call import LayerCall, solve
from foveal.hf.selected import Selected
from foveal.patterns import Causal
from foveal.scores import Softmax


@dataclass(eq=False)
class Session:
    """One cache of one model under one rule: what its layers share.

    rule: a policy, or a cache that fetches, by its name and options; numbers: layers under it, by their
    `layer_idx`; before: tokens seen when a call began that has not ended; undo: what the layers in which the
    policy acted since held then.
    """

    rule: Policy | Fetching
    numbers: frozenset[int]
    layers: dict[int, Any] = field(default_factory=dict)
    votes: dict[int, Vote] = field(default_factory=dict)
    tokens: Tensor | None = None
    before: int | None = None
    undo: dict[int, Held] = field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        assert isinstance(self.rule, Policy)
        return self.rule

    @property
    def count(self) -> int:
        return len(self.numbers)

    def empty(self, index: int) -> Any:
        """What a layer holds before its first token."""
        return Fetched(self.rule, index) if isinstance(self.rule, Fetching) else Held()

    def begin(self) -> None:
        """A call of the model begins."""
        self.before = self.seen()

    def end(self, whole: bool) -> None:
        """It has ended; one that failed on the way leaves nothing behind."""
        before, self.before = self.before, None
        undo, self.undo = self.undo, {}
        if whole or before is None:
            return
        self.votes = {}
        for index, layer in self.layers.items():
            layer._unread = False
            if index in undo or before == 0:
                layer.held = undo[index] if before else self.empty(index)
            else:
                layer.held.crop(layer.held.seen - before)
        if self.tokens is not None:
            self.tokens = self.tokens[:, :before]

    def seen(self) -> int:
        """Tokens that every layer has."""
        seen: list[int] = [layer.held.seen for layer in self.layers.values()]
        return min(seen, default=0)

    def number(self, layer: Any) -> int:
        """0 for the first layer under the policy."""
        return sorted(self.layers).index(layer.index)

    def stored(self, layer: Any) -> int:
        """Tokens that a layer holds; where layers are compared, what the fullest one will hold."""
        held: Held = layer.held
        if self.policy.scope == "layer" or len(self.layers) < self.count:
            return held.stored
        behind: list[int] = [x.held.stored + held.seen - x.held.seen for x in self.layers.values()]
        return max(behind)

    def heard(self, layer: Any, reading: Reading) -> None:
        """Takes the vote of one layer; acts when every layer that the policy compares has voted."""
        vote = self.policy.vote(reading)
        if self.policy.scope == "layer":
            self._settle(layer, self.policy.settle([vote], layer.held.seen)[0])
            return
        self.votes[layer.index] = vote
        if len(self.votes) < self.count:
            return
        numbers = sorted(self.votes)
        votes = [self.votes[n] for n in numbers]
        self.votes = {}
        seen = self.layers[numbers[0]].held.seen
        for n, decision in zip(numbers, self.policy.settle(votes, seen), strict=True):
            self._settle(self.layers[n], decision)

    def _settle(self, layer: Any, decision: Decision) -> None:
        held: Held = layer.held
        if self.before and layer.index not in self.undo:
            self.undo[layer.index] = held.earlier(held.seen - self.before)
        held.settle(decision)

    def bytes(self) -> int:
        """Bytes that all layers under the policy hold."""
        return sum(layer.held.bytes() for layer in self.layers.values())


@functools.cache
def layer_class() -> type[Any]:
    """The layer of a transformers cache whose storage a policy or a cache of ours rules."""
    from transformers.cache_utils import CacheLayerMixin

    class PolicyLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
        """Stores what its rule keeps; read by the attention function "foveal" alone."""

        is_sliding = False
        is_croppable = False

        def __init__(self, session: Session, index: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.session, self.index = session, index
            self.held = session.empty(index)
            self._unread = False

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if self._unread:
                raise CacheError(
                    "cache",
                    "another attention function",
                    'set_attn_implementation("foveal") is needed, and a cache made after it',
                )
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self._unread = True
            return key_states, value_states

        def attend(self, call: LayerCall, selected: Selected | None) -> Tensor:
            """Attention of the new tokens of a call to them and to what is held."""
            self._unread = False
            _check_call(self, call)
            if isinstance(self.held, Fetched):
                return self.held.attend(call, selected)
            return attend_held(self, call, selected)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.held.seen + query_length, 0

        def get_seq_length(self) -> int:
            return int(self.held.seen)

        def get_max_length(self) -> int:
            return -1

        def reset(self) -> None:
            self.held, self._unread = self.session.empty(self.index), False

        def crop(self, tokens_to_remove: int) -> None:
            self.held.crop(abs(tokens_to_remove))

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.held.reorder(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            rows = torch.arange(self.held.batch).repeat_interleave(repeats)
            self.held.reorder(rows)

        def batch_select_indices(self, indices: Tensor) -> None:
            self.held.reorder(torch.arange(self.held.batch)[indices.cpu()])

        def offload(self) -> None:
            """What is left stays where its rule put it."""

        def prefetch(self) -> None:
            """As `offload`."""

    return PolicyLayer


def attend_held(layer: Any, call: LayerCall, selected: Selected | None) -> Tensor:
    """Appends the new tokens of a call, attends, and lets the policy act."""
    held: Held = layer.held
    score = call.score
    assert isinstance(score, Softmax)
    new = call.k.shape[1]
    real = None if call.padding is None else call.padding[:, -new:]
    held.append(call.k, call.v, real)
    assert held.tail_k is not None
    assert held.tail_v is not None
    assert held.tail_real is not None
    try:
        if held.pieces:
            plain = Softmax(scale=score.scale, soft_cap=score.soft_cap)
            o = held.attend(call.q, plain, score.sink)
        else:
            padding = None if bool(held.tail_real.all()) else held.tail_real
            whole = LayerCall(call.q, held.tail_k, held.tail_v, call.pattern, score, padding)
            o = solve(whole) if selected is None else selected.solve(whole)
    except BaseException:
        held.crop(new)
        raise
    session: Session = layer.session
    if session.policy.due(Counts(new, session.stored(layer), held.seen)):
        session.heard(layer, _reading(layer, call, score))
    return o


def _check_call(layer: Any, call: LayerCall) -> None:
    """Raises for a call that no cache of ours can keep to."""
    rule = "a policy" if isinstance(layer.held, Held) else layer.held.fetching.name
    if not isinstance(call.score, Softmax) or call.documents is not None:
        raise CacheError(
            "attention_mask", "a rule per pair", f"a cache under {rule} takes padding only"
        )
    if not isinstance(call.pattern, Causal):
        raise CacheError(
            "layers",
            f"number {layer.index}, {call.pattern!r}",
            f"{rule} needs layers that see all",
        )


def _reading(layer: Any, call: LayerCall, score: Softmax) -> Reading:
    session: Session = layer.session
    k, v, real, positions = layer.held.everything()
    scale = call.q.shape[-1] ** -0.5 if score.scale is None else score.scale
    tokens, memo = session.tokens, layer.held.memo
    if memo is not None:
        memo = torch.nn.functional.pad(memo, (0, k.shape[1] - memo.shape[-1]), value=-1)
    return Reading(
        q=call.q,
        k=k,
        v=v,
        real=real,
        positions=positions,
        scale=scale,
        soft_cap=score.soft_cap,
        layer=session.number(layer),
        layers=session.count,
        tokens=tokens if tokens is not None and tokens.shape[1] == layer.held.seen else None,
        memo=memo,
    )
