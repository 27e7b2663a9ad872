"""What cannot be used on a model: the error names the argument, what came and what is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import foveal as fv
from foveal import errors, hf
from foveal.caches.policies import SnapKV
from tests.hf.models import llama, tokens

BAD: list[tuple[type[Exception], str, Callable[[Any], object]]] = [
    (errors.DtypeError, "model: got NoneType", lambda model: hf.use(None, "dense")),
    (errors.DtypeError, "model: got NoneType", lambda model: hf.use(None, None)),
    (errors.RefusedError, "Linear is no model", lambda model: hf.use(torch.nn.Linear(2, 2))),
    (errors.PatternError, "window: got -3", lambda model: hf.use(model, "gna", window=-3)),
    (errors.PatternError, "window: got a", lambda model: hf.use(model, "gna", window="a")),
    (errors.OptionError, "slash: got -3", lambda model: hf.use(model, "minference", slash=-3)),
    (errors.OptionError, "mass: got 'a'", lambda model: hf.use(model, "xattention", mass="a")),
    (errors.PatternError, r"attention: got Sphere\(\)", lambda model: hf.use(model, fv.Sphere())),
    (
        errors.PatternError,
        "attention: got Neighborhood",
        lambda model: hf.use(model, fv.Neighborhood((3, 3))),
    ),
    (errors.PatternError, r"attention: got Axial\(1\)", lambda model: hf.use(model, fv.Axial(1))),
    (errors.UnknownNameError, "option of dense", lambda model: hf.use(model, "dense", window=3)),
    (errors.ShapeError, "layers: got 3.5", lambda model: hf.use(model, layers=3.5)),  # type: ignore[arg-type]
    (errors.ShapeError, "layers: got None", lambda model: hf.use(model, layers=None)),  # type: ignore[arg-type]
    (errors.ShapeError, r"layers: got \[0.0\]", lambda model: hf.use(model, layers=[0.0])),  # type: ignore[list-item]
    (errors.CacheError, "budget: got 3", lambda model: hf.use(model, budget=3)),
    (
        errors.SelectionError,
        "budget: got a",
        lambda model: hf.use(model, cache="snapkv", budget="a"),  # type: ignore[arg-type]
    ),
    (
        errors.SelectionError,
        "window: got a",
        lambda model: hf.use(model, cache="snapkv", window="a"),
    ),
    (
        errors.UnknownNameError,
        "option of snapkv: got 'windw'; did you mean window",
        lambda model: hf.use(model, cache="snapkv", windw=3),
    ),
    (errors.CacheError, "cache: got 3", lambda model: hf.use(model, cache=3)),  # type: ignore[arg-type]
    (errors.CacheError, "cache: got <class", lambda model: hf.use(model, cache=SnapKV)),  # type: ignore[arg-type]
    (
        errors.DtypeError,
        "data: got None",
        lambda model: hf.convert(model, "gated_swa", data=None),  # type: ignore[arg-type]
    ),
    (
        errors.DtypeError,
        "data: got torch.float32",
        lambda model: hf.convert(model, "gated_swa", data=torch.zeros(3, 8)),
    ),
    (
        errors.UnknownNameError,
        r"kind: got \[\]",
        lambda model: hf.convert(model, [], data=tokens(2, 8)),  # type: ignore[arg-type]
    ),
    (
        errors.UnknownNameError,
        "option of mla: got 'latent_dm'; did you mean latent_dim",
        lambda model: hf.convert(model, "mla", data=tokens(2, 8), latent_dm=3),
    ),
    (
        errors.DtypeError,
        "schedule: got int",
        lambda model: hf.convert(model, "kda", data=tokens(2, 8), schedule=3),  # type: ignore[arg-type]
    ),
    (
        errors.ShapeError,
        "layers: got 3.5",
        lambda model: hf.convert(model, "kda", data=tokens(2, 8), layers=3.5),  # type: ignore[arg-type]
    ),
    (
        errors.RefusedError,
        "no attention layers",
        lambda model: hf.convert(torch.nn.Linear(2, 2), "kda", data=tokens(2, 8)),
    ),
    (errors.DtypeError, "model: got NoneType", lambda model: hf.restore(None)),
    (
        errors.ShapeError,
        "layer_steps: got a",
        lambda model: hf.Schedule(layer_steps="a"),  # type: ignore[arg-type]
    ),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.mark.parametrize(("error", "said", "call"), BAD, ids=[said for _, said, _ in BAD])
def test_nothing_is_changed_and_the_argument_is_named(
    model: Any, error: type[Exception], said: str, call: Callable[[Any], object]
) -> None:
    with pytest.raises(error, match=said):
        call(model)
    assert model.config._attn_implementation != "foveal"
    assert not [key for m in model.modules() for key in vars(m) if key.startswith("_foveal")]


def test_a_pattern_for_texts_of_one_length_is_taken() -> None:
    """What fits no text of some lengths is for the call to say."""
    model, ids = llama(), tokens(2, 14)
    with torch.no_grad(), hf.using(model, fv.Scales((1, 2, 3))):
        assert model(ids, use_cache=False).logits.shape[1] == 14
        with pytest.raises(errors.PatternError, match="grids"):
            model(ids[:, :-1], use_cache=False)
