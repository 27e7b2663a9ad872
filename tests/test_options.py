"""Values of options of layers, and of systems that find their pairs, are judged before anything runs."""

import copy
import inspect
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import foveal as fv
from foveal import layers
from foveal.errors import FovealError, OptionError, UnknownNameError

SIZES = {"dim": 32, "heads": 4, "channels": 32, "head_dim": 8, "kv_heads": 2, "q_heads": 4}
MODULES = sorted(
    name
    for name in layers.__all__
    if isinstance(getattr(layers, name), type) and issubclass(getattr(layers, name), nn.Module)
)


def bad_values(hint: Any, value: Any) -> list[Any]:
    """What no argument of the kind of a value can be; where annotated, and so known, alone."""
    if hint is inspect.Parameter.empty or isinstance(value, bool):
        return []
    if isinstance(value, int) and "int" in str(hint):
        return [-3, 2.5, "a"]
    return [math.nan, "a"] if isinstance(value, float) and "float" in str(hint) else []


@pytest.mark.parametrize("name", MODULES)
def test_layers_name_the_argument(name: str) -> None:
    kind = getattr(layers, name)
    parameters = inspect.signature(kind).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = {p.name: SIZES.get(p.name, 4) for p in named if p.default is p.empty}
    try:
        kind(**given)
    except (FovealError, TypeError):
        pytest.skip("its sizes are no plain numbers")
    for parameter in named:
        value = given.get(parameter.name, parameter.default)
        for bad in bad_values(parameter.annotation, value):
            with pytest.raises(FovealError) as raised:
                kind(**{**given, parameter.name: bad})
            assert isinstance(raised.value, ValueError | TypeError)


def test_what_a_layer_says_itself_goes_first() -> None:
    with pytest.raises(fv.errors.ShapeError):
        layers.CausalAttention(32, 5)
    with pytest.raises(OptionError, match="heads: got 'a'; a whole number of at least 1"):
        layers.CausalAttention(32, "a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing"):
        layers.CausalAttention()  # type: ignore[call-arg]


def test_numbers_of_numpy_are_numbers_and_layers_travel() -> None:
    layer = layers.CausalAttention(int(np.int64(32)), np.int32(4))  # type: ignore[arg-type]
    assert "heads" in inspect.signature(layers.CausalAttention).parameters
    x = torch.randn(1, 5, 32)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("minference", {"vertical": -5}, "vertical: got -5; a whole number of at least 0"),
        ("minference", {"slash": 2.5}, "slash: got 2.5; a whole number"),
        ("xattention", {"mass": 1.5}, "mass: got 1.5; a share from 0 to 1"),
        ("xattention", {"block": 0}, "block: got 0; a whole number of at least 1"),
        ("sale", {"threshold": math.nan}, "threshold: got nan; a number"),
        ("sale", {"bits": "four"}, "bits: got 'four'"),
        ("pbs_attention", {"segment": True}, "segment: got True"),
        ("loki", {"share": "half"}, "share: got 'half'"),
        ("sparse_vdit", {"modes": "diagonal"}, "modes: got 'diagonal'; a tuple of words"),
        ("sla", {"rest": "none"}, "rest: got 'none'; one of"),
        ("retrieval_attention", {"keys": None}, "keys: got None"),
    ],
)
def test_systems_name_the_option(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as raised:
        fv.system(name).check(**options)
    assert said in str(raised.value)


def test_defaults_and_unknown_names() -> None:
    for entry in fv.systems():
        given = {name: x for name, x in entry.defaults.items() if x is not inspect.Parameter.empty}
        entry.check(**given)
    with pytest.raises(UnknownNameError, match="did you mean vertical"):
        fv.system("minference").check(verticla=3)
