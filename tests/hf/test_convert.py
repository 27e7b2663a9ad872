"""Converted layers: exact where they can be, better after training, gone when restored."""

import json
from typing import Any

import pytest
import torch

from foveal import errors, hf
from tests.hf.models import gemma, llama, tokens

SHORT = hf.Schedule(layer_steps=40, logit_steps=4)


@pytest.mark.parametrize("make", [llama, gemma])
def test_a_window_that_covers_the_text_is_the_teacher(make: Any) -> None:
    model, data = make(), tokens(3, 40)
    with torch.no_grad():
        expected = model(data).logits
    hf.convert(model, "gated_swa", data=data, window=64, schedule=hf.Schedule(0, 0))
    with torch.no_grad():
        torch.testing.assert_close(model(data).logits, expected, rtol=1e-3, atol=1e-3)
    hf.restore(model)
    with torch.no_grad():
        assert torch.equal(model(data).logits, expected)


@pytest.mark.parametrize("kind", ["gated_swa", "kda", "lightning", "mla"])
def test_layers_learn_their_teacher(kind: str) -> None:
    model, data = gemma(), tokens(4, 40)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"window": 8} if kind == "gated_swa" else {}
    done = hf.convert(model, kind, data=data, schedule=SHORT, **options)
    assert done.numbers == (1, 2)
    assert len(done.logit_curve) == 4
    for curve in done.layer_curves.values():
        assert len(curve) == 40
        assert sum(curve[-5:]) < sum(curve[:5])
    assert all(value == value for value in (done.teacher, done.untrained, done.layers, done.logits))
    assert done.as_dict()["kind"] == kind
    hf.restore(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_curves_are_in_the_report() -> None:
    from foveal.eval import report

    model, data = llama(), tokens(3, 40)
    done = hf.convert(model, "mla", data=data, schedule=hf.Schedule(3, 2))
    line = {"subject": "tiny", "task": "conversion", "variant": "mla", "seconds": 1.0}
    line |= {"status": "measured", "values": json.loads(json.dumps(done.as_dict()))}
    page = report.build([line], [("device", "cpu")]).render()
    assert "Learning the layers" in page
    assert f"{done.logits:.3f}" in page


@pytest.mark.parametrize("kind", ["kda", "mla"])
def test_generation_with_a_state_reads_everything_once(kind: str) -> None:
    model, data = llama(), tokens(3, 40)
    hf.convert(model, kind, data=data, schedule=hf.Schedule(3, 0))
    written = model.generate(data[:2], max_new_tokens=4, do_sample=False)
    again = data[:2]
    for _ in range(4):
        step = model(again, use_cache=False).logits[:, -1:].argmax(-1)
        again = torch.cat([again, step], dim=1)
    assert torch.equal(written, again)
    assert model.generate(data[:2], max_new_tokens=3, num_beams=2, do_sample=False).shape == (2, 43)


def test_misuse() -> None:
    model, data = llama(), tokens(3, 40)
    with pytest.raises(errors.UnknownNameError, match="gated_swa"):
        hf.convert(model, "gated", data=data)
    with pytest.raises(errors.ShapeError, match="at least 2 rows"):
        hf.convert(model, "kda", data=data[:1])
    hf.convert(model, "kda", data=data, schedule=hf.Schedule(1, 0), layers=[0])
    with pytest.raises(errors.RefusedError, match="restore"):
        hf.convert(model, "kda", data=data)
    mask = torch.ones_like(data)
    mask[0, :3] = 0
    with pytest.raises(errors.RefusedError, match="no padding"):
        model(data, attention_mask=mask)
