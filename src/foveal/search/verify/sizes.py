"""Whether the portable tile kernels are right with other sizes, and fit a class of devices."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from foveal.tuning import tile
from foveal.tuning.proposal import Change, problems
from foveal.tuning.tables import FLOAT32

_INTERPRET = "TRITON_INTERPRET"
_HEADS, _KEY_HEADS = 2, 1


@dataclass(frozen=True)
class Checked:
    """One problem: what it is, what is wrong ("" for nothing), and how long it took."""

    pattern: str
    problem: str
    wrong: str
    seconds: float


def check_change(
    change: Change, device: str, report: Callable[[str, float], None]
) -> list[Checked]:
    """Output, lse and every gradient of `attend` with these sizes on small problems of their patterns, in
    another process.

    On the CPU the kernels run in Triton's interpreter, which shows that the sizes fit the problem, not what a
    compiler makes of them.
    """
    jobs = [
        (name, number) for name, found in problems(change).items() for number, _ in enumerate(found)
    ]
    before = os.environ.get(_INTERPRET)
    if device == "cpu":
        os.environ[_INTERPRET] = "1"  # Triton reads it when the other process imports it
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = []
            for done, (name, number) in enumerate(jobs):
                report(f"{name}, in another process", done / len(jobs))
                found.append(pool.submit(_checked, str(change), name, number, device).result())
            return found
    finally:
        os.environ.pop(_INTERPRET, None)
        if before is not None:
            os.environ[_INTERPRET] = before


def check_compiled(change: Change) -> Checked:
    """Compiles the kernel for the device class of a change, which need not be here: causal, 4096 tokens."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_compiled, str(change)).result()


def _compiled(text: str) -> Checked:
    from foveal.search.compiling import CompileError, compiled_facts

    change, start = Change.parse(text), time.perf_counter()
    sizes = change.config
    options = {
        "pattern": "causal",
        "stage": change.stage,
        "queries": sizes.queries,
        "keys": sizes.keys,
        "warps": sizes.warps,
        "stages": sizes.stages,
    }
    # float16 and bfloat16 take the same room, and on a CPU no launch is made with the second.
    dtype = "float32" if change.kind == FLOAT32 else "float16"
    program = {"module": "foveal.search.templates.tile", "options": options}
    shapes = [((1, 4096, 1, change.size), dtype)] * 3
    wrong, found = "", ""
    try:
        facts = compiled_facts(program, shapes, change.architecture)
        found = (
            f"{facts['registers']:.0f} registers, {facts['spills']:.0f} bytes of spills, "
            f"{facts['shared']:.0%} of shared memory, {facts['resident']:.0f} programs at once"
        )
    except CompileError as error:
        wrong = str(error)
    label = f"for {change.architecture}: {found or 'it does not fit'}"
    return Checked("compiled", label, wrong[:600], time.perf_counter() - start)


def _checked(text: str, name: str, number: int, device: str) -> Checked:
    from foveal.testing.agreement import check_attend

    torch.set_num_threads(1)
    change = Change.parse(text)
    problem: dict[str, Any] = dict(problems(change)[name][number])
    grid, pattern = problem.pop("grid"), problem.pop("pattern")
    ends = problem.pop("cu_seqlens", None)
    packed = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)
    half = torch.float16 if device == "cpu" else torch.bfloat16
    dtype = torch.float32 if change.kind == FLOAT32 else half
    q, k, v = (
        torch.randn(1, *grid, heads, change.size, device=device).to(dtype)
        for heads in (_HEADS, _KEY_HEADS, _KEY_HEADS)
    )
    sizes = "x".join(map(str, grid))
    label = f"{pattern.key}{'' if ends is None else ' in 2 documents'}, {sizes} tokens, {dtype}"
    start, wrong = time.perf_counter(), ""
    try:
        with tile.forced(change.stage, change.config):
            check_attend(q, k, v, pattern, cu_seqlens=packed, implementation="triton")
    except AssertionError as error:
        wrong = str(error)
    except Exception as error:  # compilers and drivers raise what they like
        wrong = f"{type(error).__name__}: {error}"
    return Checked(name, label, wrong[:600], time.perf_counter() - start)
