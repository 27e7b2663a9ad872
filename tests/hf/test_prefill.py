"""Systems that find their pairs in a prompt, in a model, by name."""

from typing import Any

import pytest
import torch

from foveal import errors, hf
from foveal.systems import systems
from tests.hf.models import gemma, llama, tokens, vit

EXACT: dict[str, dict[str, Any]] = {
    "loki": {"share": 1.0},
    "minference": {"slash": 200, "vertical": 4, "tile": 8, "queries": 8},
    "pbs_attention": {"segment": 16, "block": 8, "mass": 1.0},
    "pyramid_sparse": {"levels": ((1, 1.0),), "q_block": 8, "kv_block": 8},
    "retrieval_attention": {"keys": 200, "sinks": 1, "window": 2},
    "sale": {"threshold": 0.0, "q_block": 8, "kv_block": 8},
    "squeezed_attention": {"threshold": 0.0, "count": 4},
    "xattention": {"mass": 1.0, "stride": 4, "block": 8},
}
FEWER: dict[str, dict[str, Any]] = {
    "loki": {"share": 0.2},
    "minference": {"slash": 4, "vertical": 4, "sinks": 1, "local": 2, "tile": 8, "queries": 8},
    "pbs_attention": {"segment": 16, "block": 8, "mass": 0.1},
    "pyramid_sparse": {"levels": ((1, 0.2), (2, 0.5)), "q_block": 8, "kv_block": 8},
    "retrieval_attention": {"keys": 4, "sinks": 1, "window": 2},
    "sale": {"threshold": 0.2, "sink": 4, "local": 8, "q_block": 8, "kv_block": 8},
    "xattention": {"mass": 0.2, "stride": 4, "block": 8},
}


def logits(model: Any, ids: torch.Tensor | None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, **options).logits
    return found


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("make", [llama, gemma])
def test_with_all_pairs_it_is_the_model(name: str, make: Any) -> None:
    model, ids = make(), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    expected = logits(model, ids, attention_mask=mask)
    with hf.using(model, name, **EXACT[name]):
        found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("name", FEWER)
def test_fewer_pairs_in_the_prompt_and_rows_that_stand_alone(name: str) -> None:
    model, ids = llama(), tokens(2, 96)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    with hf.using(model):
        exact = logits(model, ids, attention_mask=mask)
    with hf.using(model, name, **FEWER[name]):
        found = logits(model, ids, attention_mask=mask)
        alone = logits(model, ids[:1, 17:])
        packed = torch.cat([torch.arange(50), torch.arange(46)])[None]
        documents = logits(model, ids[:1], position_ids=packed, use_cache=False)
        second = logits(model, ids[:1, 50:])
    assert not torch.allclose(found[1], exact[1], atol=1e-2)
    torch.testing.assert_close(found[:1, 17:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(documents[:, 50:], second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FEWER)
@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 40}, {"num_beams": 2}])
def test_generates(name: str, more: dict[str, Any]) -> None:
    model, ids = llama(), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask} | more
    with hf.using(model, name, **FEWER[name]):
        assert model.generate(ids, **options).shape == (2, 64)
    with hf.using(model, name, cache="snapkv", budget=20):
        answer = model.generate(ids, **options, return_dict_in_generate=True)
    assert answer.sequences.shape == (2, 64)


def test_a_clustered_prefix_is_thinned_for_what_follows() -> None:
    model, ids = llama(), tokens(1, 96)
    with hf.using(model, "squeezed_attention", threshold=0.02, count=6), torch.no_grad():
        cache = model(ids[:, :80]).past_key_values
        found = model(ids[:, 80:], past_key_values=cache).logits
    assert not torch.allclose(found, logits(model, ids)[:, 80:], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pyramid_sparse", {"levels": ((1, 1.0),), "q_block": 8, "kv_block": 8}),
        ("sparse_vdit", {"frame": 17, "width": 20}),
        ("vggt_block_sparse", {"frame": 17, "special": 1, "mass": 1.0}),
    ],
)
def test_both_ways_in_an_image_model(name: str, options: dict[str, Any]) -> None:
    model, image = vit(), torch.randn(2, 3, 32, 32)
    expected = model(image).last_hidden_state
    with hf.using(model, name, **options):
        found = model(image).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_other_system_says_why_not() -> None:
    model, said = llama(), {}
    for entry in systems():
        if entry.compose is not None or entry.name in EXACT:
            continue
        with pytest.raises(errors.RefusedError) as error:
            hf.use(model, entry.name)
        said[entry.name] = str(error.value)
    assert "trained" in said["nsa"]
    assert 'cache="snapkv"' in said["snapkv"]
    assert "both ways" in said["vggt_block_sparse"]
    assert 'cache="louis_kv"' in said["louis_kv"]
    assert "fv.decode" in said["vattention"]
    with pytest.raises(errors.RefusedError, match="sliding window"):
        hf.use(gemma(), "minference", layers="all")
    with pytest.raises(errors.RefusedError, match="only back"):
        hf.use(vit(), "minference")
    with pytest.raises(errors.UnknownNameError, match="slahs"):
        hf.use(model, "minference", slahs=3)
    hf.use(model, "xattention")
    with pytest.raises(errors.RefusedError, match="another score"):
        logits(model, tokens(1, 8), attention_mask=torch.ones(1, 1, 8, 8).tril().bool())


@pytest.mark.parametrize("name", ["dense", *FEWER])
@pytest.mark.parametrize("padded", [False, True])
def test_nan_in_one_sequence_stays_there(name: str, padded: bool) -> None:
    model, ids = llama(), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, : 7 * padded] = 0
    embedded = model.get_input_embeddings()(ids).detach()
    with hf.using(model, name, **FEWER.get(name, {})):
        expected = logits(model, None, inputs_embeds=embedded, attention_mask=mask)[1]
        embedded[0, 30] = torch.nan
        found = logits(model, None, inputs_embeds=embedded, attention_mask=mask)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)
    assert bool(found[0, 30].isnan().all())
