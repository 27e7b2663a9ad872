"""Caches with their old keys on the host inside a model: what is written, fetched and taken back."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal import compose, errors, hf
from tests.hf.models import bart, gemma, llama, mistral, tokens, vit

PROMPT, NEW = 60, 10


def nothing(keys: Tensor, layer: int) -> Tensor:
    """The weight 1 of every key: NOSA is then attention, as far as its blocks reach."""
    return keys.new_zeros(keys.shape[:3])


def learned(keys: Tensor, layer: int) -> Tensor:
    """The same wherever a text begins: rotations keep the length of a key."""
    return torch.sin(0.3 * (layer + 1) * keys.square().sum(-1).sqrt())


ALL: dict[str, dict[str, Any]] = {
    "retrieval_attention": {"keys": 200, "sinks": 2, "window": 3},
    "louis_kv": {"pages": 40, "page": 4, "window": 5},
    "nosa": {"block": 4, "window": 4, "stride": 2, "budget": 40, "by_query": 5, "weights": nothing},
}
SOME: dict[str, dict[str, Any]] = {
    "retrieval_attention": {"keys": 4, "sinks": 2, "window": 3},
    "louis_kv": {"pages": 2, "page": 4, "window": 5, "alike": 0.5},
    "nosa": {"block": 4, "window": 4, "stride": 2, "budget": 6, "by_query": 4, "weights": learned},
}
CLASSES = {
    "retrieval_attention": compose.RetrievalCache,
    "louis_kv": compose.LouisCache,
    "nosa": compose.NosaCache,
}


def padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, :17] = 0
    return mask


def written(model: Any, ids: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": padded(ids)} | options
    return model.generate(ids, return_dict_in_generate=True, **options)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "more",
    [{}, {"prefill_chunk_size": 13}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
@pytest.mark.parametrize("make", [llama, lambda: gemma(kv_heads=2)], ids=["llama", "gemma"])
def test_a_budget_for_everything_writes_what_the_model_writes(
    name: str, more: dict[str, Any], make: Any
) -> None:
    model, ids = make(), tokens(1 if "prompt_lookup_num_tokens" in more else 2, PROMPT)
    expected = written(model, ids, **more).sequences
    with hf.using(model, cache=name, **ALL[name]):
        answer = written(model, ids, **more)
    assert torch.equal(answer.sequences, expected)
    layers = [x for x in answer.past_key_values.layers if hasattr(x, "held")]
    assert len(layers) == 2
    assert all(x.held.host_bytes() > 0 for x in layers)
    assert torch.equal(written(model, ids, **more).sequences, expected)


def step_by_step(model: Any, ids: Tensor, mask: Tensor, start: int) -> Tensor:
    """Logits of the tokens from `start` on, read one by one."""
    cache = model(ids[:, :start], attention_mask=mask[:, :start]).past_key_values
    found = []
    for i in range(start, ids.shape[1]):
        seen = mask[:, : i + 1]
        answer = model(ids[:, i : i + 1], attention_mask=seen, past_key_values=cache)
        found.append(answer.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", ["retrieval_attention"])
def test_steps_are_those_of_the_system(model: Any, name: str) -> None:
    """Which reads the same tokens, with the whole text before it at every step."""
    ids = tokens(2, PROMPT)
    with torch.no_grad():
        with hf.using(model, cache=name, **SOME[name]):
            found = step_by_step(model, ids, padded(ids), 48)
        exact = step_by_step(model, ids, padded(ids), 48)
        cache = model(ids[:, :48], attention_mask=padded(ids)[:, :48]).past_key_values
        expected = []
        with hf.using(model, name, **SOME[name]):
            for i in range(48, PROMPT):
                seen = padded(ids)[:, : i + 1]
                answer = model(ids[:, i : i + 1], attention_mask=seen, past_key_values=cache)
                expected.append(answer.logits)
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, exact, atol=1e-2)


@pytest.mark.parametrize("name", SOME)
def test_a_row_is_the_same_alone_and_in_a_batch_and_padding_does_not_matter(
    model: Any, name: str
) -> None:
    ids = tokens(3, PROMPT)
    with hf.using(model, cache=name, **SOME[name]), torch.no_grad():
        together = step_by_step(model, ids, padded(ids), 50)
        alone = step_by_step(model, ids[1:2], torch.ones_like(ids[1:2]), 50)
        short = step_by_step(model, ids[:1, 17:], torch.ones_like(ids[:1, 17:]), 33)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[:1], short, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_bytes_on_the_device_stay_while_the_text_grows(model: Any, name: str) -> None:
    with hf.using(model, cache=name, **SOME[name]), torch.no_grad():
        caches = [model(tokens(1, length)).past_key_values for length in (400, 1600)]
    sums = [sum(y.held.cache.summary_bytes() for y in x.layers) for x in caches]
    device = [x._foveal_session.bytes() - own for x, own in zip(caches, sums, strict=True)]
    assert sums[1] <= 4.5 * sums[0]
    host = [sum(layer.held.host_bytes() for layer in x.layers) for x in caches]
    assert device[1] <= device[0] * 1.1
    assert host[1] >= 3.5 * host[0]


@pytest.mark.parametrize("name", SOME)
def test_room_on_the_host_grows_and_ends_where_it_is_told(model: Any, name: str) -> None:
    ids = tokens(1, PROMPT)
    with torch.no_grad():
        with hf.using(model, cache=name, **SOME[name]):
            expected = step_by_step(model, ids, padded(ids), 40)
            small = model(ids[:, :40]).past_key_values
            for layer in small.layers:  # as if there had been little room from the beginning
                assert layer.held.room == 1024
                layer.held.room = 40
            found = [
                model(ids[:, i : i + 1], past_key_values=small).logits for i in range(40, PROMPT)
            ]
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)
        with hf.using(model, cache=name, max_tokens=32, **SOME[name]):
            cache = model(ids[:, :20]).past_key_values
            with pytest.raises(errors.OutOfPagesError, match="unchanged"):
                model(ids[:, 20:], past_key_values=cache)
            assert cache.get_seq_length() == 20
            again = model(ids[:, 20:30], past_key_values=cache).logits
            assert torch.equal(
                again, model(ids[:, 20:30], past_key_values=_read(model, ids)).logits
            )


def _read(model: Any, ids: Tensor) -> Any:
    return model(ids[:, :20]).past_key_values


@contextmanager
def failing(module: Any) -> Any:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("piece", [1, 9])
def test_a_call_that_is_interrupted_leaves_nothing_behind(name: str, piece: int) -> None:
    """In the second of two layers, at steps where a page goes to the host and where none does."""
    model, ids = llama(), tokens(2, PROMPT)
    last = model.model.layers[-1].self_attn.o_proj
    with hf.using(model, cache=name, **SOME[name]), torch.no_grad():
        undisturbed, cache = (model(ids[:, :30]).past_key_values for _ in range(2))
        for start in range(30, 30 + 6 * piece, piece)[:3]:
            rows = ids[:, start : start + piece]
            for _ in range(2):
                with failing(last), pytest.raises(KeyboardInterrupt):
                    model(rows, past_key_values=cache)
                assert cache.get_seq_length() == start
            found, expected = (model(rows, past_key_values=x).logits for x in (cache, undisturbed))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            step = ids[:, start : start + 1]
            for x in (cache, undisturbed):  # a step more, so that all of them fetch
                answer = model(step, past_key_values=x)
                x.crop(-1)
                expected = answer.logits if x is cache else expected
            torch.testing.assert_close(answer.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_nan_in_one_sequence_stays_there(model: Any, name: str) -> None:
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)

    def spoil(module: Any, args: Any, embedded: Tensor) -> Tensor:
        rows = embedded.clone()
        rows[0, embedded.shape[1] // 2] = torch.nan
        return rows

    with hf.using(model, cache=name, **SOME[name]), torch.no_grad():
        expected = step_by_step(model, ids, mask, 50)
        hook = model.get_input_embeddings().register_forward_hook(spoil)
        try:
            found = step_by_step(model, ids, mask, 50)
        finally:
            hook.remove()
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert bool(found[0, -1].isnan().all())


def test_beside_a_system_that_thins_the_prompt(model: Any) -> None:
    ids = tokens(2, 96)
    with hf.using(model, "minference", cache="louis_kv", **SOME["louis_kv"]):
        assert written(model, ids).sequences.shape == (2, 96 + NEW)


def test_by_its_class_and_in_a_copy(model: Any) -> None:
    ids = tokens(2, PROMPT)
    for name, kind in CLASSES.items():
        with hf.using(model, cache=name, **SOME[name]):
            expected = written(model, ids).sequences
            other = copy.deepcopy(model)
        assert torch.equal(written(other, ids).sequences, expected)
        with hf.using(model, cache=kind, **SOME[name]):
            assert torch.equal(written(model, ids).sequences, expected)


def test_misuse_is_an_error_that_says_what_to_do(model: Any) -> None:
    with pytest.raises(errors.UnknownNameError, match=r"lous_kv.*did you mean louis_kv"):
        hf.use(model, cache="lous_kv")
    with pytest.raises(errors.UnknownNameError, match=r"option of louis_kv.*pages"):
        hf.use(model, cache="louis_kv", pagse=3)
    with pytest.raises(errors.UnknownNameError, match=r"option of retrieval_attention.*budget"):
        hf.use(model, cache="retrieval_attention", budget=64)
    with pytest.raises(errors.UnknownNameError, match="q_heads"):
        hf.use(model, cache="retrieval_attention", q_heads=4)
    with pytest.raises(errors.CacheError, match="keys: got a; an integer"):
        hf.use(model, cache="retrieval_attention", keys="a")
    with pytest.raises(errors.CacheError, match="max_tokens: got 0"):
        hf.use(model, cache="louis_kv", max_tokens=0)
    with pytest.raises(errors.CacheError, match="weights: got None; a function of keys"):
        hf.use(model, cache="nosa")
    with pytest.raises(errors.CacheError, match="by_query"):
        hf.use(model, cache="nosa", weights=nothing, by_query=65)
    for other, said in (
        (mistral(), "window in every layer"),
        (vit(), "both ways"),
        (bart(), "two"),
    ):
        with pytest.raises(errors.RefusedError, match=said):
            hf.use(other, cache="louis_kv")
    with pytest.raises(errors.RefusedError, match="louis_kv needs all keys"):
        hf.use(gemma(), cache="louis_kv", layers="all")
    assert not [key for m in model.modules() for key in vars(m) if key.startswith("_foveal")]


def test_what_comes_while_it_runs_and_cannot_be(model: Any) -> None:
    ids = tokens(2, 40)
    with torch.no_grad():
        used = model(ids).past_key_values
        with hf.using(model, cache="louis_kv", **SOME["louis_kv"]):
            with pytest.raises(errors.CacheError, match="a cache that grows"):
                written(model, ids, cache_implementation="static")
            with pytest.raises(errors.CacheError, match="empty cache"):
                model(ids, past_key_values=used)
            cache = model(ids).past_key_values
            with pytest.raises(errors.ShapeError, match="2 sequences"):
                model(ids[:1], past_key_values=cache)
            with pytest.raises(errors.RefusedError, match="keeps its 2 sequences"):
                cache.batch_repeat_interleave(2)
            with pytest.raises(errors.CacheError, match="the 40 tokens there are"):
                cache.crop(-41)
        wrong = SOME["nosa"] | {"weights": lambda keys, layer: keys}
        with (
            hf.using(model, cache="nosa", **wrong),
            pytest.raises(errors.ShapeError, match="weights"),
        ):
            model(ids)
