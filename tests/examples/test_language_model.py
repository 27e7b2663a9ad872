"""The recorder, on a tiny Gemma-3 with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.first_hour import heads
from examples.first_hour.language_model import Layer, documentation, read


@pytest.fixture(scope="module")
def model() -> Any:
    reason = "the language model part needs transformers, extra demo"
    transformers = pytest.importorskip("transformers", reason=reason)
    config = transformers.Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def reading(model: Any) -> tuple[torch.Tensor, list[Layer]]:
    """The last hidden states with foveal's attention, and what every layer attended with."""
    layers: list[Layer] = []
    return read(model, _tokens(), layers.append), layers


def _tokens() -> torch.Tensor:
    return torch.randint(64, (1, 300), generator=torch.Generator().manual_seed(1))


def test_the_model_computes_the_same_with_foveal(model: Any, reading: Any) -> None:
    with torch.no_grad():
        expected = model.model(input_ids=_tokens()).last_hidden_state
    torch.testing.assert_close(reading[0], expected, rtol=1e-4, atol=1e-5)


def test_every_layer_is_recorded_with_its_window(reading: Any) -> None:
    layers = reading[1]
    assert [layer.window for layer in layers] == [24, None, 24]
    assert {tuple(layer.q.shape) for layer in layers} == {(1, 300, 4, 16)}
    assert {tuple(layer.k.shape) for layer in layers} == {(1, 300, 1, 16)}
    assert {layer.scale for layer in layers} == {0.25}


def test_the_model_gets_its_own_attention_back(model: Any, reading: Any) -> None:
    assert model.config._attn_implementation != "foveal"


def test_a_layer_survives_the_disk(reading: Any, tmp_path: Path) -> None:
    layer = reading[1][0]
    layer.save(tmp_path / "layer.pt")
    again = Layer.load(tmp_path / "layer.pt")
    assert torch.equal(again.q, layer.q)
    assert (again.scale, again.window) == (layer.scale, layer.window)


def test_the_study_of_a_layer(reading: Any) -> None:
    found = heads.study(reading[1][1])
    rows = {(row["pattern"], row["budget"]): row for row in found["rows"]}
    assert len(rows) == len(heads.PATTERNS) * len(heads.BUDGETS)
    for (name, budget), row in rows.items():
        assert all(keys <= budget for keys in row["keys"]), name
        assert all(0 < mass <= 1 for mass in row["mass"]), name
    for name in heads.PATTERNS:
        masses = [min(rows[name, budget]["mass"]) for budget in heads.BUDGETS]
        assert masses == sorted(masses), name


def test_the_text_is_long_enough() -> None:
    assert len(documentation()) > 100_000
