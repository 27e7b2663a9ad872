"""What a process with Triton's interpreter runs: the Triton edition on the CPU, in tiny tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch

import foveal as fv
from foveal.engines.entmax import launch
from foveal.testing import Sizes, qkv
from tests.engines.entmax.agree import Problem, agree


def _lists(source: torch.Generator) -> fv.Pattern:
    mask = torch.rand(1, 2, 3, 3, generator=source) < 0.6
    return fv.Blocks(fv.BlockSelection.from_block_mask(mask, 16, 16))


def _always(pattern: fv.Pattern) -> Callable[[torch.Generator], fv.Pattern]:
    return lambda source: pattern


_SEQUENCE = Sizes((45,), None, 1, 2, 1, 20, 12)
_CUT = torch.tensor([0, 1, 20, 20, 45], dtype=torch.int32)
# Sizes, pattern, alpha, factor on q, documents, and whether single keys may be listed.
CASES: dict[
    str,
    tuple[Sizes, Callable[[torch.Generator], fv.Pattern], float, float, torch.Tensor | None, bool],
] = {
    "causal": (_SEQUENCE, _always(fv.Causal()), 1.5, 3.0, None, True),
    "tiles only": (_SEQUENCE, _always(fv.Causal()), 1.5, 3.0, None, False),
    "sparsemax": (_SEQUENCE, _always(fv.Causal()), 2.0, 3.0, None, True),
    "any power": (_SEQUENCE, _always(fv.Dense()), 1.25, 1.0, None, True),
    "nearly equal scores": (_SEQUENCE, _always(fv.Dense()), 1.5, 0.01, None, True),
    "documents": (_SEQUENCE, _always(fv.Causal()), 1.5, 3.0, _CUT, True),
    "grid": (
        Sizes((6, 7), None, 1, 2, 2, 16), _always(fv.Neighborhood((3, 5))), 1.5, 3.0, None, True,
    ),
    "two intervals": (_SEQUENCE, _always(fv.Sliding(9, 0, sink_tokens=3)), 1.5, 3.0, None, True),
    "dilated": (_SEQUENCE, _always(fv.Neighborhood(5, dilation=3)), 1.5, 3.0, None, True),
    "lists": (Sizes((45,), None, 1, 2, 2, 16), _lists, 1.5, 3.0, None, True),
    "more queries": (Sizes((21,), (9,), 1, 2, 2, 16), _always(fv.Causal()), 1.5, 3.0, None, True),
}  # fmt: skip


def run(name: str, seed: int) -> None:
    sizes, pattern, alpha, factor, cut, singles = CASES[name]
    source = torch.Generator().manual_seed(seed)
    q, k, v = qkv(sizes, source)
    before = launch.LISTED_WHOLE, launch._KEY_ROOM, launch._QUERY_ROOM
    if not singles:
        launch.LISTED_WHOLE, launch._KEY_ROOM, launch._QUERY_ROOM = 0, 5, 5
    try:
        agree(Problem(factor * q, k, v, pattern(source), alpha, cut), "triton")
    finally:
        launch.LISTED_WHOLE, launch._KEY_ROOM, launch._QUERY_ROOM = before


def blind_rows_are_zero(seed: int) -> bool:
    q, k, v = qkv(Sizes((21,), (9,), 1, 2, 2, 16), torch.Generator().manual_seed(seed))
    o = fv.attend(q, k, v, fv.Causal(), fv.Entmax(), implementation="triton")
    return not bool(o[:, :12].any())


def repeated(seed: int) -> bool:
    """Whether two runs give the same bits."""
    q, k, v = qkv(_SEQUENCE, torch.Generator().manual_seed(seed))
    found = [Problem(q, k, v, fv.Causal(), 1.5).run("triton") for _ in range(2)]
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))
