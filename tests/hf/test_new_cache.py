"""A cache under a rule of its own, passed to `generate`: it rules that call, and no other."""

import copy
from typing import Any

import pytest
import torch

from foveal import errors, hf
from foveal.caches.policies import SnapKV
from foveal.compose import LouisCache
from tests.hf.models import bart, gemma, llama, modern_bert, tokens

PROMPT, NEW = 80, 6
RULES: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 20},
    "kv_compose": {"budget": 20},
    "fastgen": {"budget": 20},
    "louis_kv": {"pages": 2, "page": 8, "window": 16},
}


def written(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask} | options
    found: torch.Tensor = model.generate(ids, **options)
    return found


@pytest.fixture
def model() -> Any:
    return hf.use(llama(), "dense")


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("name", RULES)
def test_it_rules_its_call_as_use_does_and_no_other(make: Any, name: str) -> None:
    model, ids = make(), tokens(2, PROMPT)
    with hf.using(model, cache=name, **RULES[name]):
        expected = written(model, ids)
    hf.use(model, "dense")
    plain = written(model, ids)
    cache = hf.new_cache(model, name, **RULES[name])
    assert torch.equal(written(model, ids), plain)
    assert torch.equal(written(model, ids, past_key_values=cache), expected)
    assert cache.get_seq_length() == PROMPT + NEW - 1
    assert torch.equal(written(model, ids), plain)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(written(model, ids, past_key_values=cache), expected)


def test_beams_and_pieces(model: Any) -> None:
    ids = tokens(2, PROMPT)
    for options in ({"num_beams": 2}, {"prefill_chunk_size": 32}):
        cache = hf.new_cache(model, "snapkv", budget=20)
        found = written(model, ids, past_key_values=cache, **options)
        with hf.using(model, cache="snapkv", budget=20):
            assert torch.equal(found, written(model, ids, **options))
        hf.use(model, "dense")


def test_several_rules_side_by_side() -> None:
    model, ids = llama(num_hidden_layers=3), tokens(2, PROMPT)
    model.set_attn_implementation(hf.register() or "foveal")
    snap = hf.new_cache(model, SnapKV(budget=16), layers=[0, 2])
    louis = hf.new_cache(model, LouisCache, pages=2, page=8, window=16)
    alone = [written(model, ids, past_key_values=copy.deepcopy(x)) for x in (snap, louis)]
    hf.use(model, cache="paged_eviction", budget=24, layers=[1])
    ruled = written(model, ids)
    for expected, rule in zip(alone, (SnapKV(budget=16), LouisCache), strict=True):
        options: dict[str, Any] = {"layers": [0, 2]}
        if rule is LouisCache:
            options = {"pages": 2, "page": 8, "window": 16}
        cache = hf.new_cache(model, rule, **options)
        assert torch.equal(written(model, ids, past_key_values=cache), expected)
    assert torch.equal(written(model, ids), ruled)


def test_bytes_fall_and_the_text_goes_on(model: Any) -> None:
    ids = tokens(1, PROMPT)
    cache = hf.new_cache(model, "snapkv", budget=PROMPT // 4)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    whole = 2 * 2 * PROMPT * 2 * 8 * 4  # k and v, layers, tokens, heads, head_dim, float32
    assert cache._foveal_session.bytes() < whole / 2
    longer = torch.cat([first, tokens(1, 5, seed=2)], dim=1)
    again = model.generate(longer, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert again.shape[1] == longer.shape[1] + 2
    assert cache.get_seq_length() == again.shape[1] - 1


def test_a_call_that_fails_leaves_the_cache_as_it_was(model: Any) -> None:
    ids = tokens(1, PROMPT)
    cache = hf.new_cache(model, "snapkv", budget=PROMPT)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        hook = model.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(_fails)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 30:], past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == 30
        again = model(ids[:, 30:], past_key_values=cache).logits[:, -1]
        expected = model(ids).logits[:, -1]
    torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-3)


def _fails(*_: Any) -> None:
    raise KeyboardInterrupt


def test_nothing_stays_when_undone(model: Any) -> None:
    ids = tokens(1, PROMPT)
    cache = hf.new_cache(model, "snapkv", budget=16)
    hf.use(model, None)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model)
    assert not [key for m in model.modules() for key in vars(m) if key.startswith("_foveal")]
    with pytest.raises(errors.CacheError, match="a cache made after it"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_misuse_is_an_error_that_says_what_to_do(model: Any) -> None:
    with pytest.raises(errors.RefusedError, match="comes first"):
        hf.new_cache(llama(), "snapkv", budget=16)
    with pytest.raises(errors.CacheError, match="is needed"):
        hf.new_cache(model, None)  # type: ignore[arg-type]
    with pytest.raises(errors.UnknownNameError, match="did you mean"):
        hf.new_cache(model, "snapvk")
    with pytest.raises(errors.UnknownNameError, match="option of snapkv"):
        hf.new_cache(model, "snapkv", pages=3)
    with pytest.raises(errors.UnknownNameError, match="layers"):
        hf.new_cache(model, "snapkv", layers=[7])
    with pytest.raises(errors.RefusedError, match="names none"):
        hf.new_cache(model, "snapkv", layers=[])
    with pytest.raises(errors.RefusedError, match="sliding window"):
        hf.new_cache(hf.use(gemma(), "dense"), "snapkv", layers="all")
    with pytest.raises(errors.RefusedError, match="both ways"):
        hf.new_cache(hf.use(modern_bert(), "dense"), "snapkv", layers=[0])
    with pytest.raises(errors.RefusedError, match="two caches"):
        hf.new_cache(hf.use(bart(), "dense"), "snapkv")
    with pytest.raises(errors.DtypeError, match="a model of transformers"):
        hf.new_cache("snapkv", "snapkv")
