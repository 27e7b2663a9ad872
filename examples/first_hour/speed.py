"""The shapes of the photograph and of the language model, against PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Callable

import torch

import foveal as fv
from examples.first_hour.image import PATCH
from foveal.bench.baselines import baselines
from foveal.bench.cases import Case, Point
from foveal.bench.measure import Budget
from foveal.bench.record import Record, RecordFile, command_line
from foveal.bench.run import Job

_PIXELS = "Photograph: patches 5x5x3, pixels of 3, window 13x13"
_WINDOWS = "Photograph: patches 5x5x3, pixels of 3, 96x96"
_TEXT = "Gemma-3 270M, sliding layer: window 512"


def _photograph(side: int, window: int, *points: Point) -> Case:
    return Case(
        f"photo {side}x{side}, window {window}",
        fv.Neighborhood((window, window)),
        (side, side),
        q_heads=1,
        kv_heads=1,
        head_dim=3 * PATCH**2,
        value_dim=3,
        backward=False,
        points=points,
    )


def _gemma(tokens: int) -> Case:
    return Case(
        f"Gemma-3, {tokens} tokens",
        fv.Sliding(left=511),
        (tokens,),
        q_heads=4,
        kv_heads=1,
        head_dim=256,
        value_dim=256,
        points=(Point("length", _TEXT, tokens),),
    )


CASES = (
    _photograph(32, 13, Point("length", _PIXELS, 32**2)),
    _photograph(64, 13, Point("length", _PIXELS, 64**2)),
    _photograph(96, 13, Point("length", _PIXELS, 96**2), Point("window", _WINDOWS, 13)),
    _photograph(96, 7, Point("window", _WINDOWS, 7)),
    _photograph(96, 21, Point("window", _WINDOWS, 21)),
    _gemma(1024),
    _gemma(2048),
    _gemma(4096),
)
# Compiling FlexAttention takes half a minute a case on two cores: it meets one case of each kind.
_COMPILED = (CASES[2], CASES[6])


def records(file: RecordFile) -> list[Record]:
    """What was measured, case by case in the order of CASES."""
    order = [case.name for case in CASES]
    return sorted(file.read(), key=lambda record: order.index(record.name))


def run(file: RecordFile, progress: Callable[[str, float], None]) -> None:
    """Measures what the file lacks."""
    plain = tuple(case for case in CASES if case not in _COMPILED)
    halves = ((plain, ("masked", "dense")), (_COMPILED, ("masked", "dense", "flex")))
    for index, (cases, peers) in enumerate(halves):

        def step(text: str, share: float, at: int = index) -> None:
            progress(text, (at + share) / len(halves))

        job = Job(
            cases,
            baselines(peers),
            torch.device("cpu"),
            file,
            Budget(seconds=2, warm_up=0.1),
            command_line(),
        )
        for _ in job.run(step):
            pass
