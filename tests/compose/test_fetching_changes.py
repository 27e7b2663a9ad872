"""Caches whose old keys lie on the host: tokens taken back, sequences exchanged, more room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.caches import Offloaded
from foveal.compose import LouisCache
from tests.compose.test_fetching_caches import NAMES, Inputs, drawn, made, steps, stored


def read(cache: Any, inputs: Inputs, start: int, stop: int) -> Tensor:
    """What the tokens of a stretch see, one by one."""
    found = []
    for i in range(start, stop):
        stored(cache, inputs, i, i + 1)
        found.append(cache.decode(inputs[0][:, i : i + 1]))
    return torch.cat(found, dim=1)


def spoiled(inputs: Inputs) -> Inputs:
    """Other tokens of the same lengths."""
    q, k, v, c = (x.flip(1) * 1.5 for x in inputs)
    return q, k, v, c


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [1, 4, 17])
def test_tokens_that_were_taken_back_leave_nothing(
    name: str, wrong: int, source: torch.Generator
) -> None:
    """A stretch of other tokens is stored, in one piece, and cropped again, over and over."""
    inputs = drawn(source, 60)
    other = spoiled(inputs)
    expected = steps(made(name, 12), inputs, 30)
    cache: Any = made(name, 12)
    stored(cache, inputs, 0, 30)
    found = []
    for i in range(30, 60):
        stored(cache, other, i, min(i + wrong, 60))
        cache.crop(i)
        assert cache.host_seen == [i, i]
        found.append(read(cache, inputs, i, i + 1))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-12)


def test_a_step_of_louis_that_is_taken_back(source: torch.Generator) -> None:
    """With what it made of the query: the next border is where it would have been."""
    inputs = drawn(source, 60)
    other = spoiled(inputs)
    expected = steps(made("louis_kv", 12), inputs, 30)
    cache: Any = made("louis_kv", 12)
    stored(cache, inputs, 0, 30)
    found = []
    for i in range(30, 60):
        noted = cache.noted()
        read(cache, other, i, i + 1)
        cache.recall(noted)
        cache.crop(i)
        found.append(read(cache, inputs, i, i + 1))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_each_sequence_is_cut_by_itself(name: str, source: torch.Generator) -> None:
    inputs = drawn(source, 50)
    cache: Any = made(name, 12)
    stored(cache, inputs, 0, 45)
    cache.crop([7, 60])
    assert cache.host_seen == [7, 45]
    fresh: Any = made(name, 12)
    stored(fresh, inputs, 0, 45, counts=(7, 45))
    assert cache.host_pages == fresh.host_pages
    for a, b in zip(cache.dense(), fresh.dense(), strict=True):
        assert torch.equal(a, b)
    expected, found = (read(x, inputs, 45, 50) for x in (fresh, cache))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    cache.crop(0)
    assert cache.host_seen == [0, 0]
    assert cache.host_bytes() == 0


@pytest.mark.parametrize("name", NAMES)
def test_sequences_that_change_places(name: str, source: torch.Generator) -> None:
    inputs = drawn(source, 50)
    cache: Any = made(name, 12)
    stored(cache, inputs, 0, 30)
    read(cache, inputs, 30, 40)
    cache.reorder(torch.tensor([1, 0]))
    swapped = tuple(x.flip(0) for x in inputs)
    expected = steps(made(name, 12), inputs, 30)[:, 10:]
    found = read(cache, swapped, 40, 50)  # type: ignore[arg-type]
    torch.testing.assert_close(found.flip(0), expected, rtol=0, atol=1e-12)
    cache.reorder([0, 0])
    for x in cache.dense():
        assert torch.equal(x[0], x[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [12, 48])
def test_room_that_grows(name: str, tokens: int, source: torch.Generator) -> None:
    inputs = drawn(source, 60)
    expected = steps(made(name, tokens), inputs, 20)
    cache: Any = made(name, tokens, most=24)
    stored(cache, inputs, 0, 20)
    found = [read(cache, inputs, 20, 26)]
    cache.grow(80)
    cache.grow(10)  # there is room already
    found.append(read(cache, inputs, 26, 60))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-12)


def test_selected_pages_stay_where_only_new_tokens_go(source: torch.Generator) -> None:
    cache: Offloaded = made("louis_kv", 12)
    assert isinstance(cache, LouisCache)
    inputs = drawn(source, 33)
    stored(cache, inputs, 0, 33)
    cache.select(torch.tensor([0, 2]).expand(2, 1, -1))
    before = cache.fetched_bytes
    cache.crop(32)
    cache.select(torch.tensor([0, 2]).expand(2, 1, -1))
    assert cache.fetched_bytes == before
