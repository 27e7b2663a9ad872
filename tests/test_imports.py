"""What importing foveal costs, and that imports point downward only."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import foveal

ROOT = Path(foveal.__file__).parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_takes_under_a_third_of_a_second_beyond_torch() -> None:
    code = """
import time, torch
start = time.perf_counter()
import foveal
print(time.perf_counter() - start)
"""
    assert statistics.median(float(run(code)) for _ in range(5)) < 0.3


def test_brings_torch_and_the_standard_library_only() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import foveal
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    brought = set(run(code).split())
    foreign = brought - set(sys.stdlib_module_names) - {"foveal", "torch"}
    assert not {name for name in foreign if not name.startswith("_")}


def test_asks_no_device_and_no_triton() -> None:
    code = """
import sys, torch
import foveal
print(torch.cuda.is_initialized(), any(name.split(".")[0] == "triton" for name in sys.modules))
"""
    assert run(code).split() == ["False", "False"]


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
    "engines": {"foveal.engines", "foveal.patterns.base", "foveal.scores", "foveal._problem"},
}
CONCRETE = ("foveal.systems", "foveal.layers", "foveal.bench", "foveal.cli", "foveal.testing")


@pytest.mark.parametrize("part", ["patterns", "scores", "_problem.py"])
def test_values_import_only_values(part: str) -> None:
    place = ROOT / part
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    allowed = ALLOWED[part] | {"foveal._errors", "foveal"}
    for path in files:
        for name in imports_of(path):
            inside = any(name == a or name.startswith(f"{a}.") for a in allowed - {"foveal"})
            assert inside or name == "foveal", f"{path.name} imports {name}"


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


def test_no_file_is_imported_in_a_circle() -> None:
    """Each module can be the first one imported."""
    modules = ["patterns.combine", "scores.normal", "engines.tile.reference", "testing", "_plan"]
    code = "; ".join(f"import foveal.{module}" for module in modules)
    run(code)
    for module in modules[:3]:
        run(f"import foveal.{module}")
