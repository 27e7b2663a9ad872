"""What importing foveal costs, and that imports point downward only."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import foveal

ROOT = Path(foveal.__file__).parent


RUN = """
import json, sys, time
start = time.process_time()
import torch
of_torch = time.process_time() - start
before = set(sys.modules)
start = time.process_time()
import foveal
seconds = time.process_time() - start
brought = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
asked = torch.cuda.is_initialized()
found = {"seconds": seconds, "of torch": of_torch, "brought": brought, "asked the device": asked}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs() -> list[dict[str, object]]:
    """What five fresh interpreters report about `import foveal`; seconds of processor time."""
    command = [sys.executable, "-c", RUN]
    done = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(5)]
    return [json.loads(one.stdout) for one in done]


def test_takes_under_a_third_of_a_second_beyond_torch(runs: list[dict[str, object]]) -> None:
    """On a slow machine, under an eighth of what torch takes there; the least of five runs, as a busy
    machine only adds."""
    least = min(float(run["of torch"]) for run in runs)
    assert min(float(run["seconds"]) for run in runs) < max(0.3, least / 8)


def test_brings_torch_and_the_standard_library_only(runs: list[dict[str, object]]) -> None:
    foreign = set(runs[0]["brought"]) - set(sys.stdlib_module_names) - {"foveal", "torch"}
    assert not {name for name in foreign if not name.startswith("_")}


def test_asks_no_device(runs: list[dict[str, object]]) -> None:
    assert not any(run["asked the device"] for run in runs)


def imports_of(path: Path) -> set[str]:
    """foveal modules that a file names in an import, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == "foveal"}


# What a folder (or file) may import of foveal, beside itself and _errors.
ALLOWED = {
    "patterns": {"foveal.patterns"},
    "scores": {"foveal.scores", "foveal.patterns.base"},
    "_problem.py": {"foveal.patterns.base"},
}
CONCRETE = ("foveal.systems", "foveal.layers", "foveal.bench", "foveal.cli", "foveal.testing")


@pytest.mark.parametrize("part", ["patterns", "scores", "_problem.py"])
def test_values_import_only_values(part: str) -> None:
    place = ROOT / part
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    for path in files:
        allowed = ALLOWED[part] | {"foveal._arguments", "foveal._errors", "foveal._kept"}
        if path.name == "hooks.py":  # jit functions, which share others with the engines
            allowed |= {"foveal.engines.common"}
        for name in imports_of(path):
            inside = any(name == a or name.startswith(f"{a}.") for a in allowed)
            assert inside, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "part", ["engines", "_attend.py", "_plan.py", "patterns", "scores", "tuning", "features"]
)
def test_nothing_below_knows_what_is_above(part: str) -> None:
    place = ROOT / part
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    for path in files:
        for name in imports_of(path):
            assert not name.startswith(CONCRETE), f"{path.name} imports {name}"


def test_engines_do_not_import_the_verbs() -> None:
    for path in sorted((ROOT / "engines").rglob("*.py")):
        for name in imports_of(path):
            verbs = ("foveal._attend", "foveal._plan", "foveal._explain")
            assert not name.startswith(verbs), f"{path.name} imports {name}"
