"""How many bytes a plan expects, said where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from foveal._plan import Plan
from foveal._problem import Problem, element_bytes


def expected_bytes(problem: Problem, plan: Plan) -> int:
    """Bytes of inputs and output and of what the implementation holds beside them, forward.

    The reference holds score, weight and mask matrices of every pair; the tiled edition copies of q,
    k, v and o in the precision of the computation.
    """
    moved = element_bytes(problem)
    if plan.implementation == "reference":
        pairs = problem.extent.Lq * problem.extent.Lk
        return moved + problem.batch * problem.q_heads * pairs * 3 * problem.dtype.itemsize + pairs
    if plan.implementation == "cpu":
        return moved + moved // problem.dtype.itemsize * max(problem.dtype.itemsize, 4)
    return moved


@contextmanager
def memory_note(problem: Problem, plan: Plan) -> Iterator[None]:
    """Adds the expected bytes to PyTorch's own error when memory runs out."""
    try:
        yield
    except RuntimeError as error:
        exhausted = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not exhausted:
            raise
        expected = expected_bytes(problem, plan)
        raise type(error)(
            f"{error}\nfoveal: {plan.implementation!r} expected to need {expected:,} bytes"
        ) from error
