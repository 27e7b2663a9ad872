"""Puts a policy, or a cache that fetches, into the caches that a model is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foveal._errors import CacheError
from foveal.caches.policies.base import Policy
from foveal.hf.cache import Session, layer_class
from foveal.hf.fetched import Fetching

Rule = Policy | Fetching


def install(
    model: Any, modules: Sequence[Any], rule: Rule | None = None, ruled: Sequence[Any] = ()
) -> list[Any]:
    """What stands around a model and its attention layers; `remove` of each undoes it.

    Caches that come without a session of their own get one, of this rule on these layers, if there is one.
    """
    call = _Call()
    attends = _Attends(call, rule, frozenset(module.layer_idx for module in ruled))
    hooks: list[Any] = [_Forward(model, call)]
    return hooks + [m.register_forward_pre_hook(attends, with_kwargs=True) for m in modules]


def rule_from_the_start(cache: Any, rule: Rule, modules: Sequence[Any]) -> None:
    """Gives an empty cache a session of its own, which holds for every call that it is passed to."""
    session = Session(rule, frozenset(module.layer_idx for module in modules))
    for number in sorted(session.numbers):
        _replace(cache, number, session)
    cache._foveal_session = session


@dataclass
class _Call:
    """What one call of the model is reading, and into which session.

    undo: takes back what the call left in layers without a rule.
    """

    tokens: torch.Tensor | None = None
    session: Session | None = None
    running: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list)

    def begin(self, tokens: Any, cache: Any) -> None:
        """A call of the model on these tokens, into this cache."""
        self.tokens = tokens if isinstance(tokens, torch.Tensor) else None
        self.session, self.running = None, True
        layers = list(getattr(cache, "layers", ()))
        self.undo = [undo for layer in layers if (undo := _undo(layer)) is not None]
        if cache is not None:
            self.undo.append(lambda: _empty(cache, len(layers)))

    def enter(self, session: Session) -> None:
        """The first layer of a call reads into a session."""
        self.session = session
        if self.running:
            session.begin()
        old, new = session.tokens if session.seen() else None, self.tokens
        if new is not None:
            fits = old is not None and len(old) == len(new)
            session.tokens = torch.cat([old, new], dim=1) if fits and old is not None else new

    def end(self, whole: bool) -> None:
        """The call has come to its end, or failed on the way and leaves nothing behind."""
        if self.session is not None:
            self.session.end(whole)
        for undo in () if whole else self.undo:
            undo()
        self.session, self.running, self.tokens, self.undo = None, False, None, []


class _Forward:
    """Stands in the place of the forward of a model; a copy of the model has one of its own."""

    def __init__(self, model: Any, call: _Call) -> None:
        self.model, self.call, self.own = model, call, vars(model).get("forward")
        self.__signature__ = inspect.signature(model.forward)
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.own or type(self.model).forward.__get__(self.model)
        given = self.__signature__.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        self.call.begin(given.get("input_ids"), given.get("past_key_values"))
        whole = False
        try:
            answer = inner(*args, **kwargs)
            whole = True
        finally:
            self.call.end(whole)
        return answer

    def remove(self) -> None:
        """Gives the model its own forward back."""
        del self.model.forward
        if self.own is not None:
            self.model.forward = self.own


@dataclass
class _Attends:
    """Runs before an attention layer: a cache under a rule is ruled from now on."""

    call: _Call
    rule: Rule | None
    ruled: frozenset[int]

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        module.__dict__.pop("_foveal_layer", None)  # of a call that failed before it attended
        if cache is None:
            return
        session: Session | None = getattr(cache, "_foveal_session", None)
        if session is None and self.rule is not None:
            session = cache._foveal_session = Session(self.rule, self.ruled)
        if session is None or getattr(module, "layer_idx", None) not in session.numbers:
            return
        if self.call.session is not session:
            self.call.enter(session)
        if module.layer_idx not in session.layers:
            _replace(cache, module.layer_idx, session)
        module._foveal_layer = cache.layers[module.layer_idx]


def _replace(cache: Any, index: int, session: Session) -> None:
    """Our layer in the place of an empty one."""
    from transformers.cache_utils import StaticLayer

    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    if isinstance(cache.layers[index], StaticLayer):
        raise CacheError(
            "past_key_values",
            "a static cache",
            "a cache that grows is needed: what lies in it is up to the policy, or to the cache named",
        )
    if cache.layers[index].get_seq_length() > 0:
        raise CacheError(
            "past_key_values",
            f"{cache.layers[index].get_seq_length()} tokens that came without the policy",
            "an empty cache is needed to begin with",
        )
    cache.layers[index] = session.layers[index] = layer_class()(session, index)


def _undo(layer: Any) -> Callable[[], None] | None:
    """Takes back what comes into a layer of transformers from now on; None for ours.

    Keys and values that only grow are cut again; everything else is small, or not written in place.
    """
    from transformers.cache_utils import DynamicLayer

    if isinstance(layer, layer_class()):
        return None
    grows = getattr(type(layer), "update", None) is DynamicLayer.update
    seen = int(layer.get_seq_length()) if grows else 0
    cut = ("keys", "values") if seen else ()
    held = {name: _kept(x) for name, x in vars(layer).items() if name not in cut}

    def undo() -> None:
        if seen and (more := int(layer.get_seq_length()) - seen):
            DynamicLayer.crop(layer, -more)
        vars(layer).update(held)

    return undo


def _kept(x: Any) -> Any:
    """What is written in place, counts and the states of linear attention, as it is now."""
    if isinstance(x, torch.Tensor):
        return x if x.dim() else x.clone()
    members = list(x.values()) if isinstance(x, dict) else x
    if not isinstance(members, list):
        return x
    states = [y.clone() if isinstance(y, torch.Tensor) else y for y in members]
    return dict(zip(x, states, strict=True)) if isinstance(x, dict) else states


def _empty(cache: Any, first: int) -> None:
    """Empties the layers of transformers that a cache did not have before."""
    for layer in getattr(cache, "layers", ())[first:]:
        if not isinstance(layer, layer_class()):
            layer.reset()
