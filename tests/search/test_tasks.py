"""Tasks from files: our own format, problems with Model and get_inputs, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from foveal.errors import FovealError
from foveal.search.candidate import Candidate
from foveal.search.isolate.process import Nursery
from foveal.search.library import TEMPLATES, template_task
from foveal.search.task import Task, read_candidate, read_task
from foveal.search.verify.judge import Judge
from foveal.search.verify.race import Rounds

SHORT = Rounds(2, 1)

# Problems in the form of KernelBench: a Model, its inputs, and what it is constructed with.
LAYER_NORM = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm = nn.LayerNorm(shape)

    def forward(self, x):
        return self.norm(x)

batch, features, side = 16, 64, 256

def get_inputs():
    return [torch.rand(batch_size, features_, side_)]

batch_size = 4096
features_ = 512
side_ = 512

def get_init_inputs():
    return [(features_, side_)]
"""

PRODUCT = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def forward(self, A, B):
        return torch.matmul(A, B)

M, K, N = 1, 1, 1
rows = 1024
inner = 4096
columns = 2048

def get_inputs():
    return [torch.rand(rows, inner), torch.rand(inner, columns)]

def get_init_inputs():
    return []
"""

FUSED = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self, in_features, out_features, factor):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.factor = factor

    def forward(self, x):
        return torch.relu(self.linear(x) * self.factor)

batch_size = 1024
in_features = 8192
out_features = 8192
factor = 0.5

def get_inputs():
    return [torch.rand(batch_size, in_features)]

def get_init_inputs():
    return [in_features, out_features, factor]
"""

NEW = """
import torch
import torch.nn as nn

class ModelNew(nn.Module):
    def __init__(self, in_features, out_features, factor):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.factor = factor

    def forward(self, x):
        return (torch.addmm(self.linear.bias, x, self.linear.weight.t()) * self.factor).relu_()
"""

ATTENTION = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def forward(self, Q, K, V):
        return nn.functional.scaled_dot_product_attention(Q, K, V)

batch_size = 32
heads = 32
length = 512
width = 1024

def get_inputs():
    return [torch.rand(batch_size, heads, length, width) for _ in range(3)]

def get_init_inputs():
    return []
"""

SMALL = {
    "layer_norm": (LAYER_NORM, {"batch_size": 3, "features_": 4, "side_": 5}),
    "product": (PRODUCT, {"rows": 5, "inner": 33, "columns": 7}),
    "fused": (FUSED, {"batch_size": 4, "in_features": 17, "out_features": 9}),
    "attention": (ATTENTION, {"batch_size": 1, "heads": 2, "length": 17, "width": 8}),
}


def written(folder: Path, text: str, name: str = "problem.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def read(folder: Path, nursery: Nursery, text: str, **settings: object) -> Task:
    return read_task(written(folder, text), nursery, settings)


@pytest.mark.parametrize("name", SMALL)
def test_a_problem_loads_unchanged_and_runs_at_other_sizes(
    name: str, nursery: Nursery, tmp_path: Path
) -> None:
    text, settings = SMALL[name]
    whole = read(tmp_path, nursery, text)
    assert whole.cases[0].numbers > 1_000_000
    task = read(tmp_path, nursery, text, **settings)
    assert task.cases[0].numbers < 1000
    with Judge(task, nursery) as judge:
        judge.admit()
        verdict = judge.verify(task.program(Candidate()), SHORT)
    assert verdict.ok, verdict.findings[-1]


def test_a_new_model_gets_the_parameters_of_the_problem(nursery: Nursery, tmp_path: Path) -> None:
    text, settings = SMALL["fused"]
    task = read(tmp_path, nursery, text, **settings)
    with Judge(task, nursery) as judge:
        good = read_candidate(task, written(tmp_path, NEW, "new.py"))
        assert judge.verify(good, SHORT).ok
        for wrong in (
            NEW.replace("* self.factor", ""),
            NEW.replace("self.linear.bias, x", "0 * self.linear.bias, x"),
            NEW.replace("self.linear =", "self.other ="),
        ):
            bad = read_candidate(task, written(tmp_path, wrong, "new.py"))
            assert not judge.verify(bad, None).ok


def test_positive_inputs_of_a_problem_do_not_hide_a_shortcut(
    nursery: Nursery, tmp_path: Path
) -> None:
    """With attention on numbers from 0 to 1 the mean of v is near: our inputs tell them apart."""
    text, settings = SMALL["attention"]
    task = read(tmp_path, nursery, text, **settings)
    mean = """
import torch
class ModelNew(torch.nn.Module):
    def forward(self, Q, K, V):
        return V.mean(-2, keepdim=True).expand_as(Q).clone()
"""
    with Judge(task, nursery) as judge:
        verdict = judge.verify(read_candidate(task, written(tmp_path, mean, "new.py")), None)
    assert not verdict.ok
    assert verdict.stage == "smoke"


OWN = """
import torch
SHAPES = [{"x": (4, 9)}]
def reference(x):
    return BODY
"""


@pytest.mark.parametrize(
    "body", ["torch.zeros_like(x)", "x", "x.mean() * torch.ones_like(x)", "x * 0 + 3"]
)
def test_a_task_that_a_do_nothing_kernel_passes_is_refused(
    body: str, nursery: Nursery, tmp_path: Path
) -> None:
    task = read(tmp_path, nursery, OWN.replace("BODY", body))
    with Judge(task, nursery) as judge, pytest.raises(FovealError, match="would pass"):
        judge.admit()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1", "a function reference"),
        ("def reference(x:\n", "does not parse"),
        ("def reference(x):\n    return x", "a list SHAPES"),
        (
            "SHAPES = [{'y': (3,)}]\ndef reference(x):\n    return x",
            "SHAPES must name the inputs x",
        ),
        ("SHAPES = [{'x': (3,), 'role': 'all'}]\ndef reference(x):\n    return x", "role"),
        (
            "SHAPES = [{'x': (3,), 'role': 'hidden'}]\ndef reference(x):\n    return x",
            "no case is timed",
        ),
        ("SHAPES = [{'x': (3,)}]\nTOLERANCE = 0\ndef reference(x):\n    return x", "TOLERANCE"),
        ("SHAPES = [{'x': (3,)}]\nSPACE = {'a': 3}\ndef reference(x):\n    return x", "SPACE"),
        ("import os\nos.fork()\ndef reference(x):\n    return x", "PermissionError"),
    ],
)
def test_files_that_describe_no_task(
    text: str, sentence: str, nursery: Nursery, tmp_path: Path
) -> None:
    with pytest.raises(FovealError, match=sentence):
        read(tmp_path, nursery, text)


def test_a_constant_that_is_not_there_cannot_be_set(nursery: Nursery, tmp_path: Path) -> None:
    with pytest.raises(FovealError, match="it sets no width"):
        read(tmp_path, nursery, PRODUCT, width=3)


def test_integer_inputs_come_from_the_task(nursery: Nursery, tmp_path: Path) -> None:
    text = """
import torch
SHAPES = [{"x": (9, 4), "i": ((6,), "int64")}]
def make_inputs(shapes, source):
    return {
        "x": torch.randn(shapes["x"], generator=source),
        "i": torch.randint(shapes["x"][0], shapes["i"], generator=source),
    }
def reference(x, i):
    return torch.softmax(x[i], -1)
def candidate(x, i):
    return torch.softmax(x, -1)[i]
"""
    task = read(tmp_path, nursery, text)
    with Judge(task, nursery) as judge:
        judge.admit()
        verdict = judge.verify(task.beginning, SHORT)
    assert verdict.ok, verdict.findings[-1]


@pytest.mark.parametrize("name", ["attention/causal", "attention/dense"])
def test_templates_of_the_cpu_pass_at_a_random_point(name: str, nursery: Nursery) -> None:
    task = template_task(name)
    with Judge(task, nursery) as judge:
        judge.admit()
        point = task.space.draw(random.Random())
        program = task.program(Candidate(point))
        verdict = judge.verify(program, None)
        assert verdict.ok, (point, verdict.findings[-1])
        assert judge.confirm(program).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, t in TEMPLATES.items() if t.interpreted])
def test_templates_of_triton_pass_in_the_interpreter(name: str, nursery: Nursery) -> None:
    task = template_task(name)
    with Judge(task, nursery, seconds=100.0) as judge:
        judge.admit()
        points = [task.space.first, *task.space.neighbours(task.space.first)[:1]]
        for point in points:
            verdict = judge.verify(task.program(Candidate(point)), SHORT)
            assert verdict.ok, (point, verdict.findings[-1])


@pytest.mark.slow
def test_a_body_of_a_model_is_judged_and_a_wrong_one_rejected(nursery: Nursery) -> None:
    from foveal.search.templates.rows import START

    task = template_task("rows/softmax")
    with Judge(task, nursery, seconds=100.0) as judge:
        good = START.replace("tl.exp(x - largest)", "tl.exp2((x - largest) * 1.4426950408889634)")
        assert judge.verify(task.program(Candidate({"warps": 4}, good)), None).ok
        wrong = START.replace("x - largest", "x")
        assert not judge.verify(task.program(Candidate({"warps": 4}, wrong)), None).ok
        hostile = "import os\n" + START
        verdict = judge.verify(task.program(Candidate({"warps": 4}, hostile)), None)
        assert verdict.stage == "compile"
        assert not verdict.layers
