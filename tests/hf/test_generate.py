"""The ways that transformers has to write text, with this library in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveal import hf
from tests.hf.models import gemma, llama, tokens

PROMPT = 96
MODELS = {"llama": llama, "gemma": lambda: gemma(kv_heads=2)}
COVERING: dict[str, dict[str, Any]] = {
    "dense": {},
    "snapkv": {"cache": "snapkv", "budget": 300},
    "kv_compose": {"cache": "kv_compose", "budget": 300},
}
WAYS: dict[str, dict[str, Any]] = {
    "samples": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "samples of beams": {"num_beams": 2, "do_sample": True},
    "pieces": {"prefill_chunk_size": 17},
    "no cache": {"use_cache": False},
}


def written(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(3)
    options = {"max_new_tokens": 6, "do_sample": False} | options
    if "attention_mask" not in options:
        options["attention_mask"] = torch.ones_like(ids)
    return model.generate(ids, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", COVERING)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_exact_writes_the_same(name: str, use: str, way: str) -> None:
    model, ids = MODELS[name](), tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :31] = 0
    expected = written(model, ids, attention_mask=mask, **WAYS[way])
    with hf.using(model, **COVERING[use]):
        assert torch.equal(written(model, ids, attention_mask=mask, **WAYS[way]), expected)


@pytest.mark.parametrize("use", [*COVERING, "snapkv of 24"])
@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_goes_on_from_its_cache(name: str, use: str) -> None:
    model, ids = MODELS[name](), tokens(2, PROMPT)

    def conversation() -> torch.Tensor:
        first = written(model, ids, return_dict_in_generate=True)
        text = torch.cat([first.sequences, tokens(2, 9, seed=5)], dim=1)
        found: torch.Tensor = written(model, text, past_key_values=first.past_key_values)
        return found

    expected = conversation()
    with hf.using(model, **COVERING.get(use, {"cache": "snapkv", "budget": 24, "window": 8})):
        found = conversation()
        assert found.shape == expected.shape
        assert torch.equal(found, expected) or use not in COVERING


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["snapkv", "kv_merger", "mustafar", "ltri_llm"])
def test_rows_of_a_cache_change_places(name: str, policy: str) -> None:
    """Behind a reorder, a repeat and a choice of rows every row goes on as the one it was."""
    model, ids = MODELS[name](), tokens(3, PROMPT)
    step = tokens(3, 1, seed=9)
    with hf.using(model, cache=policy, budget=24), torch.no_grad():
        cache = model(ids).past_key_values
        expected = model(step, past_key_values=cache).logits
        cache = model(ids).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
        found = model(step[[1, 2, 0]], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[[1, 2, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [None, "snapkv"])
def test_training_goes_through(policy: str | None) -> None:
    model, ids = llama(), tokens(2, 40)
    losses = []
    for used in (False, True):
        if used:
            hf.use(model, cache=policy, budget=24) if policy else hf.use(model)
        model.train()
        model.activation_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        losses.append(torch.stack([loss.detach(), *norms]))
        model.zero_grad()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
