"""Calls that fail on the way: the cache is as before, and the call itself can be made again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from foveal import hf
from foveal.caches.policies import POLICIES
from tests.hf.models import gemma, llama, tokens

PROMPT = 96
MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gemma": lambda: gemma(kv_heads=2)}


class Stopped(BaseException):
    """As KeyboardInterrupt, which stops a run of pytest."""


def places(model: Any) -> dict[str, Any]:
    """Modules on the way of a call: in the first layer, in the last one, behind all."""
    first, last = model.model.layers[0].self_attn, model.model.layers[-1]
    return {
        "first query": first.q_proj,
        "first output": first.o_proj,
        "last query": last.self_attn.q_proj,
        "last output": last.self_attn.o_proj,
        "logits": model.lm_head,
    }


@contextmanager
def failing(module: Any, error: type[BaseException]) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise error("on purpose")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def held(cache: Any) -> tuple[int, int, int]:
    """Tokens seen, bytes and tokens noted."""
    session = cache._foveal_session
    noted = 0 if session.tokens is None else session.tokens.shape[1]
    return cache.get_seq_length(), session.bytes(), noted


@pytest.mark.parametrize("place", ["first query", "first output", "last query", "logits"])
@pytest.mark.parametrize("error", [RuntimeError, Stopped])
@pytest.mark.parametrize("budget", [24, 200])
@pytest.mark.parametrize("name", MODELS)
def test_a_piece_of_a_prompt_that_fails(
    name: str, budget: int, error: type[BaseException], place: str
) -> None:
    model, ids = MODELS[name](), tokens(1, PROMPT)
    with hf.using(model, cache="snapkv", budget=budget, window=8), torch.no_grad():
        undisturbed = model(ids[:, :70]).past_key_values
        expected = model(ids[:, 70:], past_key_values=undisturbed).logits
        cache = model(ids[:, :70]).past_key_values
        before = held(cache)
        for _ in range(2):
            with failing(places(model)[place], error), pytest.raises(error):
                model(ids[:, 70:], past_key_values=cache)
            assert held(cache) == before
        assert torch.equal(model(ids[:, 70:], past_key_values=cache).logits, expected)
        assert held(cache) == held(undisturbed)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["first output", "last query", "logits"])
def test_a_first_call_and_a_step_that_fail(policy: str, place: str) -> None:
    """Behind a prompt that the policy cut, and on the way there, with the layers that act together too."""
    from transformers import DynamicCache

    model, ids = gemma(kv_heads=2), tokens(2, PROMPT + 3)
    with hf.using(model, cache=policy, budget=24), torch.no_grad():
        caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for start, stop in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 3)):
            piece = ids[:, start:stop]
            before = held(caches[1]) if start else (0,)
            with failing(places(model)[place], RuntimeError), pytest.raises(RuntimeError):
                model(piece, past_key_values=caches[1])
            now = held(caches[1]) if hasattr(caches[1], "_foveal_session") else (0,)
            assert now[: len(before)] == before
            expected, found = (model(piece, past_key_values=cache).logits for cache in caches)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_generate_goes_on_behind_an_interruption(name: str) -> None:
    """What was generated from a cache that an interrupted call has touched."""
    model, ids = MODELS[name](), tokens(1, PROMPT)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with hf.using(model, cache="kv_compose", budget=40), torch.no_grad():
        first = model(ids[:, :60]).past_key_values
        mask = torch.ones_like(ids)
        expected = model.generate(ids, past_key_values=first, attention_mask=mask, **options)
        cache = model(ids[:, :60]).past_key_values
        with failing(places(model)["last output"], Stopped), pytest.raises(Stopped):
            model.generate(ids, past_key_values=cache, attention_mask=mask, **options)
        found = model.generate(ids, past_key_values=cache, attention_mask=mask, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("step", [False, True])
def test_a_kernel_that_fails(monkeypatch: pytest.MonkeyPatch, step: bool) -> None:
    """The engine itself raises, in the second of the layers: where a prompt is read, and in a step."""
    from foveal import _attend, _decode

    model, ids = llama(), tokens(1, PROMPT + 1)
    with hf.using(model, cache="snapkv", budget=24), torch.no_grad():
        undisturbed, cache = (model(ids[:, :PROMPT]).past_key_values for _ in range(2))
        piece = ids[:, PROMPT:] if step else ids
        if not step:
            undisturbed, cache = (_empty() for _ in range(2))
        calls = iter(range(100))
        module, name = (_decode, "choose_decode") if step else (_attend, "prepare")
        real = getattr(module, name)

        def out_of_memory(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == (2 if step else 1):
                raise torch.OutOfMemoryError("no memory")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, out_of_memory)
            with pytest.raises(torch.OutOfMemoryError, match="no memory"):
                model(piece, past_key_values=cache)
        assert next(calls) > 1
        assert cache.get_seq_length() == (PROMPT if step else 0)
        expected, found = (model(piece, past_key_values=c).logits for c in (undisturbed, cache))
    assert torch.equal(found, expected)


def _empty() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def test_a_copy_of_a_model_has_what_the_model_has() -> None:
    model, ids = llama(), tokens(1, PROMPT)
    with hf.using(model, cache="snapkv", budget=24), torch.no_grad():
        expected = model(ids).past_key_values._foveal_session.bytes()
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        answer = other(ids)
        assert answer.past_key_values._foveal_session.bytes() == expected
        assert not torch.allclose(answer.logits, model(ids).logits)
    hf.use(other, None)
    assert "forward" not in vars(other)
    assert "forward" not in vars(model)
