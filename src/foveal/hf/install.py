"""Puts a policy into the caches that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveal._errors import CacheError
from foveal.caches.policies.base import Policy
from foveal.hf.cache import Session, layer_class


def install(model: Any, policy: Policy, modules: Sequence[Any]) -> list[Any]:
    """Hooks on a model and on the attention layers under the policy; `remove` of each undoes them."""
    call = _Call()

    def begins(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        call.tokens = ids if isinstance(ids, torch.Tensor) else None
        call.session, call.running = None, True
        session = getattr(kwargs.get("past_key_values"), "_foveal_session", None)
        if session is not None and session.before is not None:
            _back(session, session.before)  # an interrupted call left something behind

    def ends(module: Any, args: tuple[Any, ...], answer: Any) -> None:
        if call.session is not None:
            call.session.before = None
        call.running = False

    def attends(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            return
        if not hasattr(cache, "_foveal_session"):
            cache._foveal_session = Session(policy, len(modules))
        session: Session = cache._foveal_session
        if call.session is not session:
            call.enter(session)
        if module.layer_idx not in session.layers:
            _replace(cache, module.layer_idx, session)
        module._foveal_layer = cache.layers[module.layer_idx]

    hooks = [model.register_forward_pre_hook(begins, with_kwargs=True)]
    hooks += [model.register_forward_hook(ends)]
    hooks += [m.register_forward_pre_hook(attends, with_kwargs=True) for m in modules]
    return hooks


@dataclass
class _Call:
    """What one call of the model is reading, and into which session."""

    tokens: torch.Tensor | None = None
    session: Session | None = None
    running: bool = False

    def enter(self, session: Session) -> None:
        """The first layer of a call reads into a session."""
        self.session = session
        session.before = session.seen() if self.running else None
        old, new = session.tokens, self.tokens
        if new is not None:
            fits = old is not None and len(old) == len(new)
            session.tokens = torch.cat([old, new], dim=1) if fits and old is not None else new


def _replace(cache: Any, index: int, session: Session) -> None:
    """Our layer in the place of an empty one."""
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    if cache.layers[index].get_seq_length() > 0:
        raise CacheError(
            "past_key_values",
            f"{cache.layers[index].get_seq_length()} tokens that the policy has not seen",
            "an empty cache is needed to begin with",
        )
    cache.layers[index] = session.layers[index] = layer_class()(session, index)


def _back(session: Session, seen: int) -> None:
    """The session as it was when it had seen `seen` tokens."""
    for layer in session.layers.values():
        layer._unread = False
        layer.held.crop(layer.held.seen - seen)
    session.votes, session.before = {}, None
    if session.tokens is not None:
        session.tokens = session.tokens[:, :seen]
