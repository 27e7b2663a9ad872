"""Changes of the shipped tables: how they are written, what records they need, and whether they are right.

A change is written as DEVICE CLASS/STAGE/SIZE/TYPE[/PATTERN]=SIZES, such as
"sm_90/backward_kv/64/half/causal=128x64 warps 4 stages 2"; without a pattern it holds for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal._errors import TaskError
from foveal.tuning import tile
from foveal.tuning.config import Config
from foveal.tuning.tables import (
    BACKWARD_KV,
    BACKWARD_Q,
    CAUSAL,
    DENSE,
    FLOAT32,
    FORWARD,
    HALF,
    PATTERNS,
    WINDOW,
    architectures,
)

GAIN = 0.05
"""Share of time that a change saves on the held-out problems of its patterns, at the median."""

LOSS = 0.01
"""Share of time that it may cost on any problem of its patterns."""

_CONTROL = 0.02
_FEWEST = 2
_EVERY = (DENSE, CAUSAL, WINDOW)


@dataclass(frozen=True)
class Change:
    """Sizes for one kernel on one class of devices; pattern None: for all patterns."""

    architecture: str
    stage: str
    size: int
    kind: str
    pattern: str | None
    config: Config

    def __str__(self) -> str:
        parts = self.architecture, self.stage, str(self.size), self.kind, self.pattern
        return "/".join(part for part in parts if part) + f"={self.config}"

    @staticmethod
    def parse(text: str) -> Change:
        """The inverse of `str`.  Raises TaskError."""
        name, _, sizes = text.partition("=")
        parts = name.split("/")
        pattern = parts[4] if len(parts) == 5 else None
        try:
            architecture, stage, size, kind = parts[:4]
            config = Config.parse(sizes)
            known = (
                len(parts) <= 5
                and architecture in architectures()
                and stage in (FORWARD, BACKWARD_Q, BACKWARD_KV)
                and int(size) in tile.SIZES
                and kind in (HALF, FLOAT32)
                and pattern in (None, *PATTERNS)
            )
        except ValueError:
            known = False
        if not known:
            raise TaskError(
                f"change: got {text!r}; DEVICE CLASS/STAGE/SIZE/TYPE[/PATTERN]=SIZES is needed, such as "
                f"'sm_90/backward_kv/64/half/causal=128x64 warps 4 stages 2', with a device class of "
                f"{', '.join(architectures())}, a stage of {FORWARD}, {BACKWARD_Q}, {BACKWARD_KV}, a size of "
                f"{', '.join(map(str, tile.SIZES))}, a type of {HALF}, {FLOAT32}, and a pattern of "
                f"{', '.join(PATTERNS)}"
            )
        return Change(architecture, stage, int(size), kind, pattern, config)

    @property
    def entry(self) -> str:
        """As a line of `tables.EXCEPTIONS`, or the row of `tables` that it replaces."""
        numbers = (
            f"{self.config.queries}, {self.config.keys}, {self.config.warps}, {self.config.stages}"
        )
        if self.pattern is None:
            return f"({self.size}, Config({numbers})),"
        key = f'"{self.architecture}", "{self.kind}", "{self.stage}", {self.size}, "{self.pattern}"'
        return f"({key}): Config({numbers}),"


@dataclass(frozen=True)
class Timing:
    """One problem: what the change saves of the time, and what the shipped sizes save against themselves."""

    problem: str
    pattern: str
    held_out: bool
    gain: float
    control: float
    correct: bool


@dataclass(frozen=True)
class Proposal:
    """A change with what was timed for it; `reason` says why it is not to be made, "" that it is."""

    change: Change
    timings: tuple[Timing, ...]
    reason: str

    def __str__(self) -> str:
        lines = [f"{self.change}: {self.reason or 'to be made'}"]
        for each in self.timings:
            place = "held out" if each.held_out else "searched"
            lines.append(
                f"  {each.problem}, {place}: {each.gain:+.1%} (control {each.control:+.1%})"
            )
        if not self.reason:
            place = "tables.EXCEPTIONS" if self.change.pattern else "the row of tables"
            lines += [f"  {place}: {self.change.entry}", f'  foveal verify "{self.change}"']
        return "\n".join(lines)


def propose(timings: Mapping[Change, Sequence[Timing]]) -> list[Proposal]:
    """What follows from timings of sizes, given for all patterns: changes of classes, or of all.

    A class of patterns is changed when its held-out problems, two at least, gain 5 % at the median and no
    problem of it loses 1 %.  Where dense, causal and window all are, the change is one for all patterns.
    """
    found = []
    for change, every in timings.items():
        own = [
            _judged(_of(change, pattern), [t for t in every if t.pattern == pattern])
            for pattern in PATTERNS
            if any(t.pattern == pattern for t in every)
        ]
        good = {each.change.pattern for each in own if not each.reason}
        if good >= set(_EVERY) and all(not each.reason for each in own):
            own = [_judged(_of(change, None), list(every))]
        found += own
    return found


def _of(change: Change, pattern: str | None) -> Change:
    return Change(
        change.architecture, change.stage, change.size, change.kind, pattern, change.config
    )


def _judged(change: Change, timings: Sequence[Timing]) -> Proposal:
    held_out = [t.gain for t in timings if t.held_out]
    wrong = [t for t in timings if not t.correct]
    moved = [t for t in timings if abs(t.control) > _CONTROL]
    worst = min(timings, key=lambda t: t.gain)
    reason = ""
    if wrong:
        reason = f"no: its results on {wrong[0].problem} are out of bounds"
    elif worst.gain < -LOSS:
        reason = f"no: {worst.problem} takes {-worst.gain:.1%} more time"
    elif len(held_out) < _FEWEST:
        reason = f"open: {len(held_out)} held-out problems were timed; {_FEWEST} are needed"
    elif statistics.median(held_out) < GAIN:
        reason = (
            f"no: it saves {statistics.median(held_out):.1%} of the time; {GAIN:.0%} are needed"
        )
    elif moved:
        reason = f"open: the control on {moved[0].problem} read {moved[0].control:+.1%}; time again"
    return Proposal(change, tuple(timings), reason)


def problems(change: Change) -> dict[str, list[dict[str, Any]]]:
    """Small problems of every class of patterns that a change holds for, as arguments of `check_attend`.

    grid: tokens per axis; the rest as there.
    """
    from foveal.patterns import Causal, Dense, Neighborhood, Sliding

    beyond = max(change.config.queries, change.config.keys) + 32
    every: dict[str, list[dict[str, Any]]] = {
        "dense": [{"grid": (beyond + 7,), "pattern": Dense()}],
        "causal": [{"grid": (beyond + 5,), "pattern": Causal()}],
        "window": [
            {"grid": (beyond + 9,), "pattern": Sliding(beyond // 3)},
            {"grid": (9, 1 + beyond // 7), "pattern": Neighborhood((5, 5))},
        ],
        "lists": [{"grid": (beyond + 11,), "pattern": Sliding(beyond // 4, sink_tokens=17)}],
        "documents": [
            {
                "grid": (beyond + 13,),
                "pattern": Causal(),
                "cu_seqlens": (0, beyond // 2 + 3, beyond + 13),
            }
        ],
    }
    return every if change.pattern is None else {change.pattern: every[change.pattern]}
