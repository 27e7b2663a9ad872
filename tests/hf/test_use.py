"""A model computes the same with this library's attention, and is as before when that is undone."""

from typing import Any

import pytest
import torch

import foveal as fv
from foveal import errors, hf
from tests.hf.models import (
    TEXT_MODELS,
    bart,
    gemma,
    jamba,
    llama,
    mistral,
    modern_bert,
    tokens,
    vit,
)


def left_padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    return mask


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, **options).logits
    return found


def written(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False} | options
    found: torch.Tensor = model.generate(ids, **options)
    return found


@pytest.mark.parametrize("name", TEXT_MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_same_logits_and_bit_identical_when_undone(name: str, padded: bool) -> None:
    model, ids = TEXT_MODELS[name](), tokens()
    mask = left_padding(ids) if padded else torch.ones_like(ids)
    before = logits(model, ids, attention_mask=mask)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert hf.use(model, "dense") is model
    with_foveal = logits(model, ids, attention_mask=mask)
    hf.use(model, None)
    torch.testing.assert_close(with_foveal[mask.bool()], before[mask.bool()], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids, attention_mask=mask), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not [key for m in model.modules() for key in vars(m) if key.startswith("_foveal")]


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_generate_is_token_for_token_the_same(name: str) -> None:
    model, ids = TEXT_MODELS[name](), tokens()
    expected = written(model, ids, attention_mask=left_padding(ids))
    with hf.using(model):
        assert torch.equal(written(model, ids, attention_mask=left_padding(ids)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 13},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    model = gemma()
    ids = tokens(1 if "prompt_lookup_num_tokens" in options else 2)
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, :17] = 0
    expected = written(model, ids, attention_mask=mask, **options)
    with hf.using(model):
        assert torch.equal(written(model, ids, attention_mask=mask, **options), expected)


def test_packed_documents_do_not_see_each_other() -> None:
    model, ids = gemma(), tokens()
    places = torch.cat([torch.arange(20), torch.arange(33), torch.arange(7)])[None].expand(2, -1)
    expected = logits(model, ids, position_ids=places, use_cache=False)
    with hf.using(model):
        found = logits(model, ids, position_ids=places, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_mask_of_the_caller_is_obeyed() -> None:
    model, ids = llama(), tokens()
    mask = torch.ones(60, 60).tril().bool() & (torch.rand(2, 1, 60, 60) < 0.8)
    mask |= torch.eye(60).bool()
    expected = logits(model, ids, attention_mask=mask, use_cache=False)
    with hf.using(model):
        found = logits(model, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_image_model_and_gradients() -> None:
    model, image = vit(), torch.randn(2, 3, 32, 32)
    expected = model(image).last_hidden_state
    with hf.using(model):
        found = model(image).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        found.square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    expected.square().sum().backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_windows_that_look_both_ways() -> None:
    model, ids = modern_bert(), tokens()
    mask = left_padding(ids)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        with hf.using(model):
            found = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_an_encoder_and_a_decoder() -> None:
    model, ids = bart(), tokens()
    expected = written(model, ids, attention_mask=left_padding(ids), num_beams=2)
    with hf.using(model):
        found = written(model, ids, attention_mask=left_padding(ids), num_beams=2)
    assert torch.equal(found, expected)
    with pytest.raises(errors.RefusedError, match="two caches"):
        hf.use(model, cache="snapkv")


@pytest.mark.parametrize("cached", [{}, {"cache": "snapkv", "budget": 90}])
def test_states_beside_attention(cached: dict[str, Any]) -> None:
    model, ids = jamba(), tokens()
    mask = left_padding(ids)
    options: dict[str, Any] = {"attention_mask": mask, "prefill_chunk_size": 13}
    expected = written(model, ids, **options)
    with hf.using(model, **cached):
        assert torch.equal(written(model, ids, **options), expected)


def test_by_the_name_of_the_attention() -> None:
    hf.register()
    model, ids = llama(), tokens()
    expected = logits(model, ids)
    model.set_attn_implementation("foveal")
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_pattern_that_sees_all_changes_nothing_and_a_short_one_does() -> None:
    model, ids = llama(), tokens()
    with hf.using(model):
        exact = logits(model, ids)
    with hf.using(model, fv.Sliding(1000)):
        assert torch.equal(logits(model, ids), exact)
    with hf.using(model, fv.Sliding(3)):
        assert not torch.allclose(logits(model, ids), exact, atol=1e-2)


@pytest.mark.parametrize("name", ["gna", "sliding_window"])
def test_a_step_sees_what_the_whole_sequence_sees(name: str) -> None:
    """Generation with a system equals reading everything again with it at each step."""
    model, ids = llama(), tokens(1, 40)
    options = {"window": 9} if name == "gna" else {}
    with hf.using(model, name, **options):
        found = written(model, ids, max_new_tokens=4)
        for length in range(40, 44):
            again = logits(model, found[:, :length])[:, -1].argmax(-1)
            assert torch.equal(again, found[:, length])


def test_what_cannot_be_said_is_refused_in_a_sentence() -> None:
    model = llama()
    with pytest.raises(errors.UnknownNameError, match="did you mean"):
        hf.use(model, "gnaa")
    with pytest.raises(errors.RefusedError, match="something else than fewer pairs"):
        hf.use(model, "kda")
    with pytest.raises(errors.UnknownNameError, match="windw"):
        hf.use(model, "gna", windw=9)
    with pytest.raises(errors.UnknownNameError, match="layers"):
        hf.use(model, "gna", window=9, layers="some")
    with pytest.raises(errors.RefusedError, match="window in every layer"):
        hf.use(mistral(), cache="snapkv")
    with pytest.raises(errors.RefusedError, match="both ways"):
        hf.use(vit(), cache="snapkv")
    with hf.using(model), pytest.raises(errors.RefusedError, match="output_attentions"):
        model(tokens(), output_attentions=True)
    model.config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with hf.using(model.train()), pytest.raises(errors.RefusedError, match="dropout"):
        model(tokens())
    assert model.config._attn_implementation != "foveal"
