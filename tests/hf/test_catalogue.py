"""Every name of the catalogue in a model: what stays behind, and what memory it takes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from foveal import errors, hf
from foveal.caches.policies import POLICIES
from foveal.systems import System, systems
from tests.hf.models import gemma, llama, tokens

PROMPT = 64
NAMES = [each.name for each in systems() if isinstance(each, System)]


@pytest.fixture(scope="module")
def model() -> Any:
    return gemma(kv_heads=2)


@pytest.fixture(scope="module")
def before(model: Any) -> dict[str, Any]:
    return state(model)


def state(model: Any) -> dict[str, Any]:
    """What a model computes, what it writes, what it weighs, and what hangs on it."""
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return {
        "logits": logits,
        "weights": [x.clone() for x in model.state_dict().values()],
        "hooks": torch.tensor(hooks),
        "own": sorted(key for m in model.modules() for key in vars(m)),
        "attention": model.config._attn_implementation,
    }


def assert_as_before(model: Any, before: dict[str, Any]) -> None:
    for name, value in state(model).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name
        elif name == "weights":
            assert all(map(torch.equal, value, before[name]))
        else:
            assert value == before[name], name


@pytest.mark.parametrize("name", ["dense", *NAMES])
def test_a_system_leaves_nothing_behind(model: Any, before: dict[str, Any], name: str) -> None:
    """Used where it can be, refused in a sentence where not; then as before, bit for bit."""
    ids = tokens(2, PROMPT)
    with contextlib.suppress(errors.FovealError), hf.using(model, name), torch.no_grad():
        answer = model(ids)
        model(ids[:, :1], past_key_values=answer.past_key_values)
    assert_as_before(model, before)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.125])
def test_a_policy_leaves_nothing_behind(
    model: Any, before: dict[str, Any], name: str, share: float
) -> None:
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with hf.using(model, cache=name, budget=share):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2)
    assert_as_before(model, before)


@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_the_share_that_the_budget_is(name: str) -> None:
    """Rows of `mustafar` hold 8 of 64 elements and a bitmap at least: more than an eighth."""
    length, dim = 256, 64
    wide, ids = llama(head_dim=dim), tokens(2, length)
    whole = 2 * 2 * 2 * 2 * length * dim * 4  # k and v, layers, rows, heads, in float32
    for share in (1 / 2, 1 / 4, 1 / 8):
        for budget in (share, int(length * share)):
            with hf.using(wide, cache=name, budget=budget), torch.no_grad():
                cache = wide(ids, logits_to_keep=1).past_key_values
            found = cache._foveal_session.bytes() / whole
            least = 0.7 if name == "arkv" else 0.97  # what is dropped for 8 bits is not taken up
            most = 8 / dim + 1 / 32 + 2 / length if name == "mustafar" else share
            assert least * share <= found <= 1.03 * max(most, share), (name, budget)
