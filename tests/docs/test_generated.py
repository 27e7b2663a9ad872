"""The generated pages are those that scripts/docs.py writes today."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generator", ROOT / "scripts" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_generator"] = module
    spec.loader.exec_module(module)
    return module


def test_pages_on_disk_are_fresh(generator: ModuleType) -> None:
    stale = [path for path, text in generator.pages() if (ROOT / "docs" / path).read_text() != text]
    assert not stale, "python scripts/docs.py writes them again"


def test_pictures_are_small_enough_to_commit() -> None:
    assert all(path.stat().st_size < 30_000 for path in (ROOT / "docs/systems").glob("*.svg"))


def test_docstrings_become_markdown(generator: ModuleType) -> None:
    text = """Sum of a_i * b over [B, *grid].

    Where:

        c = a
            + b

    Options: one of `x*y`, x < 3.  Cost: none.
    """
    import inspect

    assert generator.markdown(inspect.cleandoc(text)).split("\n\n") == [
        r"Sum of a\_i \* b over \[B, \*grid\].",
        "Where:",
        "```text\nc = a\n    + b\n```",
        "**Options**: one of `x*y`, x &lt; 3.",
        "**Cost**: none.",
    ]
