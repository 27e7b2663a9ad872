"""One line to change the attention of a model, one to change it back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from foveal._errors import MissingDependencyError, RefusedError, UnknownNameError
from foveal.caches.policies import Policy, policy_class
from foveal.hf.attention import attention
from foveal.hf.install import install
from foveal.hf.masks import visibility
from foveal.hf.prefill import NAME, check_options, operator
from foveal.hf.selected import Selected
from foveal.patterns import Pattern
from foveal.scores import Softmax
from foveal.systems import System, system

Layers = str | Iterable[int]


def register() -> None:
    """Makes `attn_implementation="foveal"` known to transformers; `use` does it by itself."""
    if find_spec("transformers") is None:
        raise MissingDependencyError("transformers", "fv.hf", "hf")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, visibility)


def use(
    model: Any,
    attention: str | Pattern | None = "dense",
    *,
    cache: str | Policy | None = None,
    budget: int | float | None = None,
    layers: Layers = "full",
    **options: Any,
) -> Any:
    """Lets the layers of a transformers model attend with this library; `use(model, None)` undoes it.

    attention: "dense" computes what the model computes, exactly, at the cost of the pairs its layers
    see; the name of a system of the catalogue that chooses pairs (`options` are the system's), or a
    pattern, computes those pairs only.  Pairs that the layer itself hides stay hidden.  A system that finds
    its pairs in a prompt ("minference", "xattention", "pbs_attention", "sale", ...) does so where the prompt
    is read; tokens generated behind it see all of it, and so do those of later pieces where the system
    needs a whole prompt.  With a cache policy beside it, `options` are the policy's.
    cache: a policy, or its name; then the layers it is used on hold at most what it keeps, in every
    `generate` and in every call with a cache that starts empty.  budget: tokens per key head (int) or
    share of the prompt (float), for a policy by name.
    layers: "full", those without a sliding window; "all"; or their numbers.  A policy cannot be used
    on a layer with a sliding window, which keeps its window anyway.
    Returns the model.  Weights are neither read nor changed.
    Limits: raises RefusedError, with the reason, for a model whose attention cannot be exchanged, for
    dropout in attention and for output_attentions.
    """
    undo(model)
    if attention is None:
        return model
    policy = _policy(cache, budget, options)
    chosen = chosen_layers(model, layers)
    causal = all(module.is_causal for module in chosen)
    if policy is not None and (reason := _without_a_cache(model, causal)):
        raise RefusedError(NAME, reason)
    selected = _selected(attention, causal, {} if policy is not None else options)
    if (policy or (selected and selected.operator)) and (sliding := _first_sliding(chosen)):
        what = "a policy" if policy else f"{attention}"
        raise RefusedError(NAME, f"layer {sliding[0]} has a sliding window; {what} needs all keys")
    if not chosen and (policy or selected):
        raise RefusedError(
            NAME, f"layers={layers!r} names none: there is a sliding window in every layer"
        )
    register()
    if not model._can_set_attn_implementation():
        reason = f"{type(model).__name__} does not ask transformers for its attention function"
        raise RefusedError(NAME, reason)
    model._foveal_before = _names(model.config)
    model.set_attn_implementation(NAME)
    if selected is not None:
        for module in chosen:
            module._foveal_selected = selected
    if policy is not None:
        model._foveal_hooks = install(model, policy, chosen)
    return model


@contextlib.contextmanager
def using(model: Any, attention: str | Pattern | None = "dense", **options: Any) -> Iterator[Any]:
    """`use` inside a with statement; the model is as before behind it."""
    try:
        yield use(model, attention, **options)
    finally:
        undo(model)


def undo(model: Any) -> None:
    """Gives the model its own attention back; nothing happens where it has it."""
    before = model.__dict__.pop("_foveal_before", None)
    if before is None:
        return
    for hook in model.__dict__.pop("_foveal_hooks", ()):
        hook.remove()
    for config, name in before:
        config._attn_implementation_internal = name
    for module in model.modules():
        for attribute in ("_foveal_selected", "_foveal_layer"):
            module.__dict__.pop(attribute, None)


def attention_layers(model: Any) -> list[Any]:
    """The modules that attend, in the order of the network."""
    return [m for m in model.modules() if hasattr(m, "is_causal") and not hasattr(m, "post_init")]


def chosen_layers(model: Any, layers: Layers) -> list[Any]:
    """Those of the attention layers that `layers` names."""
    found = attention_layers(model)
    if isinstance(layers, str):
        if layers not in ("full", "all"):
            raise UnknownNameError("layers", layers, ("full", "all"))
        return [m for m in found if layers == "all" or not slides(m)]
    numbers = set(layers)
    if missing := sorted(numbers - set(range(len(found)))):
        raise UnknownNameError("layers", str(missing[0]), tuple(map(str, range(len(found)))))
    return [m for number, m in enumerate(found) if number in numbers]


def slides(module: Any) -> bool:
    """Whether a layer sees the keys of a window only; some say so in their configuration alone."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window is not None
    config = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and index is not None:
        return bool(kinds[index] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None


def _names(config: Any) -> list[tuple[Any, str]]:
    """Every configuration of a model with the name of its attention."""
    found = [(config, config._attn_implementation_internal)]
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            found += _names(inner)
    return found


def _without_a_cache(model: Any, causal: bool) -> str | None:
    """Why there is no one cache of a model that a policy could rule."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder and a decoder keep two caches, and a policy rules one"
    return None if causal else "the model looks both ways and keeps no cache for a policy"


def _first_sliding(modules: list[Any]) -> list[int]:
    """The number of the first of the layers that has a window, if there is one."""
    return [number for number, module in enumerate(modules) if slides(module)][:1]


def _selected(attention: str | Pattern, causal: bool, options: dict[str, Any]) -> Selected | None:
    if isinstance(attention, Pattern):
        if options:
            raise UnknownNameError("option of a pattern", next(iter(options)), ())
        return Selected(pattern=lambda length: attention)
    if attention == "dense":
        return None
    entry = system(attention)
    if entry.compose is None:
        return Selected(operator=operator(entry, causal, options))
    return Selected(pattern=_choice(entry, options))


def _policy(
    cache: str | Policy | None, budget: int | float | None, options: dict[str, Any]
) -> Policy | None:
    if isinstance(cache, Policy):
        if budget is not None or options:
            raise UnknownNameError(
                "option beside a policy", "budget" if budget else next(iter(options)), ()
            )
        return cache
    if cache is None:
        return None
    given = options if budget is None else {**options, "budget": budget}
    return policy_class(cache)(**given)


def _choice(entry: System, options: dict[str, Any]) -> Callable[[int], Pattern]:
    """The pairs of a system on a sequence of some length."""
    check_options(entry, options)

    def pattern(length: int) -> Pattern:
        assert entry.compose is not None
        chosen, score = entry.compose((length,), **options)
        if not isinstance(score, Softmax):
            reason = (
                f"{entry.name} has a score of its own, {score.key}; the model keeps its softmax"
            )
            raise RefusedError(NAME, reason)
        return chosen

    return pattern
