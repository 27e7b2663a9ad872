"""One line to change the attention of a model, one to change it back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from torch.nn import Module

from foveal._errors import (
    CacheError,
    DtypeError,
    MissingDependencyError,
    PatternError,
    RefusedError,
    ShapeError,
    UnknownNameError,
)
from foveal.caches.offloaded import Offloaded
from foveal.caches.policies import Policy, policy_class
from foveal.hf.attention import attention
from foveal.hf.fetched import FETCHING, Fetching
from foveal.hf.install import Rule, install, rule_from_the_start
from foveal.hf.masks import visibility
from foveal.hf.prefill import NAME, operator
from foveal.hf.selected import Selected
from foveal.patterns import Extent, Pattern
from foveal.scores import Softmax
from foveal.systems import System, system

Layers = str | Iterable[int]
_SOME = 4096  # tokens, to see whether a pattern can be made at all


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
    cache: str | Policy | type[Offloaded] | None = None,
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
    needs a whole prompt.  With a cache beside it, `options` are the cache's.
    cache: a policy, or its name; then the layers it is used on hold at most what it keeps, in every
    `generate` and in every call with a cache that starts empty.  budget: tokens per key head (int) or
    share of the prompt (float), for a policy by name.  Or a cache that has its old keys on the host and
    fetches some for every token generated: "retrieval_attention", "louis_kv", "nosa", or their classes in
    `foveal.compose`; `options` are those of the class, max_tokens by default as many as come, and for "nosa"
    weights(keys [B, L, Hkv, D], number of the layer) -> log-weights [B, L, 1 or Hkv].
    layers: "full", those without a sliding window; "all"; or their numbers.  A policy cannot be used
    on a layer with a sliding window, which keeps its window anyway.
    Returns the model.  Weights are neither read nor changed.
    Limits: raises RefusedError, with the reason, for a model whose attention cannot be exchanged, for
    dropout in attention and for output_attentions.
    """
    need_model(model)
    undo(model)
    if attention is None:
        return model
    _need_transformers(model)
    rule = _rule(cache, budget, options)
    chosen = chosen_layers(model, layers)
    causal = all(module.is_causal for module in chosen)
    if rule is not None:
        _check_rule(model, rule, chosen)
    selected = _selected(attention, causal, {} if rule is not None else options)
    if selected is not None and selected.operator is not None:
        _need_all_keys(f"{attention}", chosen)
    if rule is not None or selected is not None:
        _need_some(layers, chosen)
    register()
    if not model._can_set_attn_implementation():
        reason = f"{type(model).__name__} does not ask transformers for its attention function"
        raise RefusedError(NAME, reason)
    model._foveal_before = _names(model.config)
    model.set_attn_implementation(NAME)
    if selected is not None:
        for module in chosen:
            module._foveal_selected = selected
    if rule is not None:
        model._foveal_hooks = install(model, attention_layers(model), rule, chosen)
    return model


def new_cache(
    model: Any,
    cache: str | Policy | type[Offloaded],
    *,
    budget: int | float | None = None,
    layers: Layers = "full",
    **options: Any,
) -> Any:
    """An empty cache of transformers under a rule of its own, for `model.generate(..., past_key_values=it)`.

    cache, budget, layers and options: as those of `use(model, cache=...)`, and what is written is the same;
    here they hold for the calls that this cache is passed to, and for no others.  It keeps what it has seen:
    pass it again, with the longer text, to go on; `reset()` empties it.
    Limits: the model attends with this library already, by `use` or by `attn_implementation="foveal"`, else
    RefusedError.  `use` and `use(model, None)` end what was begun: a cache is made behind them.
    """
    need_model(model)
    _need_transformers(model)
    rule = _rule(cache, budget, options)
    if rule is None:
        raise CacheError("cache", None, 'a name, such as "snapkv", a policy or a class is needed')
    chosen = chosen_layers(model, layers)
    _check_rule(model, rule, chosen)
    _need_some(layers, chosen)
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != NAME:
        reason = f'the model attends by "{config._attn_implementation}"'
        raise RefusedError(NAME, f'{reason}; fv.hf.use(model, "dense") comes first')
    from transformers import DynamicCache

    made = DynamicCache(config=config)
    rule_from_the_start(made, rule, chosen)
    if "_foveal_hooks" not in vars(model):
        model._foveal_hooks = install(model, attention_layers(model))
    return made


def need_model(model: object) -> None:
    """Raises DtypeError for what is no module."""
    if not isinstance(model, Module):
        raise DtypeError("model", type(model).__name__, "a model of transformers is needed")


def _need_transformers(model: Any) -> None:
    if not hasattr(model, "_can_set_attn_implementation"):
        raise RefusedError(NAME, f"{type(model).__name__} is no model of transformers")


@contextlib.contextmanager
def using(model: Any, attention: str | Pattern | None = "dense", **options: Any) -> Iterator[Any]:
    """`use` inside a with statement; the model is as before behind it."""
    try:
        yield use(model, attention, **options)
    finally:
        undo(model)


def undo(model: Any) -> None:
    """Gives the model its own attention back; nothing happens where it has it."""
    hooks = model.__dict__.pop("_foveal_hooks", ())
    for hook in hooks:
        hook.remove()
    before = model.__dict__.pop("_foveal_before", ())
    if not hooks and not before:
        return
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
    numbers = _layer_numbers(layers)
    if missing := sorted(numbers - set(range(len(found)))):
        raise UnknownNameError("layers", str(missing[0]), tuple(map(str, range(len(found)))))
    return [m for number, m in enumerate(found) if number in numbers]


def _layer_numbers(layers: object) -> set[int]:
    found = list(layers) if isinstance(layers, Iterable) else [None]
    numbers = [n for n in found if isinstance(n, int) and not isinstance(n, bool)]
    if len(numbers) < len(found):
        raise ShapeError("layers", layers, '"full", "all" or a list of integers is needed')
    return set(numbers)


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


def _check_rule(model: Any, rule: Rule, chosen: list[Any]) -> None:
    """Raises for layers whose cache no rule can be put on."""
    reason = _without_a_cache(model, all(module.is_causal for module in chosen))
    if reason is not None:
        raise RefusedError(NAME, reason)
    _need_all_keys(_called(rule), chosen)


def _need_all_keys(what: str, chosen: list[Any]) -> None:
    sliding = [number for number, module in enumerate(chosen) if slides(module)]
    if sliding:
        raise RefusedError(NAME, f"layer {sliding[0]} has a sliding window; {what} needs all keys")


def _need_some(layers: Layers, chosen: list[Any]) -> None:
    if not chosen:
        raise RefusedError(
            NAME, f"layers={layers!r} names none: there is a sliding window in every layer"
        )


def _selected(attention: str | Pattern, causal: bool, options: dict[str, Any]) -> Selected | None:
    if isinstance(attention, Pattern):
        if options:
            raise UnknownNameError("option of a pattern", next(iter(options)), ())
        _check_axes(attention)
        return Selected(pattern=lambda length: attention)
    if attention == "dense":
        if options:
            raise UnknownNameError("option of dense", next(iter(options)), ())
        return None
    entry = system(attention)
    if entry.compose is None:
        return Selected(operator=operator(entry, causal, options))
    return Selected(pattern=_choice(entry, options))


def _rule(
    cache: str | Policy | type[Offloaded] | None,
    budget: int | float | None,
    options: dict[str, Any],
) -> Rule | None:
    if isinstance(cache, Policy):
        if budget is not None or options:
            raise UnknownNameError(
                "option beside a policy", "budget" if budget else next(iter(options)), ()
            )
        return cache
    if cache is None:
        if budget is not None:
            raise CacheError("budget", budget, "a cache that it is for is needed beside it")
        return None
    given = options if budget is None else {**options, "budget": budget}
    if not isinstance(cache, str) and cache not in FETCHING.values():
        needed = "a name, a policy such as SnapKV(budget=1024) or a class such as LouisCache"
        raise CacheError("cache", cache, f"{needed} is needed")
    if not isinstance(cache, str) or cache in FETCHING:
        return Fetching.named(cache, given)
    kind = policy_class(cache, tuple(FETCHING))
    known = tuple(field.name for field in fields(kind))
    if unknown := sorted(set(given) - set(known)):
        raise UnknownNameError(f"option of {cache}", unknown[0], known)
    return kind(**given)


def _called(rule: Rule) -> str:
    return "a policy" if isinstance(rule, Policy) else rule.name


def _choice(entry: System, options: dict[str, Any]) -> Callable[[int], Pattern]:
    """The pairs of a system on a sequence of some length."""
    entry.check(**options)

    def pattern(length: int) -> Pattern:
        assert entry.compose is not None
        chosen, score = entry.compose((length,), **options)
        if not isinstance(score, Softmax):
            reason = (
                f"{entry.name} has a score of its own, {score.key}; the model keeps its softmax"
            )
            raise RefusedError(NAME, reason)
        return chosen

    _check_axes(pattern(_SOME))  # what is wrong at any length is said at once
    return pattern


def _check_axes(pattern: Pattern) -> None:
    """Raises for a pattern that needs a grid of more than one axis."""
    try:
        pattern.validate(Extent((_SOME,), (_SOME,)))
    except PatternError as error:
        if error.argument == "axis" or pattern.rank not in (None, 1):
            needed = "a pattern on one axis, that of the tokens, is needed"
            raise PatternError("attention", repr(pattern), needed) from error
