"""The public names: sorted, present, and in the words of the naming table."""

import dataclasses
import importlib
import inspect
import re

import pytest

import foveal
from foveal import patterns, scores

MODULES = ["foveal", "foveal.patterns", "foveal.scores", "foveal.testing"]

# Words of other libraries for things that have a name here.
FOREIGN = {
    "kernel_size": "window",
    "window_size": "window",
    "is_causal": "causal",
    "softcap": "soft_cap",
    "logit_cap": "soft_cap",
    "sm_scale": "scale",
    "backend": "implementation",
    "impl": "implementation",
    "query": "q",
    "key": "k",
    "value": "v",
    "seqlen": "L",
    "logsumexp": "lse",
    "hdim": "head_dim",
    "dim_head": "head_dim",
    "naive": "reference",
    "golden": "reference",
    "rate": "dilation",
    "topk_idx": "selection",
    "canvas": "grid",
}


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_sorted_and_present(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__, key=lambda n: (not n.isupper(), n))
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)


def test_nothing_public_is_left_out() -> None:
    own = {
        name
        for name in dir(foveal)
        if not name.startswith("_") and not inspect.ismodule(getattr(foveal, name))
    }
    assert own | {"errors"} == set(foveal.__all__)


def test_patterns_and_scores_are_public_under_one_name() -> None:
    for family in (patterns, scores):
        for name in family.__all__:
            if name not in ("Intersection", "Union"):
                assert getattr(foveal, name) is getattr(family, name)


def public_signatures() -> list[tuple[str, list[str]]]:
    found = []
    for name in foveal.__all__:
        value = getattr(foveal, name)
        if inspect.isfunction(value):
            found.append((name, list(inspect.signature(value).parameters)))
        elif dataclasses.is_dataclass(value):
            found.append((name, [field.name for field in dataclasses.fields(value)]))
    return found


@pytest.mark.parametrize(("name", "parameters"), public_signatures())
def test_parameters_use_the_words_of_the_naming_table(name: str, parameters: list[str]) -> None:
    for parameter in parameters:
        assert parameter not in FOREIGN, f"{name}({parameter}): say {FOREIGN.get(parameter)}"


@pytest.mark.parametrize("name", foveal.__all__)
def test_everything_public_says_what_it_is(name: str) -> None:
    text = inspect.getdoc(getattr(foveal, name))
    assert text
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_errors_are_one_family() -> None:
    classes = [c for _, c in inspect.getmembers(foveal.errors, inspect.isclass)]
    own = [c for c in classes if c.__module__ == "foveal._errors"]
    assert len(own) > 5
    assert all(issubclass(c, foveal.errors.FovealError) for c in own)
    standard = (ValueError, TypeError, ImportError, RuntimeError)
    assert all(issubclass(c, standard) for c in own if not c.__subclasses__())


def test_the_version_is_the_one_of_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", foveal.__version__)
