"""Lines of the sparse suite as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from foveal.bench.selection.report import Line, points

DENSITIES = (0.15, 0.3)
MEASURES = {
    "mass": "softmax kept", "error": "output error", "needle": "weight on the fact",
    "time": "time, of dense",
}  # fmt: skip


def markdown(lines: Sequence[Line]) -> str:
    """What every method keeps at 15 and 30 % of the pairs, and what the whole model says with it."""
    parts, merged = [], points(lines)
    for length in sorted({line["length"] for line in merged}):
        own = [line for line in merged if line["length"] == length]
        known = [n for n in MEASURES if any(x["values"].get(n) is not None for x in own)]
        if len({x["method"] for x in own}) == len(own):
            parts += [*_one_each(length, own, known), ""]
            continue
        parts += [f"{length:,} tokens, at 15 / 30 % of the pairs:", ""]
        parts += [
            f"| % | {' | '.join(MEASURES[n] for n in known)} |",
            "|---" * (len(known) + 1) + "|",
        ]
        for rows, name in sorted({(x["rows"], x["method"]) for x in own}):
            mine = [x["values"] for x in own if (x["method"], x["rows"]) == (name, rows)]
            cells = [" / ".join(_at(mine, n, d) for d in DENSITIES) for n in known]
            mark = ", last queries" if rows == "last" else ""
            if any(set(cell) - set("- /") for cell in cells):
                parts.append(f"| {name}{mark} | {' | '.join(cells)} |")
        said = [x for x in own if x["values"].get("agreement") is not None]
        if said:
            header = (
                "method | pairs [%] | softmax kept [%] | same next token [%] | KL [nat] | fact [%]"
            )
            parts += ["", f"{length:,} tokens, the whole model:", ""]
            parts += [f"| {header} |", "|---|---|---|---|---|---|", *map(_said, said)]
        parts.append("")
    subjects = ", ".join(sorted({line["subject"] for line in lines}))
    devices = {line["length"]: line["environment"]["device_name"] for line in lines}
    where = ", ".join(f"{n:,} tokens on {name}" for n, name in sorted(devices.items()))
    return "\n".join([*parts, f"{subjects}; {where}."])


def _one_each(length: int, own: Sequence[Line], known: Sequence[str]) -> list[str]:
    """One setting per method as it was measured."""
    head = " | ".join(("method", "pairs", *(MEASURES[n] for n in known)))
    rows = [f"{length:,} tokens, %:", "", f"| {head} |", "|---" * (len(known) + 2) + "|"]
    for line in own:
        values = [line["values"].get(name) for name in ("density", *known)]
        cells = ["-" if x is None else f"{100 * x:.1f}" for x in values]
        mark = ", last queries" if line["rows"] == "last" else ""
        rows.append(f"| {line['method']}{mark} | {' | '.join(cells)} |")
    return rows


def _said(line: Line) -> str:
    v = line["values"]
    shown = (v.get("density"), v.get("mass"), v["agreement"], v["divergence"], v["hits"])
    cells = ["-" if x is None else f"{100 * x:.1f}" for x in shown]
    cells[3] = f"{v['divergence']:.3f}"
    return f"| {line['method']} | {' | '.join(cells)} |"


def _at(values: Sequence[dict[str, Any]], name: str, density: float) -> str:
    """A measure at a density, straight lines between the logarithms of the densities beside it."""
    found = sorted(
        (v["density"], v[name])
        for v in values
        if v.get("density") is not None and v.get(name) is not None
    )
    for (a, low), (b, high) in pairwise(found):
        if a <= density <= b:
            share = math.log(density / a) / math.log(b / a) if b > a else 0.0
            return f"{100 * (low + share * (high - low)):.1f}"
    return "-"
