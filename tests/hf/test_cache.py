"""Policies inside a model: what they keep, what they free, and what must not disturb them."""

import gc
from typing import Any

import pytest
import torch

from foveal import errors, hf
from foveal.caches.policies import POLICIES, SnapKV
from tests.hf.models import gemma, llama, tokens

PROMPT, NEW = 96, 8
DROPPING = ("arkv", "kv_compose", "kv_merger", "ltri_llm", "paged_eviction", "s3_attention")
DROPPING += ("scale_kv", "snapkv", "task_kv")


def written(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True} | options
    if "attention_mask" not in options:
        options["attention_mask"] = torch.ones_like(ids)
    return model.generate(ids, **options)


def held_bytes(answer: Any) -> int:
    session = answer.past_key_values._foveal_session
    found: int = session.bytes()
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_budget_that_covers_the_context_changes_nothing(
    model: Any, name: str, padded: bool
) -> None:
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :31] = 0
    expected = written(model, ids, attention_mask=mask).sequences
    with hf.using(model, cache=name, budget=PROMPT + NEW):
        assert torch.equal(written(model, ids, attention_mask=mask).sequences, expected)


@pytest.mark.parametrize("name", DROPPING)
def test_bytes_fall_with_the_budget(model: Any, name: str) -> None:
    ids = tokens(2, PROMPT)
    whole = (
        2 * 2 * 2 * PROMPT * 2 * 8 * 4
    )  # k and v, layers, rows, tokens, heads, head_dim, float32
    for budget in (PROMPT // 2, PROMPT // 4, PROMPT // 8):
        with hf.using(model, cache=name, budget=budget):
            answer = written(model, ids, max_new_tokens=1)
        positions = 4 / (2 * 8 * 4)  # one number per token beside k and v
        assert (
            held_bytes(answer) <= whole * budget / PROMPT * (1 + positions) + 2 * 2 * 2 * 2 * 8 * 4
        )


def live_bytes() -> int:
    """Bytes of memory behind all tensors that Python can reach; those of compilers have none."""
    gc.collect()
    found = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return sum(storages.values())


@pytest.mark.parametrize("name", DROPPING)
def test_memory_is_given_back_not_only_counted(model: Any, name: str) -> None:
    ids = tokens(2, PROMPT)
    before = live_bytes()
    with hf.using(model, cache=name, budget=PROMPT // 8), torch.no_grad():
        cache = model(ids, logits_to_keep=1).past_key_values
        held = cache._foveal_session.bytes()
        taken = live_bytes() - before
    tokens_and_notes = ids.numel() * 8 + 4096
    memory = sum(x.numel() * 8 for y in cache.layers for x in (y.held.memo,) if x is not None)
    host = sum(layer.held.host_bytes() for layer in cache.layers)
    assert held <= taken <= held + host + memory + tokens_and_notes


@pytest.mark.parametrize("name", POLICIES)
def test_pieces_beams_and_padding(model: Any, name: str) -> None:
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :31] = 0
    with hf.using(model, cache=name, budget=24):
        for options in ({"prefill_chunk_size": 40}, {"num_beams": 2}, {}):
            answer = written(model, ids, attention_mask=mask, **options)
            assert answer.sequences.shape == (2, PROMPT + NEW)
            if options.get("num_beams") is None:
                seen = answer.past_key_values.get_seq_length()
                assert seen == PROMPT + NEW - 1


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_is_the_same_alone_and_in_a_batch(model: Any, name: str) -> None:
    ids = tokens(3, PROMPT)
    with hf.using(model, cache=name, budget=24):
        together = written(model, ids).sequences
        alone = written(model, ids[1:2]).sequences
    assert torch.equal(together[1:2], alone)


def test_layers_with_a_window_keep_their_own_cache() -> None:
    model = gemma(kv_heads=2)
    with hf.using(model, cache="snapkv", budget=24):
        answer = written(model, tokens(2, PROMPT))
    kinds = [type(layer).__name__ for layer in answer.past_key_values.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "PolicyLayer", "PolicyLayer"]
    with pytest.raises(errors.RefusedError, match="sliding window"):
        hf.use(model, cache="snapkv", budget=24, layers="all")


def test_an_interrupted_prefill_leaves_the_cache_as_it_was(model: Any) -> None:
    ids = tokens(1, PROMPT)
    with hf.using(model, cache="snapkv", budget=200), torch.no_grad():
        cache = model(ids[:, :40]).past_key_values
        last = model.model.layers[-1].self_attn.o_proj
        hook = last.register_forward_pre_hook(_fails)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 40:], past_key_values=cache)
        hook.remove()
        again = model(ids[:, 40:], past_key_values=cache).logits[:, -1]
        expected = model(ids).logits[:, -1]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def _fails(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_failing_kernel_leaves_the_layer_as_it_was(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveal.hf import cache as module

    ids = tokens(1, PROMPT)
    with hf.using(model, cache="snapkv", budget=200), torch.no_grad():
        cache = model(ids[:, :40]).past_key_values
        with monkeypatch.context() as patch:
            patch.setattr(module, "solve", _raises)
            with pytest.raises(RuntimeError, match="no memory"):
                model(ids[:, 40:], past_key_values=cache)
        assert cache.get_seq_length() == 40
        again = model(ids[:, 40:], past_key_values=cache).logits[:, -1]
        expected = model(ids).logits[:, -1]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def _raises(*_: Any) -> None:
    raise RuntimeError("no memory")


@pytest.mark.parametrize("name", POLICIES)
def test_nan_in_one_sequence_stays_there(model: Any, name: str) -> None:
    """In the prompt and in what is generated behind it, for as long as the policy acts."""
    ids = tokens(2, PROMPT + 4)

    def spoil(module: Any, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        rows = embedded.clone()
        rows[0, embedded.shape[1] // 2] = torch.nan
        return rows

    def steps() -> torch.Tensor:
        answers = [model(ids[:, :PROMPT])]
        for i in range(PROMPT, PROMPT + 4):
            cache = answers[-1].past_key_values
            answers.append(model(ids[:, i : i + 1], past_key_values=cache))
        return torch.cat([x.logits for x in answers], dim=1)

    with hf.using(model, cache=name, budget=24), torch.no_grad():
        expected = steps()[1]
        hook = model.get_input_embeddings().register_forward_hook(spoil)
        found = steps()
        hook.remove()
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)
    assert bool(found[0, -1].isnan().all())


@pytest.mark.parametrize("assistance", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_works_or_says_why_not(model: Any, assistance: str) -> None:
    ids = tokens(1, PROMPT)
    options: dict[str, Any] = {
        assistance: llama() if assistance == "assistant_model" else 3,
        "return_dict_in_generate": False,
    }
    expected = written(model, ids, return_dict_in_generate=False)
    for attention in ("dense", "minference"):
        with hf.using(model, attention):
            assert torch.equal(written(model, ids, **options), expected)
    with hf.using(model, cache="snapkv", budget=PROMPT + NEW):
        assert torch.equal(written(model, ids, **options), expected)
    with (
        hf.using(model, cache="snapkv", budget=24),
        pytest.raises(errors.CacheError, match="a budget that holds the text"),
    ):
        written(model, ids, **options)


def test_misuse_is_an_error_that_says_what_to_do(model: Any) -> None:
    ids = tokens(1, 40)
    with pytest.raises(errors.UnknownNameError, match="did you mean"):
        hf.use(model, cache="snapvk")
    with pytest.raises(errors.RefusedError, match="both ways"):
        hf.use(model, cache="elastic_cache")
    with pytest.raises(errors.SelectionError, match="budget"):
        hf.use(model, cache="snapkv", budget=0)
    with torch.no_grad():
        used = model(ids).past_key_values
        with hf.using(model, cache=SnapKV(budget=24)):
            with pytest.raises(errors.CacheError, match="empty cache"):
                model(ids, past_key_values=used)
            cache = model(ids).past_key_values
            with pytest.raises(errors.CacheError, match="can be dropped"):
                cache.crop(-1)
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(errors.CacheError, match="set_attn_implementation"):
            model(ids[:, :1], past_key_values=cache)


def test_a_static_cache_is_refused_in_a_sentence(model: Any) -> None:
    with (
        hf.using(model, cache="snapkv", budget=24),
        pytest.raises(errors.CacheError, match="a cache that grows"),
    ):
        written(model, tokens(1, 40), cache_implementation="static")


def test_hooks_are_gone_when_undone(model: Any) -> None:
    hf.use(model, cache="snapkv")
    hf.use(model, None)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model)
