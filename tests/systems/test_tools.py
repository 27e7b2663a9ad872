"""Entries of the catalogue that are tools: what they state holds, and they can be listed and shown."""

from __future__ import annotations

import importlib
import json
import random

import pytest

from foveal.cli import main
from foveal.errors import FovealError
from foveal.search.strategies import RECIPES
from foveal.systems import system, systems, tool, tools

NAMES = [entry.name for entry in tools()]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_tool_states_holds(name: str) -> None:
    seed = random.randrange(1 << 30)
    for check in tool(name).checks:
        assert check.holds(random.Random(seed)), (check.statement, seed)


@pytest.mark.parametrize("name", NAMES)
def test_the_part_behind_a_tool_exists(name: str) -> None:
    module, _, part = tool(name).part.partition(":")
    assert hasattr(importlib.import_module(module), part)
    words = tool(name).command.split()
    if "--strategy" in words:
        assert words[words.index("--strategy") + 1] in {recipe.name for recipe in RECIPES}


def test_names_are_unique_in_the_whole_catalogue() -> None:
    every = [*NAMES, *(entry.name for entry in systems())]
    assert len(every) == len(set(every))
    with pytest.raises(FovealError, match="did you mean kernel_smith"):
        tool("kernelsmith")
    with pytest.raises(FovealError):
        system("kernel_smith")


def test_tools_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--family", "search"]) == 0
    assert "kernel_foundry" in capsys.readouterr().out
    assert main(["list", "--family", "search", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == NAMES
    assert main(["show", "autokernel"]) == 0
    assert "Amdahl" in capsys.readouterr().out
    assert main(["show", "autokernel", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "tool"
